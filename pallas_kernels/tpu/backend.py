"""The back end for TPUs; its kernels are imported when they are used, which takes a second."""

from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.backend import Backend, importing, plus
from pallas_kernels.layout import MixedTensor
from pallas_kernels.prepared import Prepared
from pallas_kernels.tpu.config import GROUP_SIZES, NAME


def _matmul(x: jax.Array, w: Any, residual: jax.Array | None = None, **config: Any) -> jax.Array:
    with importing(NAME):
        from pallas_kernels.tpu.decode import mixed_matmul

    return plus(residual, mixed_matmul(x, w, **config))


def _prepare(
    layers: Sequence[Sequence[MixedTensor]], *, stacked: bool, feeds: int, consume: bool
) -> Prepared | None:
    try:
        with importing(NAME):
            from pallas_kernels.tpu.layers import joinable, prepare
    except NotImplementedError:
        return None
    supported = layers[0][0].group_size in GROUP_SIZES and joinable(layers[0])
    return prepare(layers, stacked=stacked, consume=consume) if supported else None


def _write_token(keys: jax.Array, values: jax.Array, *token: jax.Array) -> tuple[jax.Array, jax.Array]:
    if keys.dtype not in (jax.numpy.bfloat16, jax.numpy.float32):
        raise NotImplementedError(f"{NAME} writes bfloat16 and float32, not {keys.dtype}")
    with importing(NAME):
        from pallas_kernels.tpu.cache_write import write_slot

    return write_slot(keys, values, *token)


BACKEND = Backend(NAME, "tpu", _matmul, _prepare, write_token=_write_token)
