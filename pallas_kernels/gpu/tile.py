"""One block of threads of the GPU kernel: its tile of ``y``, over all groups; see `kernel.py`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import scales
from pallas_kernels.gpu.config import Config
from pallas_kernels.gpu.joined import DEPTH, Joined
from pallas_kernels.gpu.operands import ROW_TILE, WORD_ROWS, fields, padded_groups, places
from pallas_kernels.gpu.registers import Warps
from pallas_kernels.planes import WORD_BITS, pieces


class Place(NamedTuple):
    """Location of the weight of a block of columns, among the weights side by side.

    Attributes:
      columns: the block's columns of the words and scales.
      weight: index of the weight.
      row: the weight's first row of words; if it has several tiles, that of the block's tile.
      position: row of scales of its first group.
      segments: returns the number of groups of the i-th width, a scalar in memory.
    """

    columns: Any
    weight: Any
    row: Any
    position: Any
    segments: Callable[[int], Any]


class References(NamedTuple):
    """The kernel's inputs in memory, from `kernel.references`."""

    magic: Any
    segments: Any
    first_rows: Any
    words: Any
    scale: Any
    zero_pairs: Any
    scale_pairs: Any
    x: Any
    constant: Any
    sums: Any
    squares: Any

    @classmethod
    def of(cls, refs: Sequence[Any]) -> tuple["References", Sequence[Any]]:
        """Names a kernel's first references; returns the others too."""
        count = len(cls._fields)
        return cls(*refs[:count]), refs[count:]


