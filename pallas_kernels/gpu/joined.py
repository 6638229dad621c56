"""Weights prepared for the GPU kernel: one, or several that read the same input, as one product.

Each weight has its own widths and order of groups. Zero codes have a byte each, so that the rows of two
consecutive groups are a pair, as the tensor cores need them: then nothing needs to be reordered between the
sums of x and the kernel.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import MixedTensor, exported
from pallas_kernels.prepared import InputNorm, Tiles, fit_together, side_by_side, static

DEPTH = 16
"""Rows of a tensor-core instruction's right operand: channels per instruction, or groups in a chunk."""
LEAST_TILE = 32
"""Least columns of a tile, and the divisor of its columns: the width of one block of the kernel."""


@exported
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined(Tiles):
    """Weights side by side for one launch; the columns of a block belong to one of them.

    Scales and zero codes have extra rows at the end, after those of all groups, to fill a chunk of 16 groups.

    Attributes:
      segments: ``int32[weights, len(widths)]``, the number of groups of each width in each weight.
      orders: ``int32[weights, G]``, the ``order`` of each weight.
      places: ``int32[weights, G]``, the inverse: the position in storage order of each group of channels.
      zero_steps: ``float32[weights, G]``, the value of a unit of a group's zero code, in storage order.
      widths: widths that occur in any of the weights, ascending; static.
      feeds: group size of the product that reads the results (:mod:`pallas_kernels.gpu.gated`): output
        channels are stored in the order in which it reads them (:func:`channels_of_slots`); 0 to keep their
        order; static.
    """

    implementation: ClassVar[str] = "mosaic_gpu"

    segments: jax.Array
    orders: jax.Array
    places: jax.Array
    zero_steps: jax.Array
    norm: InputNorm | None = None
    widths: tuple[int, ...] = static()
    feeds: int = static()

    def behind(self, norm: InputNorm) -> "Joined":
        return dataclasses.replace(self, norm=norm)

    def weights(self) -> list[MixedTensor]:
        found = super().weights()
        if not self.feeds:
            return found
        back = np.argsort(channels_of_slots(self.feeds))
        return [_with_columns(w, back) for w in found]

    def in_order(self, y: jax.Array) -> jax.Array:
        """Outputs ``[M, N]``, given as they are stored, in the order of output channels."""
        if not self.feeds:
            return y
        by_slot = y.reshape(len(y), -1, self.feeds // DEPTH, DEPTH // 2, 2)
        return by_slot.transpose(0, 1, 4, 2, 3).reshape(y.shape)


def joinable(weights: Sequence[MixedTensor]) -> bool:
    """True if weights that read the same input can be one product."""
    return fit_together(weights) and _tile(weights) % LEAST_TILE == 0 and weights[0].groups % 2 == 0


def _tile(weights: Sequence[MixedTensor]) -> int:
    """Columns of a tile: the greatest common divisor of the weights' columns."""
    return math.gcd(*(w.shape[1] for w in weights))


def channels_of_slots(group_size: int) -> np.ndarray:
    """Channel of a group at each of its positions in x, ``int[g]``.

    Rows 2 i and 2 i + 1 of a right operand are the halves of word i, channels of the two halves of a group.
    """
    return np.arange(group_size).reshape(2, -1, DEPTH // 2).transpose(1, 2, 0).reshape(-1)


def _with_columns(w: MixedTensor, of_group: np.ndarray) -> MixedTensor:
    """Reorders the output channels within every group of them."""
    index = (np.arange(0, w.shape[1], len(of_group))[:, None] + of_group[None]).reshape(-1)
    return dataclasses.replace(w, **{name: getattr(w, name)[:, index] for name in ("words", "scale", "zero")})


@jax.jit
def alone(w: MixedTensor) -> Joined:
    """Returns any weight as a joined one, with columns of zeros up to a multiple of :data:`LEAST_TILE`."""
    missing = -w.shape[1] % LEAST_TILE
    if missing:
        wider: dict[str, Any] = {
            name: jnp.pad(getattr(w, name), ((0, 0), (0, missing))) for name in ("words", "scale", "zero")
        }
        w = dataclasses.replace(w, **wider, shape=(w.shape[0], w.shape[1] + missing))
    return join([w])


def join(weights: Sequence[MixedTensor], *, feeds: int = 0) -> Joined:
    """Joins weights that are :func:`joinable`, or a single one, into one product.

    ``feeds`` is as in :class:`Joined`, and a divisor of every ``N``.
    """
    if feeds:
        weights = [_with_columns(w, channels_of_slots(feeds)) for w in weights]
    widths = tuple(sorted({b for w in weights for b in w.widths}))
    counts = [[w.segments[w.widths.index(b)] if b in w.widths else 0 for b in widths] for w in weights]
    common = side_by_side([weights], _tile(weights))
    for name in ("scale", "zero"):
        common[name] = jnp.pad(common[name], ((0, -weights[0].groups % DEPTH), (0, 0)))
    orders = jnp.stack([w.order for w in weights])
    return Joined(
        **common,
        segments=jnp.stack([jnp.stack([jnp.int32(count) for count in own]) for own in counts]),
        orders=orders,
        places=jnp.argsort(orders, axis=1).astype(jnp.int32),
        zero_steps=jnp.stack([w.zero_steps() for w in weights]),
        widths=widths,
        feeds=feeds,
    )
