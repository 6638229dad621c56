"""The product for experts: rows of ``x``, sorted by expert, each times its expert's packed weight."""

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
"""Least rows of a chunk of an expert's tokens: with fewer, unpacking the weight would dominate."""


def mixed_ragged_dot(
    x: Float[Array, "M K"],
    w: MixedTensor,
    group_sizes: Int[Array, "E"],
    *,
    rows: int | None = None,
    implementation: str | Sequence[str] | None = None,
    preferred_element_type: DTypeLike = jnp.float32,
) -> Float[Array, "M N"]:
    """`jax.lax.ragged_dot` with packed weights, accumulated in float32.

    The first ``group_sizes[0]`` rows of ``x`` are multiplied by ``w[0]``, the next ``group_sizes[1]`` by
    ``w[1]``, and so on. Each expert's rows are processed in chunks of ``rows`` rows, one after another; an
    expert without rows has no chunk. A chunk is one :func:`~pallas_kernels.mixed_matmul` by any of its back
    ends; its weight is sliced from the stack while packed. Differentiable in ``x``.

    Args:
      x: bfloat16 or float32.
      w: the experts' weights ``[K, N]``, stacked on a leading axis of the leaves
        (`pallas_kernels.layout.stack`).
      group_sizes: ``int32[E]``, at most ``M`` in total; rows after the total give 0.
      rows: rows of a chunk; by default about half the rows of an expert if all experts have equally many.
      implementation: as for :func:`~pallas_kernels.mixed_matmul`.
      preferred_element_type: dtype of the result.

    Raises:
      ValueError: a shape does not fit, or ``rows`` is below 1.
    """
    if w.ndim != 3:
        raise ValueError(f"w is no stack of experts: its words have shape {w.words.shape}")
    if x.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"x has shape {x.shape}, expected [M, {w.shape[0]}] for weights of shape {w.shape}")
    if group_sizes.shape != (len(w),):
        raise ValueError(f"group_sizes has shape {group_sizes.shape}, expected [{len(w)}], one per expert")
    known = isinstance(x.shape[0], int)  # else symbolic: the exported program's caller decides
    if rows is None:
        rows = chunk_rows(x.shape[0], len(w)) if known else LEAST_ROWS
    if rows < 1:
        raise ValueError(f"rows is {rows}, expected at least 1")
    several = implementation is not None and not isinstance(implementation, str)
    names = tuple(implementation or ()) if several else implementation
    rows = min(rows, max(x.shape[0], 1)) if known else rows
    static, operands = (rows, names), (x, w, group_sizes.astype(jnp.int32))
    spread = meshes.spread(operands)
    if spread.explicit:  # which rows an expert has is data, so each device computes everything
        y = meshes.gathered(_ragged, static, spread.mesh, *operands)
    else:
        y = _ragged(*static, *operands)
    return y.astype(preferred_element_type)


def chunk_rows(rows: int, experts: int) -> int:
    """Rows of a chunk, of which there are about two for an expert.

    The least power of two above half the mean number of rows per expert, but at least :data:`LEAST_ROWS`.
    """
    return max(LEAST_ROWS, 1 << (rows // experts // 2).bit_length())


Product = Callable[[jax.Array, jax.Array], jax.Array]
"""Function of rows of ``x`` and the number of the expert that multiplies them."""


def by_turns(
    product: Product, n: int, rows: int, x: Float[Array, "M K"], sizes: Int[Array, "E"]
) -> Float[Array, "M n"]:
    """``product(x[start : start + rows], expert)`` for every chunk, one after another, in float32.

    Args:
      product: returns ``n`` columns.
      n: see ``product``.
      rows: rows of a chunk; if an expert has fewer left, rows of others fill it and their results are
        dropped.
      x: rows sorted by expert.
      sizes: number of rows of each expert, ``int32``.
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
    """The zero cotangent of a leaf that is a constant."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


_ragged.defvjp(_forward, _backward)
