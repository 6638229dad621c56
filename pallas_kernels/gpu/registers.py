"""Register-level steps of the GPU kernel for which Pallas has no operation.

A warpgroup (4 warps of 32 threads) holds a matrix distributed over its threads' registers; a *layout* says
which thread has which elements. The tensor-core instruction ``mma.m16n8k16`` needs its operands in layouts of
its own: thread ``4 c + r`` of a warp has column ``c`` of a tile of 8 columns, and of the right operand rows
``2 r, 2 r + 1`` (one 32-bit register) and ``8 + 2 r, 8 + 2 r + 1`` (another).

The kernel departs from these layouts in three ways. All are free, because they only change which elements a
register stands for:

* *A word is two rows.* Thread ``4 c + r`` loads word rows ``r`` and ``r + 4``; each 32-bit word, once masked,
  is a pair of bfloat16 (:meth:`Warps.as_operand`). x is brought into the order of rows that results.
* *Columns are permuted.* A thread loads up to 4 *adjacent* columns at once, and uses each in another tile of
  8. So the product's columns are permuted among the tiles of a warp. Scales are loaded and results are stored
  with the same permutation, so it is never visible outside (:meth:`Warps.as_accumulator`,
  :meth:`Warps.from_accumulator`).
* *Each warp has its own groups.* With ``split`` above 1 the accumulator has 16 rows for each of ``split``
  *K-slices*, each with its own warps, and x's rows of one K-slice are those of another group than the next
  one's. The layout says that all K-slices hold the same right operand; but each has loaded the words of its
  own group, from an address that differs from warp to warp (:meth:`Warps.own`).

In interpret mode there are no registers: the first is a bitcast, the second is the identity, the third is an
array with a leading axis ``split``, and ``plgpu.mma`` (without an interpreter rule in jax 0.12.0.1) is a
product per K-slice. Interpret mode therefore tests the arithmetic and the indices, not the functions that
rename registers; ``tests/test_gpu_registers.py`` executes the code that these emit, for every thread.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.operands import ROW_TILE, WORD_ROWS

WARPS = 4
VECTOR_BYTES = 16
"""Most bytes of registers that are stored at once. Mosaic swizzles shared memory in tiles of 16 bytes and, in
jax 0.12, stores a longer vector as if there were no swizzle (seen on an H200)."""


@dataclasses.dataclass(frozen=True)
class Warps:
    """Division of a block's work among its four warps: ``split`` K-slices of ``4 / split`` warps each.

    The warps of a K-slice divide the columns.
    """

    split: int
    interpret: bool

    @property
    def rows(self) -> int:
        """Rows of an accumulator: 16 for each K-slice."""
        return ROW_TILE * self.split

    @property
    def columns(self) -> int:
        """Columns of one tile of 8 for each warp of a K-slice."""
        return 8 * WARPS // self.split

    @property
    def accumulator(self) -> Any:
        """Layout of the accumulator ``float32[rows, n]``."""
        return plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=self.split)

    @property
    def left(self) -> Any:
        """Layout of the left operand ``bfloat16[rows, 16]``, with each K-slice's own rows."""
        return plgpu.Layout.MMA_LHS(jnp.bfloat16, m_warps=self.split)

    @property
    def right(self) -> Any:
        """Layout of the right operand ``bfloat16[16, n]``, with each K-slice's own words."""
        return plgpu.Layout.MMA_RHS(jnp.bfloat16, m_warps=self.split)

    def adjacent(self, n: int) -> int:
        """Number of adjacent columns that a thread loads at once, in a block of ``n``."""
        return min(4, n // self.columns)

    def words(self, n: int, rows: int = WORD_ROWS) -> Any:
        """Layout of words ``[rows, n]``; with fewer than 8 rows, threads of a column share or repeat them."""
        v, repeat = self.adjacent(n), plgpu.Replicated
        columns, tile = self.columns * v, 8 * v
        match rows:
            case 8 | 4:
                return tiled(((rows, columns), (4, tile), (v,)), (repeat(self.split), -4), (-2, -3))
            case 2:
                return tiled(((2, columns), (2, tile), (v,)), (repeat(self.split), -4), (-2, repeat(2), -3))
            case 1:
                return tiled(((1, columns), (tile,), (v,)), (repeat(self.split), -3), (-2, repeat(4)))
        raise ValueError(f"{rows} word rows, expected 1, 2, 4 or 8")

    def results(self, n: int) -> Any:
        """Layout of results ``[rows, n]``, adjacent columns in one thread; ``.reduce(0)`` is one row's."""
        v = self.adjacent(n)
        tiling = (self.rows, self.columns * v), (ROW_TILE, 8 * v), (8, 8 * v), (2 * v,)
        return tiled(tiling, (-7, -6), (-3, -2))

    def stored(self, n: int) -> Any:
        """Layout in which results ``float32[rows, n]`` are stored: :meth:`results` in shorter vectors."""
        v, most = self.adjacent(n), VECTOR_BYTES // 4
        if 2 * v <= most:
            return self.results(n)
        tiling = (self.rows, self.columns * v), (ROW_TILE, 8 * v), (8, 8 * v), (2 * v,), (most,)
        return tiled(tiling, (-8, -7), (-4, -3))

    def share(self) -> Any:
        """K-slice that the thread's warp belongs to, a scalar that differs between warps."""
        if self.split == 1:
            return 0
        scalar = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT(()))

        @plgpu.inline_mgpu(return_type=scalar)
        def inline(ctx):
            from jax.experimental.mosaic.gpu import fragmented_array as fa
            from jax.experimental.mosaic.gpu import utils
            from jaxlib.mlir.dialects import arith

            i32 = utils.dtype_to_ir_type(jnp.int32)
            share = arith.divui(utils.warp_idx(), utils.c(WARPS // self.split, i32))
            return fa.FragmentedArray.splat(share, (), is_signed=True)

        return inline()

    def own(self, load: Callable[[Any], Any]) -> Any:
        """``load(share)`` of every warp's own K-slice; in interpret mode of all, along a new first axis."""
        if not self.interpret:
            return load(self.share())
        return jax.tree.map(lambda *shares: jnp.stack(shares), *map(load, range(self.split)))

    def mma(self, acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """``acc[rows, n] + a[rows, 16] @ b[16, n]`` on the tensor cores, for each K-slice."""
        if not self.interpret:
            return plgpu.mma(acc, a, b)
        shares = a.reshape(self.split, ROW_TILE, -1)
        return acc + jnp.matmul(shares, b, preferred_element_type=jnp.float32).reshape(acc.shape)

    def as_operand(self, words: jax.Array) -> jax.Array:
        """Words ``uint32[8, n]``, two bfloat16 each, as ``bfloat16[16, n]``: row ``2 j`` is a low half."""
        *shares, rows, n = words.shape
        if self.interpret:
            pairs = jnp.moveaxis(lax.bitcast_convert_type(words, jnp.bfloat16), -1, -2)
            return pairs.reshape(*shares, 2 * rows, n)
        from jax._src.lib.mlir import ir
        from jax.experimental.mosaic.gpu import utils

        v = self.adjacent(n)

        def rename(old: np.ndarray, new: np.ndarray) -> None:
            pair = ir.VectorType.get((2,), ir.BF16Type.get())
            for i, register in enumerate(old.flat):
                tiles, upper = divmod(i, 2)
                for t in range(v):
                    new.flat[2 * (tiles * v + t) + upper] = utils.bitcast(_element(register, t), pair)

        return _renamed(words, self.words(n), self.right, (2 * rows, n), jnp.bfloat16, rename)

    def as_accumulator(self, row: jax.Array) -> jax.Array:
        """Repeats a row ``bfloat16[n]`` as every row of an accumulator.

        The row has the layout ``results(n).reduce(0)``.
        """
        n = row.shape[-1]
        if self.interpret:
            return jnp.repeat(row.astype(jnp.float32), ROW_TILE, axis=0)
        from jax._src.lib.mlir import ir
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir.dialects import arith

        v = self.adjacent(n)

        def rename(old: np.ndarray, new: np.ndarray) -> None:
            i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
            upper_half = utils.c(-(1 << 16), i32)
            for i, register in enumerate(old.flat):
                words = utils.bitcast(register, ir.VectorType.get((v,), i32))
                values = []
                for j in range(v):  # one instruction each, where a conversion of the upper half takes two
                    word = _element(words, j)
                    halves = arith.shli(word, utils.c(16, i32)), arith.andi(word, upper_half)
                    values += [utils.bitcast(half, f32) for half in halves]
                for t in range(v):
                    new.flat[i * v + t] = _vector([values[t], values[v + t]])

        layouts = self.results(n).reduce(0), self.accumulator.reduce(0)
        return lax.broadcast_in_dim(_renamed(row, *layouts, (n,), jnp.float32, rename), (self.rows, n), [1])

    def from_accumulator(self, acc: jax.Array) -> jax.Array:
        """The accumulator ``float32[rows, n]`` in the layout ``stored(n)``."""
        n = acc.shape[-1]
        v = self.adjacent(n)
        if self.interpret or v == 1:
            return acc

        def rename(old: np.ndarray, new: np.ndarray) -> None:
            old = old.reshape(-1, v, 2)
            new = new.reshape(len(old), 2, -1)
            for columns, upper in np.ndindex(len(old), 2):
                elements = [_element(tile, e) for e in range(2) for tile in old[columns, :, upper]]
                parts = np.array_split(np.array(elements, object), new.shape[2])
                new[columns, upper] = [_vector(list(part)) for part in parts]

        return _renamed(acc, self.accumulator, self.stored(n), acc.shape, jnp.float32, rename)

    def load_words(self, ref: Any) -> list[jax.Array]:
        """Loads a plane of one group, ``uint32[rows, n]``, as tiles of 8 rows, or one tile of fewer."""
        rows, n = ref.shape
        step = min(rows, WORD_ROWS)
        tiles = [ref.at[pl.ds(i, step)] for i in range(0, rows, step)]
        return [plgpu.load(tile, layout=self.words(n, step), optimized=False) for tile in tiles]

    def full_tiles(self, tiles: list[jax.Array], bits: int) -> list[jax.Array]:
        """Tiles ``uint32[8, n]``: fewer rows are repeated, each copy shifted down by ``bits`` more."""
        words = tiles[0]
        *_, rows, n = words.shape
        if rows == WORD_ROWS:
            return tiles
        if self.interpret:
            shifted = [words >> jnp.uint32(i * bits) for i in range(WORD_ROWS // rows)]
            return [jnp.concatenate(shifted, axis=-2)]
        from jax._src.lib.mlir import ir
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir.dialects import arith, vector

        def rename(old: np.ndarray, new: np.ndarray) -> None:
            i32 = ir.IntegerType.get_signless(32)
            lane_row = arith.remui(utils.thread_idx(), utils.c(4, i32))
            for upper in range(2):
                tile_row = arith.addi(lane_row, utils.c(4 * upper, i32))
                shift = arith.muli(arith.divui(tile_row, utils.c(rows, i32)), utils.c(bits, i32))
                for i, register in enumerate(old.flat):
                    new.flat[2 * i + upper] = arith.shrui(register, vector.broadcast(register.type, shift))

        return [_renamed(words, self.words(n, rows), self.words(n), (WORD_ROWS, n), jnp.uint32, rename)]


def tiled(tiling: Any, warps: Any, lanes: Any) -> Any:
    """A layout of a tiling that need not be canonical: a tile may be as large as the one that it divides."""
    from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout

    layout = TiledLayout(plgpu.Tiling(tiling), warps, lanes, -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def _renamed(array, old_layout, new_layout, shape, dtype, rename) -> jax.Array:
    """``array`` with new registers, which ``rename(old, new)`` makes from the old ones."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa

    @plgpu.inline_mgpu(
        arg_types=(old_layout,), return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=new_layout)
    )
    def inline(ctx, array):
        layout = new_layout.to_mgpu()
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        rename(array.registers, registers)
        signed = False if jnp.issubdtype(dtype, jnp.unsignedinteger) else None
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)

    return inline(array)


def _element(register: Any, i: int) -> Any:
    from jaxlib.mlir.dialects import vector

    return vector.extract(register, dynamic_position=[], static_position=[i])


def _vector(elements: list[Any]) -> Any:
    from jax._src.lib.mlir import ir
    from jaxlib.mlir.dialects import vector

    return vector.from_elements(ir.VectorType.get((len(elements),), elements[0].type), elements)
