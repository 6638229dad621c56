"""Tiling of the columns of weights side by side; each tile belongs to one weight."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import jax.numpy as jnp

from pallas_kernels.tpu.config import LANES, SUBLANES

STEP_STRIPS = 5
"""Cost of starting and ending the loops of a tile, in strips: some 1,000 cycles, at 190 per strip."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """Division of columns into tiles of ``strips`` strips of 128; the last tile of a weight may have fewer.

    Attributes:
      sizes: ``N`` of each weight.
      rows: rows of words of each weight, a multiple of 8.
      strips: strips of a tile.
    """

    sizes: tuple[int, ...]
    rows: tuple[int, ...]
    strips: int

    @cached_property
    def strips_of(self) -> tuple[int, ...]:
        """Number of strips of each weight."""
        return tuple(-(-n // LANES) for n in self.sizes)

    @cached_property
    def tiles_of(self) -> tuple[int, ...]:
        """Number of tiles of each weight."""
        return tuple(-(-strips // self.strips) for strips in self.strips_of)

    @property
    def tiles(self) -> int:
        """Number of tiles of all weights."""
        return sum(self.tiles_of)

    @cached_property
    def blocks(self) -> list[slice]:
        """Rows of words that are copied at a time; the first blocks are smaller so that work begins early."""
        most = max(self.rows)
        parts = (-(-most * part // (16 * SUBLANES)) * SUBLANES for part in (3, 6, 10))
        ends = sorted({0, *parts, *self.rows})
        return [slice(start, end) for start, end in pairwise(ends) if end <= most]

    def weight(self, tile: Any) -> tuple[Any, Any]:
        """Index of the weight that a tile belongs to, and index of the tile within that weight."""
        which: Any = 0
        place = tile
        for first in accumulate(self.tiles_of[:-1]):
            which = which + jnp.where(tile >= first, 1, 0)
            place = jnp.where(tile >= first, tile - first, place)
        return which, place

    def begins(self, tile: Any) -> Any:
        """True if a tile is the first of a weight."""
        return self.weight(tile)[1] == 0

    def first_strip(self, tile: Any) -> Any:
        """First strip of a tile, counted over all weights."""
        which, place = self.weight(tile)
        return chosen(which, [0, *accumulate(self.strips_of[:-1])]) + place * self.strips

    def widths(self, tile: Any) -> list[tuple[Any, int]]:
        """Pairs ``(condition, strips)``, one for every number of strips that a tile can have.

        The condition is true if this tile has that number.
        """
        which, place = self.weight(tile)
        found: dict[int, Any] = {}
        for i, (strips, count) in enumerate(zip(self.strips_of, self.tiles_of)):
            own = {strips - (count - 1) * self.strips: place == count - 1}
            if count > 1:
                own[self.strips] = True if self.strips in own else place < count - 1
            for width, mine in own.items():
                mine = mine if len(self.sizes) == 1 else (which == i) & mine
                found[width] = found[width] | mine if width in found else mine
        return [(mine, width) for width, mine in found.items()]

    def results(self, y: Any) -> list[Any]:
        """Results of each weight, from ``y[M, tiles * strips * 128]``."""
        columns = self.strips * LANES
        firsts = [columns * first for first in accumulate(self.tiles_of[:-1], initial=0)]
        return [y[:, first : first + n] for first, n in zip(firsts, self.sizes)]


def chosen(which: Any, values: Sequence[Any]) -> Any:
    """``values[which]``, by comparisons."""
    found = values[0]
    for i, value in enumerate(values[1:], 1):
        found = jnp.where(which >= i, value, found)
    return found


def strips_for(sizes: Sequence[int], most: int, join: int) -> int:
    """Strips of a tile for weights with ``sizes`` columns.

    It is the multiple of ``join`` up to ``most`` that costs least.
    """

    def cost(strips: int) -> int:
        return sum(-(-n // (strips * LANES)) for n in sizes) * (strips + STEP_STRIPS)

    return min(range(join, max(most, join) + 1, join), key=cost)
