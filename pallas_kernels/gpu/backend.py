"""The back end for NVIDIA GPUs; its kernels are imported when they are used, which takes a second."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import chips
from pallas_kernels.backend import Backend, importing, taken
from pallas_kernels.gpu import joined
from pallas_kernels.gpu.config import NAME, check_supported
from pallas_kernels.layout import MixedTensor
from pallas_kernels.prepared import Prepared

MOST_ROWS = 128
"""Rows of ``x`` up to which the kernel is used; measured on an H200 (docs/devices.md)."""


def _matmul(x: jax.Array, w: Any, residual: jax.Array | None = None, **config: Any) -> jax.Array:
    with importing(NAME):
        from pallas_kernels.gpu.kernel import mixed_matmul

    return mixed_matmul(x, w, residual=residual, **config)


def _prepare(
    layers: Sequence[Sequence[MixedTensor]], *, stacked: bool, feeds: int, consume: bool
) -> Prepared | None:
    weights = layers[0]
    if stacked or not joined.joinable(weights):
        return None
    try:
        with importing(NAME):
            import pallas_kernels.gpu.kernel  # noqa: F401
        check_supported(chips.of_target(), jnp.dtype(jnp.bfloat16), 1, weights[0].group_size, None)
    except NotImplementedError:
        return None
    return joined.join(weights, feeds=feeds)


def _mlp(x: jax.Array, w: Any, down: Any, residual: jax.Array | None, *, activation: str) -> jax.Array:
    with importing(NAME):
        from pallas_kernels.gpu import gated
    if not isinstance(w, joined.Joined) or not isinstance(down, joined.Joined):
        raise NotImplementedError(f"{NAME} multiplies by weights that it has prepared")
    rows = math.prod(x.shape[:-1])
    plan = gated.plan(rows, taken(x).dtype, w, down, activation)
    added = None if residual is None else residual.reshape(rows, -1)
    y = gated.mlp(taken(x).reshape(rows, -1), w, down, added, activation=activation, plan=plan)
    return y.reshape(*x.shape[:-1], down.shape[1])


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    rotation: jax.Array | None,
    *at: jax.Array,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    with importing(NAME):
        from pallas_kernels.gpu import attention
    device, (batch, heads, slots, width) = chips.of_target(), keys.shape
    if not attention.supported(device, width, keys.dtype):
        raise NotImplementedError(f"{NAME} has no attention for heads of {width} in {keys.dtype}")
    scores, parts = attention.Scores(scale, softcap), attention.parts_of(device, batch * heads, slots)
    # One product gave all three, which XLA recognizes if they are concatenated as they were split.
    token = jnp.concatenate([a.reshape(batch, 1, -1) for a in (q, k, v)], axis=2)
    y, keys, values = attention.attend(token[:, 0], rotation, keys, values, *at, scores=scores, parts=parts)
    return y[:, None], keys, values


BACKEND = Backend(NAME, "cuda", _matmul, _prepare, MOST_ROWS, mlp=_mlp, attend=_attend)
