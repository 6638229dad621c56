"""A step of the decode kernel's grid: where its operands lie, their copies, and what its sums begin with."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import scales
from pallas_kernels.layout import MixedTensor
from pallas_kernels.tpu.config import LANES, SUBLANES, UNPACKS, Config
from pallas_kernels.tpu.operands import (
    blocks_of,
    correct,
    measure_groups,
    measure_rows,
    permutation,
    truncate,
    zero_codes,
)


class Memory(NamedTuple):
    """The kernel's references. Operands come first, then the result, then what :func:`_scratch` asks for.

    Attributes:
      columns: scales, zeros and the bias if any: a few rows for each column.
      column_copies: of the same, two of each.
      here, arrived: semaphores of the copies of the first three operands, and of a tile's.
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
        """With ``columns`` operands that have a few rows for each column.

        ``layers``: whether the weight's operands are of several, and which to read comes first.
        """
        number, refs = (refs[0][0], refs[1:]) if layers else (0, refs)
        operands, (out, *scratch) = refs[: 4 + columns], refs[4 + columns :]
        sizes, order, words, scale, zero = (operands[i].at[number] for i in (0, 1, 3, 4, 5))
        copies, rest = tuple(scratch[3 : 3 + columns]), scratch[3 + columns :]
        of_columns = (scale, zero, *operands[6:])
        return cls(sizes, order, operands[2], words, of_columns, out, *scratch[:3], copies, *rest)  # type: ignore[call-arg]


class Tile:
    """A step of the grid: its operands' copies, and what its sums begin with."""

    def __init__(self, memory: Memory, w: MixedTensor, config: Config) -> None:
        self.memory, self.w, self.config = memory, w, config
        self.field = UNPACKS[config.unpack]
        self.last = memory.words.shape[1] // LANES - 1
        self.step, self.steps = pl.program_id(1), pl.num_programs(1)
        self.half = self.step % 2
        self.blocks = blocks_of(memory.words.shape[0])

    def copy_columns(self, step, half, do: str) -> None:  # type: ignore[no-untyped-def]
        """ "start" or "wait": copies of one tile's scales, zeros and bias."""
        memory, strips, last = self.memory, self.config.strips, self.last
        tile, tiles = pl.program_id(0) * self.steps + step, pl.num_programs(0) * self.steps
        widths = [(tile == tiles - 1, last % strips + 1)]  # in strips
        if last >= strips:
            widths.append((tile < tiles - 1, strips))
        for mine, width in widths:
            lanes = pl.ds(pl.multiple_of(tile * strips * LANES, LANES), width * LANES)
            for there, copy in zip(memory.columns, memory.column_copies, strict=True):
                here = copy.at[half, :, pl.ds(0, width * LANES)]
                arrived = memory.arrived.at[half, len(self.blocks)]
                copying = pltpu.make_async_copy(there.at[:, lanes], here, arrived)
                pl.when(mine)(getattr(copying, do))

    def start(self, step, half) -> None:  # type: ignore[no-untyped-def]
        """Copies of one tile's operands to half of the buffers, in the order of their use."""
        self.copy_columns(step, half, "start")
        memory, strips = self.memory, self.config.strips
        for r, rows in enumerate(self.blocks):

            def strip(j, _, r=r, rows=rows):
                first = (pl.program_id(0) * self.steps + step) * strips
                at = jnp.minimum(first + j, self.last) * LANES
                pltpu.make_async_copy(
                    memory.words.at[rows, pl.ds(pl.multiple_of(at, LANES), LANES)],
                    memory.buffer.at[half, j, pl.ds(SUBLANES + rows.start, rows.stop - rows.start)],
                    memory.arrived.at[half, r],
                ).start()

            # The first is a loop lest the compiler move the copy of x behind all these.
            lax.fori_loop(0, strips, strip, None, unroll=strips if r else min(strips, 8))

    def wait(self, have, need):  # type: ignore[no-untyped-def]
        """For blocks of rows that begin from row ``have`` to before row ``need``."""
        for r, rows in enumerate(self.blocks):
            place = pl.ds(SUBLANES + rows.start, rows.stop - rows.start)
            there = self.memory.buffer.at[self.half, :, place]
            wanted = (rows.start >= have) & (rows.start < need)
            arrived = self.memory.arrived.at[self.half, r]
            pl.when(wanted)(pltpu.make_async_copy(there, there, arrived).wait)
        return jnp.maximum(have, need)

    def copy_and_measure(self) -> None:
        """In the first step: what all steps read, and of what size x is."""
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
        if self.field == 8:
            measure_groups(m.order, m.x, m.middle, m.unit, w, config)

    def begin_with_zeros(self) -> None:
        """What zero points, and the 128 of 16-bit fields, take away; scales are laid out by strips."""
        m, config = self.memory, self.config
        lifted, sums = m.sums[0], m.sums[1]
        for j in range(0, config.strips, config.join):
            lanes = slice(j * LANES, (j + config.join) * LANES)
            scale = scales.decoded(m.column_copies[0][self.half, :, lanes])  # [G, join * 128]
            for i in range(config.join):
                part = scale[:, i * LANES : (i + 1) * LANES]
                m.scale_rows[j + i] = part * m.unit[...] if self.field == 8 else part
            zero = zero_codes(m.column_copies[1][self.half, :, lanes], self.w)
            offset = scale * zero.astype(jnp.float32)
            high = truncate(offset)  # scales have 8 bits and zero codes up to 8: the rest fits bfloat16, too
            past = correct(sums, [high, high, offset - high])
            if self.field == 16:
                past += correct(lifted, [scale] * 3)
            m.acc[:, lanes] = -past
