"""The back end that XLA compiles, on every platform."""

from collections.abc import Sequence

import jax

from pallas_kernels import chips
from pallas_kernels.backend import Backend, plus
from pallas_kernels.layout import MixedTensor
from pallas_kernels.prepared import Prepared
from pallas_kernels.xla.prepared import joinable, prepare_stack
from pallas_kernels.xla.product import mixed_matmul


def _matmul(x: jax.Array, w: MixedTensor | Prepared, residual: jax.Array | None = None) -> jax.Array:
    return plus(residual, mixed_matmul(x, w))


def _prepare(
    layers: Sequence[Sequence[MixedTensor]], *, stacked: bool, feeds: int, consume: bool
) -> Prepared | None:
    # Only CPUs multiply packed words in loops; elsewhere XLA dequantizes.
    if chips.of_target().platform != "cpu" or (len(layers[0]) > 1 and not joinable(layers[0])):
        return None
    return prepare_stack(layers, consume=consume)


BACKEND = Backend("xla", None, _matmul, _prepare)
