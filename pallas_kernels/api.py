"""The public matmul: checks its arguments, picks a back end, and defines the gradient.

How each back end computes the product is up to `pallas_kernels.backends`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import meshes
from pallas_kernels.backend import plus, taken
from pallas_kernels.backends import BACKENDS, first_that_can, given, tried
from pallas_kernels.layout import MixedTensor, vary_like
from pallas_kernels.prepared import Prepared
from pallas_kernels.xla import product as xla


def mixed_matmul(
    x: Float[Array, "*batch K"],
    w: MixedTensor | Prepared,
    *,
    bias: Float[Array, "N"] | None = None,
    residual: Float[Array, "..."] | None = None,
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
    preferred_element_type: DTypeLike = jnp.float32,
) -> Float[Array, "*batch N"]:
    """``x @ w.dequantize() + bias + residual``, accumulated in float32.

    Differentiable in ``x``, ``bias`` and ``residual``, in forward and reverse mode; ``w`` is a constant. XLA
    computes a dense product in ``w.dtype``, except on CPUs with at most a few rows of ``x``, where it
    multiplies in float32. Gradients are products in ``w.dtype``. For operands over several devices see
    docs/kernels.md.

    Args:
      x: ``[..., K]``; converted to float32 unless it is float32 or bfloat16.
      w: the packed weight ``[K, N]``, or the result of :func:`prepare`; stacked leaves must be indexed or
        scanned over first.
      bias: ``[N]``, added in float32.
      residual: ``[*batch, N]``, such as the residual stream that the product is added to; added in float32.
        On NVIDIA GPUs the kernel itself adds a single row, which saves a launch.
      implementation: ``"xla"``, ``"mosaic_gpu"``, ``"mosaic_tpu"``, or several to try in order; if None,
        those of :func:`use_implementation`, else chosen by platform and number of rows.
      config: the tiling of the one kernel that ``implementation`` names (`pallas_kernels.gpu.config.Config`,
        `pallas_kernels.tpu.config.Config`); if None, the kernel's heuristic.
      preferred_element_type: dtype of the result.

    Returns:
      ``[..., N]``, float32 by default.

    Raises:
      ValueError: a shape does not fit, ``x`` is not floating, an implementation does not exist, or ``config``
        is given and ``implementation`` is not a single kernel.
      NotImplementedError: none of the requested implementations supports this product.
    """
    _check(x, w, bias, residual)
    x = taken(x)
    rows = math.prod(x.shape[:-1])
    names = given(implementation)
    tries = names or tried(rows)
    own = [name for name, backend in BACKENDS.items() if backend.platform is not None]
    if config is not None and (len(tries) != 1 or tries[0] not in own):
        raise ValueError(f"config is for one of {own}, implementation is {implementation!r}")
    spread = meshes.spread(x, w, residual)
    if spread.explicit:
        y = meshes.per_device(_on_one, (names, config), spread.mesh, x, w, residual)
    else:
        y = _on_one(names, config, x, w, residual)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    return y.astype(preferred_element_type)


def _on_one(
    names: tuple[str, ...] | None,
    config: Any,
    x: jax.Array,
    w: MixedTensor | Prepared,
    residual: jax.Array | None,
) -> jax.Array:
    """The product of operands ``[..., K]`` and ``[..., N]`` on one device, or partitioned by XLA."""
    rows = math.prod(x.shape[:-1])
    tries = names or tried(rows)
    if len(tries) > 1 and meshes.spread(x, w, residual).auto:  # XLA can partition only its own products
        names = tries = tuple(name for name in tries if BACKENDS[name].platform is None) or tries
    if isinstance(w, Prepared) and tries[0] not in ("xla", w.implementation):
        x = x if w.norm is None else w.norm(x)
        parts = [_on_one(names, config, x, one, None) for one in w.weights()]
        return plus(residual, jnp.concatenate(parts, axis=-1))
    x = vary_like(x, w)  # so that the gradient is summed over devices that share x and shard w
    added = residual
    if residual is not None:
        added = vary_like(residual.reshape(rows, w.shape[1]).astype(jnp.float32), (x, w))
    y = _matmul(names, config, x.reshape(rows, w.shape[0]), w, added)
    return y.reshape(*x.shape[:-1], w.shape[1])


def _check(
    x: jax.Array, w: MixedTensor | Prepared, bias: jax.Array | None, residual: jax.Array | None
) -> None:
    k, n = w.shape
    stacked = w.stacked and w.layer is None if isinstance(w, Prepared) else w.words.ndim != 2
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {x.shape}, expected [..., {k}] for a weight of shape {w.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}, expected a floating type")
    if stacked:
        raise ValueError(
            f"the weight of shape {w.shape} is stacked, expected a single one: scan over stacked weights"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {bias.shape}, expected {(n,)} for a weight of shape {w.shape}")
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise ValueError(f"residual has shape {residual.shape}, expected {(*x.shape[:-1], n)}")


Operands = tuple[jax.Array, MixedTensor | Prepared, jax.Array | None]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _matmul(
    names: tuple[str, ...] | None,
    config: Any,
    x: jax.Array,
    w: MixedTensor | Prepared,
    residual: jax.Array | None,
) -> jax.Array:
    """``x[M, K] @ w (+ residual)`` by the first back end that supports it on the platform.

    Back ends are tried in the order of ``names`` or, if None, in the target's order for so many rows.
    """
    tries = names or tried(x.shape[0])
    if tries == ("xla",) and not xla.is_decode(x.shape[0]):
        return first_that_can(_kernels(tries, config), x, w, residual)  # type: ignore[no-any-return]
    product = jax.custom_batching.custom_vmap(partial(first_that_can, _kernels(tries, config)))
    product.def_vmap(partial(_batched, names, config))
    return product(x, w, residual)  # type: ignore[no-any-return]


def _kernels(names: tuple[str, ...], config: Any) -> list[tuple[str | None, Callable[..., jax.Array]]]:
    """Platform and product of each back end."""
    own = {} if config is None else {"config": config}
    return [(BACKENDS[name].platform, partial(BACKENDS[name].matmul, **own)) for name in names]


def _batched(
    names: tuple[str, ...] | None,
    config: Any,
    size: int,
    batched: Any,
    x: jax.Array,
    w: MixedTensor | Prepared,
    residual: jax.Array | None,
) -> tuple[jax.Array, bool]:
    """The product of ``size`` batches.

    Batches of ``x`` become rows of one product; products of batched weights are computed one after another.
    """
    product = partial(_matmul, names, config)
    if any(jax.tree.leaves(batched[1])):
        operands, structure = jax.tree.flatten((x, w, residual))
        several = jax.tree.leaves(tuple(batched))

        def one(own: list[jax.Array]) -> jax.Array:
            turn = iter(own)
            leaves = [next(turn) if b else a for a, b in zip(operands, several)]
            return product(*jax.tree.unflatten(structure, leaves))

        return lax.map(one, [a for a, b in zip(operands, several) if b]), True
    if not batched[0]:
        return plus(residual, product(x, w, None)[None]), True
    if residual is not None:
        residual = jnp.broadcast_to(residual, (*x.shape[:2], w.shape[1])).reshape(-1, w.shape[1])
    y = product(x.reshape(-1, x.shape[2]), w, residual)
    return y.reshape(*x.shape[:2], -1), True


@_matmul.defjvp
def _tangent(
    names: tuple[str, ...] | None, config: Any, primals: Operands, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    x, w, residual = primals
    if isinstance(w, Prepared) and w.norm is not None:
        raise NotImplementedError("a product with a norm in it has no gradient: it is for generating")
    moves = linear(tangents[0], lax.stop_gradient(w))
    return _matmul(names, config, x, w, residual), plus(tangents[2], moves)


@jax.checkpoint  # otherwise the dense weight would be kept for the backward pass
def linear(x: jax.Array, w: MixedTensor | Prepared) -> jax.Array:
    """``x @ w`` for tangents and, transposed, for gradients; both in the weight's dtype."""
    dense = w.dequantize()
    # With a float32 result, float32 gradients would meet a bfloat16 weight, which XLA would convert.
    dtype = dense.dtype if dense.dtype == jnp.bfloat16 else jnp.float32
    return jnp.dot(x.astype(dense.dtype), dense, preferred_element_type=dtype).astype(jnp.float32)
