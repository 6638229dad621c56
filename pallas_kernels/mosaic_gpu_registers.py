"""What the GPU kernel does to registers: the few steps that Pallas has no operation for.

A warpgroup (4 warps of 32 threads) holds a matrix spread over its threads' registers; a *layout* says
which thread has which elements. The tensor-core instruction ``mma.m16n8k16`` wants its operands in
layouts of its own: thread ``4 c + r`` of a warp has column ``c`` of a tile of 8 columns, and of the
right operand rows ``2 r, 2 r + 1`` (one 32-bit register) and ``8 + 2 r, 8 + 2 r + 1`` (another).

Two liberties are taken, and both are free, for they only rename what a register means:

* *A word is two rows.* Thread ``4 c + r`` loads word rows ``r`` and ``r + 4``; each 32-bit word, once
  masked, is a pair of bfloat16 (:func:`as_operand`). The order of rows that results is matched by x.
* *Columns trade places.* A thread loads up to 4 *adjacent* columns at once, and uses each in another
  tile of 8. So the product's columns are permuted among the tiles of a warp; the scales are loaded in
  the same way and the result is stored in the same way, and the permutation is never seen
  (:func:`as_accumulator`, :func:`from_accumulator`).

In interpret mode there are no registers: the first is a bitcast, the second is the identity, and
``plgpu.mma`` (without an interpreter rule in jax 0.12.0.1) is ``jnp.dot``. Interpret mode therefore
proves the arithmetic and the indices, not the three functions that rename registers; these rest on the
definition of the layouts, until a device has run ``tests/test_matmul_gpu.py``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu_operands import WORD_ROWS

ACC = plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=1)
LHS = plgpu.Layout.MMA_LHS(jnp.bfloat16, m_warps=1)
RHS = plgpu.Layout.MMA_RHS(jnp.bfloat16, m_warps=1)
WARP_COLUMNS = 32  # of one tile of 8 for each of four warps


def adjacent(block_n: int) -> int:
    """How many adjacent columns a thread loads at once, in a block of ``block_n``."""
    return min(4, block_n // WARP_COLUMNS)


def word_layout(block_n: int, rows: int = WORD_ROWS) -> Any:
    """``[rows, block_n]`` words; with fewer than 8 rows, the threads of one column share or repeat them."""
    v = adjacent(block_n)
    columns, tile = WARP_COLUMNS * v, 8 * v
    tiling, repeat = plgpu.Tiling, plgpu.Replicated
    args: tuple[Any, ...]
    match rows:
        case 8:
            args = tiling(((8, columns), (4, tile), (v,))), (-4,), (-2, -3)
        case 4:
            args = tiling(((4, columns), (4, tile), (v,))), (-4,), (-2, -3)
        case 2:
            args = tiling(((2, columns), (2, tile), (v,))), (-4,), (-2, repeat(2), -3)
        case 1:
            args = tiling(((1, columns), (tile,), (v,))), (-3,), (-2, repeat(4))
        case _:
            raise ValueError(f"{rows} word rows, expected 1, 2, 4 or 8")
    return plgpu.Layout.TILED(*args, vector_dim=-1)


def result_layout(block_n: int) -> Any:
    """``[M, block_n]`` results, adjacent columns in one thread; ``.reduce(0)`` is a row of them."""
    v = adjacent(block_n)
    if v == 1:  # no columns trade places
        return ACC
    tiling = plgpu.Tiling(((16, WARP_COLUMNS * v), (8, 8 * v), (2 * v,)))
    return plgpu.Layout.TILED(tiling, (-4,), (-3, -2), vector_dim=-1)


def mma(acc: jax.Array, a: jax.Array, b: jax.Array, interpret: bool) -> jax.Array:
    """``acc[M, n] + a[M, 16] @ b[16, n]`` on the tensor cores."""
    if interpret:
        return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)
    return plgpu.mma(acc, a, b)


def as_operand(words: jax.Array, interpret: bool) -> jax.Array:
    """``uint32[8, n]``, each two bfloat16, as ``bfloat16[16, n]``: row ``2 j`` is word ``j``'s low half."""
    rows, n = words.shape
    if interpret:
        return lax.bitcast_convert_type(words, jnp.bfloat16).transpose(0, 2, 1).reshape(2 * rows, n)
    from jax._src.lib.mlir import ir
    from jax.experimental.mosaic.gpu import utils

    v = adjacent(n)

    def rename(old: np.ndarray, new: np.ndarray) -> None:
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        for i, register in enumerate(old.flat):
            tiles, upper = divmod(i, 2)
            for t in range(v):
                new.flat[2 * (tiles * v + t) + upper] = utils.bitcast(_element(register, t), pair)

    return _renamed(words, word_layout(n), RHS, (2 * rows, n), jnp.bfloat16, rename)


def as_accumulator(row: jax.Array, interpret: bool) -> jax.Array:
    """A row ``bfloat16[n]`` loaded in ``result_layout(n).reduce(0)``, as a float32 row of the accumulator."""
    (n,) = row.shape
    if interpret:
        return row.astype(jnp.float32)
    from jax._src.lib.mlir import ir
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    v = adjacent(n)

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

    return _renamed(row, result_layout(n).reduce(0), ACC.reduce(0), (n,), jnp.float32, rename)


def from_accumulator(acc: jax.Array, interpret: bool) -> jax.Array:
    """The accumulator ``float32[M, n]`` in ``result_layout(n)``, ready to be stored."""
    m, n = acc.shape
    v = adjacent(n)
    if interpret or v == 1:
        return acc

    def rename(old: np.ndarray, new: np.ndarray) -> None:
        old = old.reshape(m // 16, n // (WARP_COLUMNS * v), v, 2)
        for i, index in enumerate(np.ndindex(old.shape[0], old.shape[1], 2)):
            tiles = old[index[0], index[1], :, index[2]]
            new.flat[i] = _vector([_element(tile, e) for e in range(2) for tile in tiles])

    return _renamed(acc, ACC, result_layout(n), (m, n), jnp.float32, rename)


def load_words(ref: Any) -> list[jax.Array]:
    """A plane of one group, ``uint32[rows, n]``, as tiles of 8 rows, or one of fewer."""
    rows, n = ref.shape
    step = min(rows, WORD_ROWS)
    tiles = [ref.at[pl.ds(i, step)] for i in range(0, rows, step)]
    return [plgpu.load(tile, layout=word_layout(n, step), optimized=False) for tile in tiles]


def full_tiles(tiles: list[jax.Array], bits: int, interpret: bool) -> list[jax.Array]:
    """Tiles ``uint32[8, n]``: one of fewer rows repeats them, each time shifted down by ``bits`` more."""
    (rows, n), words = tiles[0].shape, tiles[0]
    if rows == WORD_ROWS:
        return tiles
    if interpret:
        return [jnp.concatenate([words >> jnp.uint32(i * bits) for i in range(WORD_ROWS // rows)])]
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

    return [_renamed(words, word_layout(n, rows), word_layout(n), (WORD_ROWS, n), jnp.uint32, rename)]


def _renamed(array, old_layout, new_layout, shape, dtype, rename) -> jax.Array:
    """``array`` with new registers, each made from the old ones by ``rename(old, new)``."""
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
