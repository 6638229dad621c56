"""A product for experts: rows of ``x``, sorted by expert, each with its own expert's packed weight."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import meshes
from pallas_kernels.api import linear, mixed_matmul
from pallas_kernels.layout import MixedTensor, vary_like

LEAST_ROWS = 32
"""Rows that an expert takes in one turn at least: with fewer, unpacking its weight would be the work."""


def mixed_ragged_dot(
    x: Float[Array, "M K"],
    w: MixedTensor,
    group_sizes: Int[Array, "E"],
    *,
    rows: int | None = None,
    implementation: str | Sequence[str] | None = None,
    preferred_element_type: DTypeLike = jnp.float32,
) -> Float[Array, "M N"]:
    """The product that `jax.lax.ragged_dot` takes, of packed weights, accumulated in float32.

    The first ``group_sizes[0]`` rows of ``x`` are multiplied by ``w[0]``, the next ``group_sizes[1]`` by
    ``w[1]``, and so on. Experts take turns of ``rows`` rows, as many turns as their rows need and none
    without rows, each one :func:`~pallas_kernels.mixed_matmul` by any of its back ends; its weight is sliced
    from the stack packed. Differentiable in ``x``.

    Args:
      x: bfloat16 or float32.
      w: the experts' weights ``[K, N]``, stacked on a leading axis of the leaves
        (`pallas_kernels.layout.stack`).
      group_sizes: ``int32[E]``, together at most ``M``; rows after them give 0.
      rows: of a turn; by default about half of what an expert has if all have as many.
      implementation: as for :func:`~pallas_kernels.mixed_matmul`.
      preferred_element_type: of the result.

    Raises:
      ValueError: a shape does not fit, or ``rows`` is no positive number.
    """
    if w.ndim != 3:
        raise ValueError(f"w is no stack of experts: its words have shape {w.words.shape}")
    if x.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"x has shape {x.shape}, expected [M, {w.shape[0]}] for weights of shape {w.shape}")
    if group_sizes.shape != (len(w),):
        raise ValueError(f"group_sizes has shape {group_sizes.shape}, expected [{len(w)}], one per expert")
    known = isinstance(x.shape[0], int)  # else the program's caller will say how many there are
    if rows is None:
        rows = rows_of_turn(x.shape[0], len(w)) if known else LEAST_ROWS
    if rows < 1:
        raise ValueError(f"rows is {rows}, expected at least 1")
    several = implementation is not None and not isinstance(implementation, str)
    names = tuple(implementation or ()) if several else implementation
    rows = min(rows, max(x.shape[0], 1)) if known else rows
    static, operands = (rows, names), (x, w, group_sizes.astype(jnp.int32))
    spread = meshes.spread(operands)
    if spread.explicit:  # whose rows are where is data: each device takes all
        y = meshes.gathered(_ragged, static, spread.mesh, *operands)
    else:
        y = _ragged(*static, *operands)
    return y.astype(preferred_element_type)


def rows_of_turn(rows: int, experts: int) -> int:
    """Rows of one turn where ``rows`` are shared by so many experts: a power of two, half a fair share or
    a little more, and :data:`LEAST_ROWS` at least."""
    return max(LEAST_ROWS, 1 << (rows // experts // 2).bit_length())


Product = Callable[[jax.Array, jax.Array], jax.Array]
"""From rows of ``x`` and the number of the expert that takes them."""


def by_turns(
    product: Product, n: int, rows: int, x: Float[Array, "M K"], sizes: Int[Array, "E"]
) -> Float[Array, "M n"]:
    """``product(x[start : start + rows], expert)`` of every turn, in float32, one after another.

    Args:
      product: gives ``n`` columns.
      n: see ``product``.
      rows: of a turn; where an expert has fewer left, others' rows fill it up and count for nothing.
      x: rows sorted by expert.
      sizes: how many each expert has, ``int32``.
    """
    turns = -(-sizes // rows)
    last_turn, end = jnp.cumsum(turns), jnp.cumsum(sizes)
    filled = jnp.pad(x, ((0, rows), (0, 0)))

    def turn(i: jax.Array, y: jax.Array) -> jax.Array:
        expert = jnp.sum(last_turn <= i)
        done = (i - last_turn[expert] + turns[expert]) * rows
        start = end[expert] - sizes[expert] + done
        found = product(lax.dynamic_slice_in_dim(filled, start, rows), expert)
        own = jnp.arange(rows) < sizes[expert] - done
        before = lax.dynamic_slice_in_dim(y, start, rows)
        return lax.dynamic_update_slice_in_dim(y, jnp.where(own[:, None], found, before), start, axis=0)

    y = vary_like(jnp.zeros((x.shape[0] + rows, n), jnp.float32), (x, sizes))
    return lax.fori_loop(0, last_turn[-1], turn, y)[: x.shape[0]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged(rows: int, names: Any, x: jax.Array, w: MixedTensor, sizes: jax.Array) -> jax.Array:
    def product(x: jax.Array, expert: jax.Array) -> jax.Array:
        return mixed_matmul(x, w[expert], implementation=names)

    return by_turns(product, w.shape[1], rows, vary_like(x, w), sizes)


def _forward(rows: int, names: Any, x: jax.Array, w: MixedTensor, sizes: jax.Array):
    return _ragged(rows, names, x, w, sizes), (x[:0], w, sizes)


def _backward(rows: int, names: Any, residuals: tuple[jax.Array, MixedTensor, jax.Array], dy: jax.Array):
    like, w, sizes = residuals

    def product(dy: jax.Array, expert: jax.Array) -> jax.Array:
        x = vary_like(jnp.zeros((rows, w.shape[0]), jnp.float32), dy)
        return jax.linear_transpose(lambda x: linear(x, w[expert]), x)(dy)[0]  # type: ignore[no-any-return]

    dx = by_turns(product, w.shape[0], rows, vary_like(dy, w), sizes).astype(like.dtype)
    return dx, *jax.tree.map(_no_gradient, (w, sizes))


def _no_gradient(leaf: jax.Array) -> jax.Array | np.ndarray:
    """The cotangent of a leaf that is a constant."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


_ragged.defvjp(_forward, _backward)
