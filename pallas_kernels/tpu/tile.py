"""One step of the decode kernel's grid: where its operands lie, their copies, and its initial sums."""

from itertools import accumulate
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import scales
from pallas_kernels.layout import MixedTensor
from pallas_kernels.tpu.config import LANES, SUBLANES, UNPACKS, Config
from pallas_kernels.tpu.operands import (
    correct,
    measure_groups,
    measure_rows,
    permutation,
    truncate,
    zero_codes,
)
from pallas_kernels.tpu.tiling import Cut, chosen


class Memory(NamedTuple):
    """The kernel's references: first the operands, then the result, then the arrays of `decode._scratch`.

    Attributes:
      columns: scales, zeros and the bias if any: a few rows for each column.
      column_copies: buffers for copies of ``columns``, two of each.
      here, arrived: semaphores of the copies of the first three operands, and of a tile's.
      middle, unit, move: row scales, steps and permutation of x, see `pallas_kernels.tpu.operands`.
    """

    sizes_operand: Any
    order_operand: Any
    x_operand: Any
    words: Any
    columns: tuple
    out: Any
    sizes: Any
    order: Any
    x: Any
    column_copies: tuple
    here: Any
    arrived: Any
    middle: Any
    unit: Any
    move: Any
    x_groups: Any
    sums: Any
    acc: Any
    scale_rows: Any
    buffer: Any

    @classmethod
    def of(cls, refs: tuple, columns: int, layers: bool) -> "Memory":
        """Names the references of a kernel with ``columns`` operands that have a few rows for each column.

        ``layers``: if True, the weight's operands hold several layers, and the first reference is the number
        of the layer to read.
        """
        number, refs = (refs[0][0], refs[1:]) if layers else (0, refs)
        operands, (out, *scratch) = refs[: 4 + columns], refs[4 + columns :]
        sizes, order, words, scale, zero = (operands[i].at[number] for i in (0, 1, 3, 4, 5))
        copies, rest = tuple(scratch[3 : 3 + columns]), scratch[3 + columns :]
        of_columns = (scale, zero, *operands[6:])
        return cls(sizes, order, operands[2], words, of_columns, out, *scratch[:3], copies, *rest)  # type: ignore[call-arg]


