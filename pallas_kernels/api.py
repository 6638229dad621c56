"""The one public matmul: checks its arguments, picks a back end, and knows the gradient.

It knows nothing of how any back end works; each is a function ``(x[M, K], w) -> float32[M, N]``.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import devices, xla
from pallas_kernels.layout import MixedTensor, stack, vary_like
from pallas_kernels.prepared import Prepared, stack_consumed
from pallas_kernels.steps import joinable, prepare_stack

Kernel = Callable[..., jax.Array]


def _xla(x: jax.Array, w: MixedTensor | Prepared, residual: jax.Array | None = None) -> jax.Array:
    return _plus(residual, xla.mixed_matmul(x, w))


def _mosaic_tpu(x: jax.Array, w: Any, residual: jax.Array | None = None, **config: Any) -> jax.Array:
    from pallas_kernels.tpu.decode import mixed_matmul  # takes a second that CPUs need not spend

    return _plus(residual, mixed_matmul(x, w, **config))


def _mosaic_gpu(x: jax.Array, w: Any, residual: jax.Array | None = None, **config: Any) -> jax.Array:
    from pallas_kernels.gpu.kernel import mixed_matmul

    return mixed_matmul(x, w, residual=residual, **config)


def _plus(residual: jax.Array | None, y: jax.Array) -> jax.Array:
    return y if residual is None else residual + y


IMPLEMENTATIONS: dict[str, Kernel] = {
    "xla": _xla,
    "mosaic_gpu": _mosaic_gpu,
    "mosaic_tpu": _mosaic_tpu,
}

PLATFORM = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}
"""Where an implementation runs that does not run everywhere."""

BY_PLATFORM = {"tpu": ("mosaic_tpu", "xla"), "cuda": ("mosaic_gpu", "xla")}
"""What is tried, in order, for a target of each platform (:func:`pallas_kernels.devices.of_target`); XLA on
all others."""

MOST_ROWS = {"cuda": 128}
"""Rows of ``x`` above which a platform takes XLA's product with the dequantized weight instead: measured on
an H200 (docs/kernels.md)."""

_chosen = jax.make_user_context(None)  # part of what jit keeps programs by


def use_implementation(*names: str) -> AbstractContextManager[None]:
    """Products traced inside, of whole models too, try these implementations where none is named.

    To compare implementations, and for a program that is compiled ahead of time where no target is set
    (:func:`pallas_kernels.devices.target`). A jitted function is traced again for other names.
    """
    return _chosen(_names(names))


def prepare(
    w: MixedTensor | Sequence[MixedTensor],
    *,
    implementation: str | Sequence[str] | None = None,
    consume: bool = False,
) -> MixedTensor | Prepared:
    """A packed weight made ready to be multiplied often, by a back end that gains from it; else ``w``.

    What the product would work out of ``w`` alone, each time, is worked out once. The result is for running,
    not for storing.

    Args:
      w: the packed weight; or those of several layers, alike but for the values of their leaves and the
        rows of their words. These come back stacked, on a leading axis of the leaves where the back end
        gains nothing; else choose one by ``at(layer)``, which slices nothing.
      implementation: as for :func:`mixed_matmul`.
      consume: whether words, scales and zero codes of ``w`` are deleted as they are copied, so that never two
        of all layers are in memory; not for traced code.
    """
    name, alone = _names(implementation)[0], isinstance(w, MixedTensor)
    layers: Sequence[MixedTensor] = [w] if isinstance(w, MixedTensor) else w
    if name == "xla":
        return prepare_stack([[one] for one in layers], consume=consume)
    if (
        name == "mosaic_tpu"
        and (found := _layers_on_tpu([[one] for one in layers], not alone, consume)) is not None
    ):
        return found
    if name == "mosaic_gpu" and alone and (joined := _joined_on_gpu(layers)) is not None:
        return joined
    if isinstance(w, MixedTensor):
        return w
    return stack_consumed(layers) if consume else stack(layers)


def prepare_joined(
    layers: Sequence[Sequence[MixedTensor]],
    *,
    feeds: int = 0,
    implementation: str | Sequence[str] | None = None,
    consume: bool = False,
) -> Prepared | None:
    """Weights that read one input as one product whose result has theirs side by side, of stacked layers.

    Args:
      layers: of each layer, its weights; layers are alike as for :func:`prepare`.
      feeds: the group size of the one product that will take all that these give, such as an MLP's last, if
        it divides every ``N``: a back end may then make the two one (`pallas_kernels.mlp`).
      implementation: as for :func:`mixed_matmul`.
      consume: as for :func:`prepare`.

    Returns:
      What :func:`prepare` gives, or None if the back end gains nothing or the weights do not fit together.
    """
    name = _names(implementation)[0]
    if name == "mosaic_gpu" and len(layers) == 1:
        return _joined_on_gpu(layers[0], feeds)
    if name == "mosaic_tpu":
        return _layers_on_tpu(layers, len(layers) > 1, consume)
    if name != "xla" or not joinable(layers[0]):
        return None
    return prepare_stack(layers, consume=consume)


def _layers_on_tpu(layers: Sequence[Sequence[MixedTensor]], stacked: bool, consume: bool) -> Prepared | None:
    from pallas_kernels.tpu import config
    from pallas_kernels.tpu.layers import joinable, prepare

    supported = layers[0][0].group_size in config.GROUP_SIZES and joinable(layers[0])
    return prepare(layers, stacked=stacked, consume=consume) if supported else None


def _joined_on_gpu(weights: Sequence[MixedTensor], feeds: int = 0) -> Prepared | None:
    from pallas_kernels.gpu import config, joined

    try:
        config.check_supported(devices.of_target(), jnp.dtype(jnp.bfloat16), 1, weights[0].group_size, None)
    except NotImplementedError:
        return None
    return joined.join(weights, feeds=feeds) if joined.joinable(weights) else None


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

    Differentiable in ``x``, ``bias`` and ``residual``; ``w`` is a constant. With more than a few rows of
    ``x`` the result is that of a dense product in ``w.dtype``; with few, products are taken in float32.

    Args:
      x: bfloat16 or float32 ``[..., K]``.
      w: the packed weight ``[K, N]``, or what :func:`prepare` made of it; index or scan over stacked
        leaves first.
      bias: ``[N]``, added in float32.
      residual: ``[*batch, N]``, such as the residual stream that the product belongs to, added in float32; on
        NVIDIA GPUs one row of it by the kernel, where it would be a launch beside it.
      implementation: ``"xla"``, ``"mosaic_gpu"``, ``"mosaic_tpu"``, or several to try in order;
        by platform if None.
      config: how the one kernel that is named cuts the product (`pallas_kernels.gpu.config.Config`,
        `pallas_kernels.tpu.config.Config`); as was tuned for the target, or guessed, if None.
      preferred_element_type: of the result.

    Returns:
      ``[..., N]``, float32 if nothing else is preferred.

    Raises:
      ValueError: a shape does not fit, an implementation has no such name, or ``config`` is given and not
        one kernel named.
      NotImplementedError: none of the implementations asked for can do this product.
    """
    _check(x, w, bias, residual)
    names = _names(implementation, math.prod(x.shape[:-1]))
    if config is not None and (len(names) != 1 or names[0] not in PLATFORM):
        raise ValueError(f"config is for one of {list(PLATFORM)}, implementation is {implementation!r}")
    if isinstance(w, Prepared) and names[0] not in ("xla", w.implementation):
        x = x if w.norm is None else w.norm(x)
        parts = [mixed_matmul(x, one, implementation=names, config=config) for one in w.weights()]
        y = _plus(residual, jnp.concatenate(parts, axis=-1))
    else:
        rows = math.prod(x.shape[:-1])
        x = vary_like(x, w)  # so that the gradient sums over devices that share x and cut w
        added = residual
        if residual is not None:
            added = vary_like(residual.reshape(rows, w.shape[1]).astype(jnp.float32), (x, w))
        y = _matmul(names, config, x.reshape(rows, w.shape[0]), w, added)
        y = y.reshape(*x.shape[:-1], w.shape[1])
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    return y.astype(preferred_element_type)