class Tile:
    """One block's tile of y. Its methods are traced in the order in which `kernel._body` calls them.

    The instruction takes 16 rows; with more in one operand, Mosaic would give each warp its own rows and have
    all four unpack the same words. So everything with rows is a list of tiles of 16.
    """

    def __init__(
        self,
        refs: References,
        w: Joined,
        config: Config,
        n: int,
        interpret: bool,
        sum_parts: int = 1,
        block: Any = None,
    ) -> None:
        self.refs, self.w, self.config, self.interpret = refs, w, config, interpret
        self.warps = Warps(config.split_k, interpret)
        self.bits = places(w.widths, w.group_size)
        self.sum_parts = range(sum_parts)
        block = lax.axis_index("n") if block is None else block
        column = lax.min(block * config.block_n, n - config.block_n)
        self.out_columns = pl.ds(column, config.block_n)
        self.place = self._place(w, block)
        self.weights = len(w.sizes)
        self.padded = padded_groups(w, config.split_k)
        self.tile_count = config.block_m // ROW_TILE
        self.row_block = lax.axis_index("m")
        self.row_tiles = [self.row_block * self.tile_count + r for r in range(self.tile_count)]
        self.magic = refs.magic[0].astype(jnp.uint32)

    def _place(self, w: Joined, block: Any) -> Place:
        """Location of the block's weight, found by the block's tile, which belongs to one weight."""
        refs, block_n = self.refs, self.config.block_n
        per_tile = refs.words.shape[1] // block_n
        tile, weight, first_tile = lax.div(block, per_tile), jnp.int32(0), jnp.int32(0)
        for i, end in enumerate(np.cumsum(w.tiles[:-1]).tolist()):
            beyond = tile >= end
            weight, first_tile = jnp.where(beyond, i + 1, weight), jnp.where(beyond, end, first_tile)
        row = refs.first_rows[weight, 0] + (tile - first_tile) * refs.first_rows[weight, 1]
        columns = pl.ds(lax.rem(block, per_tile) * block_n, block_n)
        return Place(columns, weight, row, tile * w.groups, lambda i: refs.segments[weight, i])

    def nothing(self) -> list[jax.Array]:
        """Initial sums, all zero, in tiles of 16 rows."""
        zeros = jnp.zeros((self.warps.rows, self.config.block_n), jnp.float32)
        return [plgpu.layout_cast(zeros, self.warps.accumulator) for _ in self.row_tiles]

    def add_segments(self, acc: list[jax.Array]) -> list[jax.Array]:
        """Adds to ``acc`` the products with the groups of every width."""
        w, config = self.w, self.config
        split, per_step = config.split_k, config.groups_per_step
        begin: Any = 0
        row: Any = self.place.row
        for i, b in enumerate(w.widths):
            rows = w.group_size * b // WORD_BITS
            if rows > self.refs.words.shape[0]:
                continue  # not even one group of this width fits
            count, done = self.place.segments(i), jnp.int32(0)
            if per_step > 1:
                steps = lax.div(count, per_step * split)
                acc = self._add_groups(b, begin, row, steps, per_step, config.stages, acc)
                done = steps * (per_step * split)
            steps = lax.div(count - done + (split - 1), split)
            stages = max(config.stages, per_step)
            end = begin + count if split > 1 else None
            acc = self._add_groups(b, begin + done, row + done * rows, steps, 1, stages, acc, end)
            begin, row = begin + count, row + count * rows
        return acc

    def _add_groups(self, b, begin, row, steps, per_step, stages, acc, end=None):  # type: ignore[no-untyped-def]
        """Adds ``steps * per_step * split`` groups: x through shared memory, words loaded one step ahead."""
        w, warps, block_m, split = self.w, self.warps, self.config.block_m, self.config.split_k
        g = w.group_size
        rows = g * b // WORD_BITS
        lanes = min(g, 64)
        first = (self.row_block * self.weights + self.place.weight) * self.padded + begin
        x_spec = plgpu.BlockSpec(
            (pl.Element(per_step * split * block_m), pl.Element(g)),
            lambda t: ((first + t * per_step * split) * block_m, 0),
            transforms=(plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(2 * lanes)),
            oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
        )

        def fetch_nth(i):
            return self._fetch(b, begin + i * split, row + i * split * rows, end)

        def step(indices, x_step, carry):
            acc, groups = carry
            for u in range(per_step):
                x_groups = [
                    plgpu.load(x_step.at[rows], layout=warps.left) for rows in self._rows_of(u * split)
                ]
                acc = self._add_group(b, acc, x_groups, groups[u])
                # Loads only now, into the registers that were just read.
                groups[u] = fetch_nth((indices[0] + 1) * per_step + u)
            return acc, groups

        pipeline = plgpu.emit_pipeline(
            step,
            grid=(steps,),
            in_specs=[x_spec],
            max_concurrent_steps=stages,
            init_carry=(acc, [fetch_nth(u) for u in range(per_step)]),
        )
        return pipeline(self.refs.x)[0]

    def _rows_of(self, position):  # type: ignore[no-untyped-def]
        """Rows of x in the groups that the K-slices process together, in tiles of 16."""
        first = position * self.config.block_m
        return [pl.ds(first + r * ROW_TILE, self.warps.rows) for r in range(self.tile_count)]

    def _fetch(self, b, position, row, end):  # type: ignore[no-untyped-def]
        """Starts loading one group per K-slice from memory to registers; from ``end`` on, scales are zero.

        A position past the last group loads the last group.
        """
        refs, w, warps = self.refs, self.w, self.warps
        rows = w.group_size * b // WORD_BITS

        def of_share(share):
            first = lax.min(row + share * rows, refs.words.shape[0] - rows)
            planes = [[self._load_plane(first, n, shift) for n, shift in piece] for piece in pieces(b)]
            scale = plgpu.load(
                refs.scale.at[
                    self.place.position + lax.min(position + share, w.groups - 1), self.place.columns
                ],
                layout=warps.results(self.config.block_n).reduce(0),
                optimized=False,
            )
            if scale.dtype == jnp.uint8:
                scale = scales.decoded(scale).astype(jnp.bfloat16)
            if end is not None:
                kept = jnp.broadcast_to(position + share < end, scale.shape)
                scale = jnp.where(kept, scale, jnp.zeros_like(scale))
            return planes, scale

        layout = warps.accumulator.reduce(1)
        before = self.place.weight * self.padded
        starts = [
            self._summed(refs.constant, self.row_block, rows_16, layout)
            for rows_16 in self._rows_of(before + lax.min(position, w.groups - 1))
        ]
        return *warps.own(of_share), starts

    def _summed(self, ref, tile, rows, layout):  # type: ignore[no-untyped-def]
        """Loads sums of x and adds their consecutive parts."""
        first, parts = tile * len(self.sum_parts), self.sum_parts
        return sum(plgpu.load(ref.at[first + i, rows], layout=layout, optimized=False) for i in parts)

    def _load_plane(self, first, n: int, shift: int):  # type: ignore[no-untyped-def]
        """Loads the plane of ``n`` bits of the group that begins at row ``first`` of the words."""
        g = self.w.group_size
        rows = pl.ds(first + g * shift // WORD_BITS, g * n // WORD_BITS)
        return self.warps.load_words(self.refs.words.at[rows, self.place.columns])

    def _operands(self, piece, planes):  # type: ignore[no-untyped-def]
        """Yields the right operands of one piece of a group: ``128 + code``, two to a word."""
        warps = self.warps
        plane_fields = [fields(n, shift, self.w.group_size, self.bits) for n, shift in piece]
        planes = [warps.full_tiles(tiles, n) for (n, _), tiles in zip(piece, planes)]
        for same_channels in zip(*plane_fields):
            code = None
            for field, tiles in zip(same_channels, planes):
                tile, by = tiles[field.tile], jnp.uint32(abs(field.by))
                shifted = tile >> by if field.by > 0 else tile << by if field.by < 0 else tile
                masked = shifted & jnp.uint32(field.mask)
                # With a second OR, LLVM would join the planes first, which takes one instruction more.
                code = masked | self.magic if code is None else masked ^ code
            yield warps.as_operand(code)

    def _add_group(self, b, acc, x, group):  # type: ignore[no-untyped-def]
        """Adds one group per K-slice to ``acc``; ``x`` holds its channels, in tiles of 16 rows."""
        warps = self.warps
        planes, scale_row, starts = group
        scale_tile = warps.as_accumulator(scale_row)
        for i, piece in enumerate(pieces(b)):
            shape = (warps.rows, self.config.block_n)
            parts = [lax.broadcast_in_dim(start, shape, [0]) for start in starts]
            for t, operand in enumerate(self._operands(piece, planes[i])):
                k = slice(t * DEPTH, (t + 1) * DEPTH)
                parts = [warps.mma(part, rows[:, k], operand) for part, rows in zip(parts, x)]
            worth = scale_tile * 16.0**i if i else scale_tile
            acc = [total + part * worth for total, part in zip(acc, parts)]
        return acc

    def subtract_zeros(self, acc: list[jax.Array]) -> list[jax.Array]:
        """``acc - (sums of x) @ (scale * zero)``, 16 groups per K-slice at a time."""
        warps, sums = self.warps, self.refs.sums
        first = self.place.weight * (sums.shape[1] // (self.weights * warps.rows))
        times = -(-self.w.groups // warps.rows)  # chunks past the last group contribute nothing

        def some(t, acc):
            products = warps.own(lambda share: self._scaled_zeros(t * self.config.split_k + share))
            # A product of two 8-bit numbers has 16 bits and is a sum of two bfloat16.
            rights = []
            for lower, upper in zip(*(_cut(product, 2) for product in products)):
                lower, upper = (lax.bitcast_convert_type(a, jnp.uint32) for a in (lower, upper))
                rights.append(warps.as_operand((lower >> jnp.uint32(16)) | upper))
            for r, tile in enumerate(self.row_tiles):
                own_rows = pl.ds((first + t) * warps.rows, warps.rows)
                left = self._summed(sums, tile, own_rows, warps.left)
                for part in _cut(left, 3):
                    for right in rights:
                        acc[r] = warps.mma(acc[r], part.astype(jnp.bfloat16), right)
            return acc

        return lax.fori_loop(0, times, some, acc)

    def _scaled_zeros(self, chunk):  # type: ignore[no-untyped-def]
        """``scale * zero`` of a chunk of 16 groups: of 8 groups, and of the 8 that are paired with them."""
        refs, place, layout = self.refs, self.place, self.warps.words(self.config.block_n)
        pair = lax.div(place.position, 2) + chunk * WORD_ROWS
        rows = pl.ds(lax.min(pair, refs.scale_pairs.shape[0] - WORD_ROWS), WORD_ROWS)
        products = []
        for which in range(2):
            both = (ref.at[rows, which, place.columns] for ref in (refs.zero_pairs, refs.scale_pairs))
            codes, scale = (plgpu.load(ref, layout=layout, optimized=False) for ref in both)
            codes = codes.astype(jnp.int32).astype(jnp.float32)
            products.append(scales.decoded(scale) * codes)
        return products

    def norm_factor(self, r: int, eps: float, layout: Any) -> jax.Array:
        """The norm's factors for the rows of the ``r``-th tile, ``float32[16]``.

        Without a layout, only that of the tile's first row.
        """
        total: Any = 0.0
        for group in range(self.w.groups):  # independent loads
            first = (self.place.weight * self.padded + group) * self.config.block_m + r * ROW_TILE
            if layout is None:
                total = total + self.refs.squares[self.row_block, first]
                continue
            rows = self.refs.squares.at[self.row_block, pl.ds(first, ROW_TILE)]
            total = total + plgpu.load(rows, layout=layout, optimized=False)
        return lax.rsqrt(total * (1 / self.w.shape[0]) + eps)

    def store(self, acc: list[jax.Array], out, bias) -> None:  # type: ignore[no-untyped-def]
        """Adds the warps' K-slices, and ``bias`` if there is one, and writes the tile.

        If ``out`` has a single row, only the tile's first row is written.
        """
        warps, split, one_row = self.warps, self.config.split_k, out.shape[0] == 1
        stored = Warps(1, self.interpret).stored(self.config.block_n)

        def write(r, y):
            if self.w.norm is not None:
                factor = self.norm_factor(r, self.w.norm.eps, None if one_row else stored.reduce(1))
                y = y * lax.broadcast_in_dim(factor, y.shape, [] if one_row else [0])
            if bias is not None:
                row = plgpu.load(bias.at[self.out_columns], layout=stored.reduce(0), optimized=False)
                y = y + (row if one_row else lax.broadcast_in_dim(row, y.shape, [1]))
            rows = 0 if one_row else pl.ds(self.row_tiles[r] * ROW_TILE, ROW_TILE)
            plgpu.store(out.at[rows, self.out_columns], y, optimized=False)

        def add_shares(shares):
            """Adds the warps' K-slices through shared memory, and writes the sum."""
            for r, total in enumerate(acc):  # Mosaic has a barrier of all warps before and after each store
                plgpu.store(shares.at[r], warps.from_accumulator(total), optimized=False)
            layout = stored.reduce(0) if one_row else stored
            for r in range(self.tile_count):
                begins = range(0, warps.rows, ROW_TILE)
                rows = [shares.at[r, begin if one_row else pl.ds(begin, ROW_TILE)] for begin in begins]
                write(r, sum(plgpu.load(row, layout=layout, optimized=False) for row in rows))

        if split > 1 or one_row:
            shape = (self.tile_count, warps.rows, self.config.block_n)
            pl.run_scoped(add_shares, plgpu.SMEM(shape, jnp.float32))
        else:
            for r, total in enumerate(acc):
                write(r, warps.from_accumulator(total))


def _cut(a: jax.Array, count: int) -> list[jax.Array]:
    """Float32 as a sum of ``count`` bfloat16 numbers, each the top bits of what remains; 3 are exact."""
    found = []
    for _ in range(count):
        bits = lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0xFFFF0000)
        found.append(lax.bitcast_convert_type(bits, jnp.float32))
        a = a - found[-1]
    return found