class Tile:
    """A step of the grid: the copies of its operands, and its initial sums.

    Attributes:
      begins: True if x is not yet in the order of the tile's weight.
      which: index of the tile's weight.
    """

    def __init__(self, memory: Memory, w: MixedTensor, config: Config, cut: Cut) -> None:
        self.memory, self.w, self.config, self.cut = memory, w, config, cut
        self.field = UNPACKS[config.unpack]
        self.several = len(cut.sizes) > 1
        self.step, self.steps = pl.program_id(1), pl.num_programs(1)
        self.half = self.step % 2
        tile = self.number(self.step)
        self.which = cut.weight(tile)[0]
        self.begins = (self.step == 0) | cut.begins(tile) if self.several else self.step == 0

    def number(self, step):  # type: ignore[no-untyped-def]
        """Number of the tile that a step of this core computes."""
        return pl.program_id(0) * self.steps + step

    @property
    def sizes(self) -> Any:
        """Sizes of the weight's segments, in groups."""
        return self.own(self.memory.sizes, len(self.w.widths))

    @property
    def order(self) -> Any:
        """Order of the weight's groups."""
        return self.own(self.memory.order, self.w.groups)

    def own(self, table, count: int):  # type: ignore[no-untyped-def]
        """The weight's part of a table."""
        return table.at[pl.ds(self.which * count, count)] if self.several else table

    def copy_columns(self, step, half, do: str) -> None:  # type: ignore[no-untyped-def]
        """Starts copying a tile's scales, zeros and bias, or waits for it: ``do`` is "start" or "wait"."""
        memory, tile = self.memory, self.number(step)
        first = self.cut.first_strip(tile)
        for mine, width in self.cut.widths(tile):
            lanes = pl.ds(pl.multiple_of(first * LANES, LANES), width * LANES)
            for there, copy in zip(memory.columns, memory.column_copies, strict=True):
                here = copy.at[half, :, pl.ds(0, width * LANES)]
                arrived = memory.arrived.at[half, len(self.cut.blocks)]

                def run(there=there.at[:, lanes], here=here, arrived=arrived):
                    getattr(pltpu.make_async_copy(there, here, arrived), do)()

                pl.when(mine)(run)

    def start(self, step, half) -> None:  # type: ignore[no-untyped-def]
        """Starts the copies of one tile's operands to half of the buffers, in the order of their use."""
        self.copy_columns(step, half, "start")
        memory, strips, tile = self.memory, self.config.strips, self.number(step)
        for r, rows in enumerate(self.cut.blocks):

            def strip(j, _, r=r, rows=rows):
                pltpu.make_async_copy(
                    self._words(tile, j, rows),
                    memory.buffer.at[half, j, pl.ds(SUBLANES + rows.start, rows.stop - rows.start)],
                    memory.arrived.at[half, r],
                ).start()

            def all_strips(r=r, strip=strip):
                # The first block uses a loop; else the compiler would move the copy of x after all these.
                lax.fori_loop(0, strips, strip, None, unroll=strips if r else min(strips, 8))

            pl.when(self._has(rows, tile))(all_strips)

    def _words(self, tile, j, rows: slice):  # type: ignore[no-untyped-def]
        """A block of a strip's words; a strip past the end is replaced by the last.

        If there are several weights, their strips of words lie one below the other.
        """
        (which, place), cut, words = self.cut.weight(tile), self.cut, self.memory.words
        strip = jnp.minimum(place * cut.strips + j, chosen(which, cut.strips_of) - 1)
        if not self.several:
            return words.at[rows, pl.ds(pl.multiple_of(strip * LANES, LANES), LANES)]
        firsts = accumulate((n * height for n, height in zip(cut.strips_of[:-1], cut.rows)), initial=0)
        first = chosen(which, list(firsts)) + strip * chosen(which, cut.rows) + rows.start
        return words.at[pl.ds(pl.multiple_of(first, SUBLANES), rows.stop - rows.start)]

    def _has(self, rows: slice, tile):  # type: ignore[no-untyped-def]
        """True if a tile's weight has these rows of words."""
        have = [rows.start < own for own in self.cut.rows]
        return True if all(have) else chosen(self.cut.weight(tile)[0], [jnp.bool_(one) for one in have])

    def wait(self, have, need):  # type: ignore[no-untyped-def]
        """Waits for blocks of rows that begin from ``have`` to before ``need``; returns the larger one."""
        for r, rows in enumerate(self.cut.blocks):
            place = pl.ds(SUBLANES + rows.start, rows.stop - rows.start)
            there = self.memory.buffer.at[self.half, :, place]
            wanted = (rows.start >= have) & (rows.start < need)
            if (has := self._has(rows, self.number(self.step))) is not True:
                wanted = wanted & has

            def block(there=there, arrived=self.memory.arrived.at[self.half, r]):
                pltpu.make_async_copy(there, there, arrived).wait()

            pl.when(wanted)(block)
        return jnp.maximum(have, need)

    def copy_and_measure(self) -> None:
        """Copies what all steps read, and computes the scales of x; for the first step."""
        m, w, config = self.memory, self.w, self.config
        pairs = [(m.x_operand, m.x), (m.sizes_operand, m.sizes), (m.order_operand, m.order)]
        copies = [pltpu.make_async_copy(*pair, m.here.at[i]) for i, pair in enumerate(pairs)]
        for copy in copies:
            copy.start()
        self.start(0, 0)
        m.move[...] = permutation(w.group_size, config).astype(m.move.dtype)
        copies[0].wait()
        if self.field == 8:
            measure_rows(m.x, m.middle, w, config)
        copies[1].wait()
        copies[2].wait()
        self.measure_groups()

    def measure_groups(self) -> None:
        """Computes the step of x in each of the weight's groups, if x is int8."""
        m = self.memory
        if self.field == 8:
            measure_groups(self.order, m.x, m.middle, m.unit, self.w, self.config)

    def begin_with_zeros(self) -> None:
        """Initializes the sums with the zero points' term and, for 16-bit fields, the offset correction.

        Also lays out the scales by strips.
        """
        m, config = self.memory, self.config
        lifted, sums = m.sums[0], m.sums[1]
        for j in range(0, config.strips, config.join):
            lanes = slice(j * LANES, (j + config.join) * LANES)
            scale = scales.decoded(m.column_copies[0][self.half, : self.w.groups, lanes])  # [G, join * 128]
            for i in range(config.join):
                part = scale[:, i * LANES : (i + 1) * LANES]
                m.scale_rows[j + i] = part * m.unit[...] if self.field == 8 else part
            zero = zero_codes(m.column_copies[1][self.half, : self.w.zero.shape[-2], lanes], self.w)
            offset = scale * zero.astype(jnp.float32)
            high = truncate(offset)  # scales have 8 bits and zero codes up to 8: the rest fits bfloat16, too
            past = correct(sums, [high, high, offset - high])
            if self.field == 16:
                past += correct(lifted, [scale] * 3)
            m.acc[:, lanes] = -past
