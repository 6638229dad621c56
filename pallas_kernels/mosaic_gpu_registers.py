"""registers"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

MAGIC = 0x43004300
ACC = plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=1)
LHS = plgpu.Layout.MMA_LHS(jnp.bfloat16, m_warps=1)
RHS = plgpu.Layout.MMA_RHS(jnp.bfloat16, m_warps=1)
WORDS = plgpu.Layout.MMA_RHS(jnp.uint32, m_warps=1)


def mma(acc, a, b, interpret):
    if interpret:
        return acc + jnp.dot(a, b, preferred_element_type=jnp.float32)
    return plgpu.mma(acc, a, b)


def as_bf16_pairs(words: jax.Array, interpret: bool) -> jax.Array:
    rows, n = words.shape
    if interpret:
        return lax.bitcast_convert_type(words, jnp.bfloat16).transpose(0, 2, 1).reshape(2 * rows, n)
    from jax._src.lib.mlir import ir
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils

    @plgpu.inline_mgpu(
        arg_types=(WORDS,), return_type=plgpu.ShapeDtypeStruct((2 * rows, n), jnp.bfloat16, layout=RHS)
    )
    def reinterpret(ctx, array):
        layout, pair = RHS.to_mgpu(), ir.VectorType.get((2,), ir.BF16Type.get())
        registers = np.empty(layout.registers_shape((2 * rows, n)), dtype=object)
        for i, register in enumerate(array.registers.flat):
            registers.flat[i] = utils.bitcast(register, pair)
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return reinterpret(words)


def word_tiles(ref, virtual_bits: int, n: int, interpret: bool) -> list[jax.Array]:
    rows = ref.shape[0]
    if rows >= 8:
        return [
            plgpu.load(ref.at[8 * i : 8 * i + 8], layout=WORDS, optimized=False) for i in range(rows // 8)
        ]
    if interpret:
        words = ref[...]
        return [jnp.concatenate([words >> jnp.uint32(v * virtual_bits) for v in range(8 // rows)])]
    from jax._src.lib.mlir import ir
    from jax.experimental.mosaic.gpu import fragmented_array as fa
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    layout = _short_layout(rows)
    words = plgpu.load(ref, layout=layout, optimized=False)

    @plgpu.inline_mgpu(
        arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct((8, n), jnp.uint32, layout=WORDS)
    )
    def spread(ctx, array):
        i32 = ir.IntegerType.get_signless(32)
        layout = WORDS.to_mgpu()
        registers = np.empty(layout.registers_shape((8, n)), dtype=object)
        lane_row = arith.remui(utils.thread_idx(), utils.c(4, i32))
        lane_part = arith.divui(lane_row, utils.c(rows, i32))
        for i in range(registers.size):
            column, upper = divmod(i, 2)
            part = arith.addi(lane_part, utils.c(upper * 4 // rows, i32))
            shift = arith.muli(part, utils.c(virtual_bits, i32))
            word = array.registers.flat[column]
            vector = word.type
            registers.flat[i] = utils.bitcast(arith.shrui(utils.bitcast(word, i32), shift), vector)
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=False)

    return [spread(words)]


def _short_layout(rows: int):
    """WORDS for fewer than 8 rows: rows repeat over the four lanes that hold one column."""
    from jax.experimental.mosaic.gpu import fragmented_array as fa

    tiling, replicated = plgpu.Tiling, plgpu.Replicated
    match rows:
        case 4:
            args = tiling(((4, 32), (4, 8), (1,))), (-4,), (-2, -3)
        case 2:
            args = tiling(((2, 32), (2, 8), (1,))), (-4,), (-2, replicated(2), -3)
        case _:
            args = tiling(((1, 32), (8,), (1,))), (-3,), (-2, replicated(4))
    return plgpu.Layout.TILED(*args, vector_dim=-1)