def first_tried(rows: int) -> str:
    """What a product with so many rows of ``x`` tries first, on the target and inside what is traced."""
    return _names(None, rows)[0]


def tried(rows: int) -> tuple[str, ...]:
    """What the target tries, in order, for so many rows of ``x`` where no implementation is named."""
    platform = devices.of_target().platform
    return BY_PLATFORM.get(platform, ("xla",)) if rows <= MOST_ROWS.get(platform, rows) else ("xla",)


def _names(implementation: str | Sequence[str] | None, rows: int = 1) -> tuple[str, ...]:
    """What is tried for a product with so many rows."""
    if implementation is None:
        return _chosen.value or tried(rows)
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or not set(names) <= set(IMPLEMENTATIONS):
        raise ValueError(
            f"implementation is {implementation!r}, expected one or more of {list(IMPLEMENTATIONS)}"
        )
    return names


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
            f"w.words has shape {w.words.shape}, expected [rows, {n}]: scan over stacked weights"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {bias.shape}, expected {(n,)} for a weight of shape {w.shape}")
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise ValueError(f"residual has shape {residual.shape}, expected {(*x.shape[:-1], n)}")


Operands = tuple[jax.Array, MixedTensor | Prepared, jax.Array | None]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(
    names: tuple[str, ...],
    config: Any,
    x: jax.Array,
    w: MixedTensor | Prepared,
    residual: jax.Array | None,
) -> jax.Array:
    """``x[M, K] @ w (+ residual)`` by the first named back end that can on the platform."""
    name, rest = names[0], names[1:]
    run = IMPLEMENTATIONS[name] if config is None else partial(IMPLEMENTATIONS[name], config=config)
    if not rest:
        return run(x, w, residual)
    try:
        if name not in PLATFORM:
            return run(x, w, residual)
        kernel = {PLATFORM[name]: run}
        return lax.platform_dependent(x, w, residual, default=partial(_matmul, rest, None), **kernel)
    except NotImplementedError:
        return _matmul(rest, None, x, w, residual)


def _forward(
    names: tuple[str, ...],
    config: Any,
    x: jax.Array,
    w: MixedTensor | Prepared,
    residual: jax.Array | None,
) -> tuple[jax.Array, Operands]:
    if isinstance(w, Prepared) and w.norm is not None:
        raise NotImplementedError("a product with a norm in it has no gradient: it is for generating")
    # Slices without elements hand dtypes to the backward pass: what is kept must be arrays.
    kept = x[:0], w, None if residual is None else residual[:0]
    return _matmul(names, config, x, w, residual), kept


def _backward(names: tuple[str, ...], config: Any, kept: Operands, dy: jax.Array) -> tuple[Any, ...]:
    x, w, residual = kept
    dx = jnp.dot(dy, w.dequantize().T, preferred_element_type=jnp.float32).astype(x.dtype)
    return dx, jax.tree.map(no_gradient, w), None if residual is None else dy


def no_gradient(leaf: jax.Array) -> jax.Array | np.ndarray:
    """The cotangent of a leaf that is a constant."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)


_matmul.defvjp(_forward, _backward)
