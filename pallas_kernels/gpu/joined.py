"""Weights made ready for the GPU kernel: one, or several that read one input, as one product.

Each has widths and an order of groups of its own. Zero codes are a byte each, so that the rows of two groups
that follow each other are a pair, as the tensor cores want them: then nothing needs to be put in another
order between the sums of x and the kernel.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import MixedTensor, exported
from pallas_kernels.planes import WORD_BITS
from pallas_kernels.prepared import InputNorm, Prepared, fit_together, side_by_side

DEPTH = 16
"""Rows of a tensor-core instruction's right operand: channels per instruction, or groups in a chunk."""
LEAST_TILE = 32
"""Columns of a tile at least, and what its columns are a multiple of: a block of the kernel."""


@exported
@partial(
    jax.tree_util.register_dataclass,
    data_fields=[*Prepared.ARRAYS, "segments", "orders", "places", "zero_steps", "input_norm"],
    meta_fields=[*Prepared.STATIC, "widths", "feeds"],
)
@dataclasses.dataclass(frozen=True)
class Joined(Prepared):
    """Weights side by side for one launch: a block of columns belongs to one of them.

    Rows of scales and zero codes at the end, after those of all groups, fill up a chunk of 16 groups.

    Attributes:
      segments: ``int32[weights, len(widths)]``, how many groups of a weight have which width.
      orders: ``int32[weights, G]``, as a weight's ``order``.
      places: ``int32[weights, G]``, the inverse: where in storage order a group of channels is.
      zero_steps: ``float32[weights, G]``, what a unit of a group's zero code is worth, in storage order.
      input_norm: what happens to the input first.
      widths: that occur in any of the weights, ascending; static.
      feeds: group size of the product that takes what these give (:mod:`pallas_kernels.gpu.gated`): output
        channels are stored in the order in which it reads them (:func:`channels_of_slots`); 0 for as they
        are; static.
    """

    implementation: ClassVar[str] = "mosaic_gpu"

    segments: jax.Array
    orders: jax.Array
    places: jax.Array
    zero_steps: jax.Array
    input_norm: InputNorm | None
    widths: tuple[int, ...]
    feeds: int

    @property
    def norm(self) -> InputNorm | None:
        return self.input_norm

    def behind(self, norm: InputNorm) -> "Joined":
        return dataclasses.replace(self, input_norm=norm)

    def weights(self) -> list[MixedTensor]:
        found = super().weights()
        if not self.feeds:
            return found
        back = np.argsort(channels_of_slots(self.feeds))
        return [_with_columns(w, back) for w in found]

    def in_order(self, y: jax.Array) -> jax.Array:
        """Outputs ``[M, N]`` as they are stored, in the order of output channels."""
        if not self.feeds:
            return y
        by_slot = y.reshape(len(y), -1, self.feeds // DEPTH, DEPTH // 2, 2)
        return by_slot.transpose(0, 1, 4, 2, 3).reshape(y.shape)

    @property
    def groups(self) -> int:
        """Of each weight."""
        return self.tensors[0].groups

    @property
    def group_size(self) -> int:
        """Input channels in a group."""
        return self.tensors[0].group_size

    @property
    def mean_width(self) -> float:
        """Bits of a code, averaged over the groups of all weights."""
        bits = sum(rows * n for rows, n in zip(self.rows, self.sizes)) * WORD_BITS
        return bits / (self.groups * self.group_size * sum(self.sizes))


def joinable(weights: Sequence[MixedTensor]) -> bool:
    """Whether weights that read one input can be one product."""
    return fit_together(weights) and _tile(weights) % LEAST_TILE == 0 and weights[0].groups % 2 == 0


def _tile(weights: Sequence[MixedTensor]) -> int:
    """Columns of a tile."""
    return math.gcd(*(w.shape[1] for w in weights))


def channels_of_slots(group_size: int) -> np.ndarray:
    """Which channel of a group each of its places in x has, ``int[g]``.

    Rows 2 i and 2 i + 1 of a right operand are the halves of word i, channels of the two halves of a group.
    """
    return np.arange(group_size).reshape(2, -1, DEPTH // 2).transpose(1, 2, 0).reshape(-1)


def _with_columns(w: MixedTensor, of_group: np.ndarray) -> MixedTensor:
    """Output channels of every group of them in another order."""
    index = (np.arange(0, w.shape[1], len(of_group))[:, None] + of_group[None]).reshape(-1)
    return dataclasses.replace(w, **{name: getattr(w, name)[:, index] for name in ("words", "scale", "zero")})


def join(weights: Sequence[MixedTensor], *, feeds: int = 0) -> Joined:
    """One product of weights that are :func:`joinable`; ``feeds`` is as there, a divisor of every ``N``."""
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
        input_norm=None,
        widths=widths,
        feeds=feeds,
    )
