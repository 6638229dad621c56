"""The matmul on TPUs in decode (few rows of ``x``): words are read once and unpacked in registers.

The output is divided into tiles of columns, one per grid step. The kernel copies all operands itself. While
it computes a tile, it copies the next tile's operands into VMEM (fast memory), words in four blocks of rows.
The first tile is computed while its own blocks arrive, and x is prepared while the first blocks arrive. A
step runs one loop per bit width over *chunks* of ``Config.groups`` groups. The number of groups of each width
is data, and so are trip counts and row numbers: one compiled kernel serves all bit allocations. The matrix
unit is idle between two loops of a step, hence the wide tiles.

*Unpacking* (``unpack``). Codes are never converted one by one. A 32-bit word is used as four fields of 8 bits
or two of 16, and one AND leaves one code in each field, at bit 0 or 2. For 8-bit fields that *is* four int8
numbers ``q << bit``. For 16-bit fields an OR with ``0x4300`` makes two bfloat16 numbers,
``128 + (q << bit)``. The factor is divided out of ``x``; the 128 is subtracted along with the zeros.

*Order.* In every plane, field ``f`` of a word holds channels ``f * g / fields`` to ``(f + 1) * g / fields``
of its group. If a plane has too few rows to fill registers of 8, its rows are repeated, and every copy is
shifted by one slot more. Then codes of all widths come out in the same order, channel
``f * g / fields + 8 * t + r`` in field ``f`` of row ``r`` of register ``t``, and one order of ``x`` serves
all. The planes of a code are joined with an OR. If ``Config.deep``, they are instead stacked along K and
multiplied by as many copies of ``x``; this costs less if the matrix unit is 256 deep, until that unit is the
limit, so with int8 the planes of every fourth group are joined all the same. Codes wider than 4 bits are two
products of up to 4.

*x* is brought into that order in the first step, by an exact product with a permutation matrix (``prepare``).
For int8 it is first converted to fixed point, ``x ≈ r * s * (256 * a + b)``: both digits go through the
matrix unit together as twice the rows, and sums are exact integers. The row scale ``r`` (``measure_rows``)
multiplies the result. The step ``s`` of a group (``measure_groups``) is the same for all rows and multiplies
the scales, once per tile. With one row, the error is at most ``2**-16`` of the largest ``|x|`` in the group,
and ``2**-14`` for channels whose codes are at bit 2: a twentieth of the error of rounding x to bfloat16, and
about the same as that error if the row has an outlier a thousand times larger than the rest. (``digits=3``: 8
bits more.) A row with infinities or NaN does not affect other rows. With bfloat16 fields (TPUs without int8)
x is rounded to bfloat16.

*Scales and zeros* are applied to sums: ``y = sum_g scale_g * (x_g . q_g - zero_g * sum(x_g))``; the second
term, and the 128, are one small product per tile.

*Registers.* The sums of a product arrive some 200 cycles after its codes. Left alone, the compiler unpacks
during all that time and spills the codes to memory. With the scheduling barrier ``Config.ahead``, the masks
of a pair of strips depend on an earlier result, which bounds how far unpacking runs ahead.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips
from pallas_kernels.layout import MixedTensor, result_type
from pallas_kernels.planes import WORD_BITS, pieces
from pallas_kernels.tpu.config import DECODE_ROWS as DECODE_ROWS
from pallas_kernels.tpu.config import LANES, SUBLANES, UNPACKS, check_supported, checking
from pallas_kernels.tpu.config import NAME as NAME
from pallas_kernels.tpu.config import Config as Config
from pallas_kernels.tpu.config import heuristic as heuristic
from pallas_kernels.tpu.layers import Layers, padded, whole
from pallas_kernels.tpu.operands import (
    Segment,
    concatenate,
    dot,
    prepare,
    segments_of,
)
from pallas_kernels.tpu.prefill import prefill
from pallas_kernels.tpu.tile import Memory, Tile
from pallas_kernels.tpu.tiling import Cut, strips_for
from pallas_kernels.tpu.unpack import unpack

WORD_BYTES, OTHER_BYTES = 40 << 20, 16 << 20  # of VMEM, at most


def _kernel(*refs, w: MixedTensor, config: Config, cut: Cut, trips, has_bias: bool, layers: bool):  # type: ignore[no-untyped-def]
    """Computes one tile of columns; see the module's docstring."""
    tile = Tile(Memory.of(refs, 2 + has_bias, layers), w, config, cut)
    memory, field = tile.memory, tile.field

    @pl.when(tile.step == 0)
    def first():
        tile.copy_and_measure()

    @pl.when(tile.step + 1 < tile.steps)
    def following():
        tile.start(tile.step + 1, 1 - tile.half)

    if tile.several:
        pl.when(tile.begins & (tile.step > 0))(tile.measure_groups)

    segments = segments_of(tile.sizes if trips is None else trips, w, config.groups)
    # The compiler moves nothing across a wait, so these waits keep x from filling all registers.
    tile.copy_columns(tile.step, tile.half, "wait")

    @pl.when(tile.begins)
    def second():
        m = memory
        prepare(tile.order, m.x, m.middle, m.unit, m.move, m.x_groups, m.sums, segments, w, config)

    have = tile.wait(0, 1)
    tile.begin_with_zeros()
    for s in segments:

        def chunk(c, have, s=s):
            end = s.first_row + (c + 1) * config.groups * (w.group_size * s.bits // WORD_BITS)
            have = tile.wait(have, end + SUBLANES - 1)
            _chunk(c, s=s, half=tile.half, w=w, config=config, memory=memory)
            return have

        have = lax.fori_loop(0, s.chunks, chunk, jnp.int32(have))
    tile.wait(have, max(cut.rows))
    for j in range(config.strips):
        lanes = slice(j * LANES, (j + 1) * LANES)
        y = memory.acc[:, lanes] * memory.middle[...] if field == 8 else memory.acc[:, lanes]
        if has_bias:
            y += jnp.broadcast_to(memory.column_copies[2][tile.half, :, lanes], y.shape)
        memory.out[:, lanes] = y[: memory.out.shape[0]]


def _chunk(c, *, s: Segment, half, w: MixedTensor, config: Config, memory: Memory) -> None:
    """Adds the product of one chunk's groups to the sums."""
    x_groups, acc, scale_rows, buffer = memory.x_groups, memory.acc, memory.scale_rows, memory.buffer
    g, u, join, field = w.group_size, config.groups, config.join, UNPACKS[config.unpack]
    rows = acc.shape[0]
    results: list = []
    for j in range(0, config.strips, join):
        earlier = len(results) - config.ahead
        late = _after(results[earlier]) if config.ahead and earlier >= 0 else _at_once
        total = [jnp.zeros((rows, LANES), jnp.float32)] * join
        for k in range(u):
            position = jnp.where(c * u + k < s.size, s.first_group + c * u + k, w.groups)
            x, products = x_groups[position], []
            # If all groups were deep, the matrix unit would be the limit at 3 bits.
            deep = config.deep and (k % 4 > 0 or field == 16)
            # Past the segment's end x is zero, and the buffer extends by a chunk.
            row = SUBLANES + s.first_row + (c * u + k) * (g * s.bits // WORD_BITS)
            for piece in reversed(pieces(s.bits)):
                planes = [[plane] for plane in piece] if deep else [piece]
                strips = [
                    concatenate([unpack(buffer.at[half, j + i], row, p, g, field, late) for p in planes], 0)
                    for i in range(join)
                ]
                products.append(
                    dot(
                        concatenate([x] * len(planes), 1),
                        concatenate(strips, 1),
                        jnp.int32 if field == 8 else jnp.float32,
                    )
                )
            found = products[0] if len(products) == 1 else products[0] * 16 + products[1]  # highest first
            if field == 8:
                results.append(found[:SUBLANES, :LANES])
                found = _value([found[d * rows : (d + 1) * rows] for d in range(config.digits)])
            scale_row = jnp.minimum(position, w.groups - 1)
            for i in range(join):
                scale = scale_rows[j + i, pl.ds(scale_row, 1), :]
                total[i] += found[:, i * LANES : (i + 1) * LANES] * scale
        for i in range(join):
            acc[:, (j + i) * LANES : (j + i + 1) * LANES] += total[i]


def _at_once(constant):
    return constant


def _after(value):
    """Returns a scheduling barrier, which makes constants wait for int32 ``value``.

    ``value`` is always below ``2**30``, but the compiler does not know that.
    """
    return lambda constant: jnp.where(value < 1 << 30, constant, jnp.zeros_like(constant))


def _value(digits) -> jax.Array:
    """Float32 value of int32 sums of products with the digits of ``x``, highest first."""
    value = ((digits[-2] << 8) + digits[-1]).astype(jnp.float32)
    return value if len(digits) == 2 else digits[0].astype(jnp.float32) * 65536.0 + value


def mixed_matmul(
    x: jax.Array,
    w: MixedTensor | Layers,
    *,
    bias: jax.Array | None = None,
    config: Config | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """``x @ W + bias`` on a TPU, accumulated in float32.

    Args:
      x: bfloat16 or float32 ``[M, K]``; the module's docstring says how it is rounded.
      w: the packed weight ``[K, N]``, or layers of it, of which the kernel reads one; or several weights that
        read the same input.
      bias: ``[N]``, added in float32.
      config: if None, the :func:`heuristic` for the target.
      interpret: as in ``pl.pallas_call``.

    Returns:
      float32 ``[M, N]``.

    Raises:
      NotImplementedError: these kernels do not support the product or the target, see
        :func:`~pallas_kernels.tpu.config.check_supported`, or K is too large for VMEM.
    """
    m, (k, n) = x.shape[0], w.shape
    device = chips.of_target()
    sizes = w.sizes if isinstance(w, Layers) else (n,)
    config = config or heuristic(device.name, m, k, max(sizes))
    check_supported(device, x.dtype, m, w.group_size, config)
    bias = None if bias is None else bias.astype(jnp.float32)[None]
    if m > DECODE_ROWS:
        weights = [w] if isinstance(w, MixedTensor) else w.weights()
        biases = [bias] * len(weights) if bias is None else split(bias, sizes)
        found = [prefill(x, *pair, config, interpret) for pair in zip(weights, biases)]
        return concatenate(found, axis=1)
    return _decode(x, w, bias, config, interpret)


def _layers(w: MixedTensor | Layers) -> tuple[MixedTensor, list[jax.Array], list[jax.Array]]:
    """Static fields of a weight, the number of the layer to read, and the arrays of all layers.

    The arrays are segments, order, words, scales and zeros. The number is in a list, which is empty for a
    single layer. The kernel copies whole registers: a weight that is not prepared is padded here, at every
    call.
    """
    if isinstance(w, Layers):
        one, layer = w.tensors[0], jnp.int32(0) if w.layer is None else w.layer
        # Passing a number costs a copy that all others wait for.
        number = [layer[None]] if w.words.shape[0] > 1 else []
        return (
            dataclasses.replace(one, widths=w.widths),
            number,
            [w.segments, w.orders, w.words, w.scale, w.zero],
        )
    found = padded(w.words, SUBLANES, LANES), padded(w.scale, 1, LANES), padded(w.zero, 1, LANES)
    return w, [], [a[None] for a in (w.segments, w.order, *found)]


def _fitting(weight: MixedTensor | Layers, w: MixedTensor, config: Config) -> tuple[Cut, int]:
    """Tiling of a weight, or of several, whose tiles fit into VMEM twice; and rows of a strip's words there.

    Raises:
      NotImplementedError: not even the narrowest tiles fit.
    """
    rows = (weight.words.shape[0],) if isinstance(weight, MixedTensor) else weight.rows
    rows = tuple(whole(height, SUBLANES) for height in rows)
    sizes = weight.sizes if isinstance(weight, Layers) else (weight.shape[1],)
    # A chunk may extend past the end of its segment, and a load of 8 rows may begin before its group.
    buffer_rows = max(rows) + config.groups * w.group_size * max(w.widths) // WORD_BITS + 2 * SUBLANES
    strips = config.strips
    while strips > config.join and 2 * strips * buffer_rows * LANES * 4 > WORD_BYTES:
        strips = max(config.join, strips // 2 // config.join * config.join)
    if 2 * strips * buffer_rows * LANES * 4 > WORD_BYTES:
        raise NotImplementedError(
            f"{config.join * LANES} columns of {w.shape[0]} channels do not fit into VMEM"
        )
    return Cut(
        sizes, rows, strips if len(sizes) == 1 else strips_for(sizes, strips, config.join)
    ), buffer_rows


def _decode(x: jax.Array, weight: MixedTensor | Layers, bias, config: Config, interpret) -> jax.Array:
    w, number, (segments, order, *arrays) = _layers(weight)
    m, g = x.shape[0], w.group_size
    # A single row of whole registers is used as it is: padding it would be a launch.
    x = padded(x, 1 if m == 1 else SUBLANES if m <= SUBLANES else 16, w.groups * g)
    if g % LANES:  # groups begin within registers
        x = x.reshape(x.shape[0], w.groups, g).swapaxes(0, 1)
    rows = max(x.shape[-2], SUBLANES)
    if x.dtype != jnp.float32 and rows == SUBLANES:
        x = x.astype(jnp.float32)  # registers of bfloat16 have 16 rows

    cut, buffer_rows = _fitting(weight, w, config)
    config = dataclasses.replace(config, strips=cut.strips)
    columns = cut.strips * LANES
    cores = config.cores if cut.tiles % config.cores == 0 else 1

    # Segment sizes that are a NumPy array, not traced, become constant trip counts, for cost estimates. If
    # there are several weights, those of the first stand for all.
    known = segments[0, : len(w.widths)] if isinstance(segments, np.ndarray) else None
    trips = None if known is None else tuple(map(int, known))
    biases = [] if bias is None else [concatenate([padded(b, 1, LANES) for b in split(bias, cut.sizes)], 1)]
    arguments = [segments, order, x, *arrays, *biases]
    heights = [(a.shape[-2], a.dtype) for a in (*arrays[1:], *biases)]
    scratch = _scratch(x, rows, cut, heights, w, config, buffer_rows)
    held = sum(_padded_bytes(a) for a in scratch if a.memory_space == pltpu.VMEM)
    if held + 2 * rows * columns * 4 > WORD_BYTES + OTHER_BYTES:  # the result has two buffers
        raise NotImplementedError(f"{m} rows of {w.shape[0]} channels do not fit into VMEM")
    alone = len(cut.sizes) == 1
    y = pl.pallas_call(
        partial(
            _kernel, w=w, config=config, cut=cut, trips=trips, has_bias=bool(biases), layers=bool(number)
        ),
        name="mixed_matmul_decode",
        out_shape=result_type((m, cut.sizes[0] if alone else cut.tiles * columns), (x, weight)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(number),
            grid=(cores, steps := cut.tiles // cores),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arguments),
            out_specs=pl.BlockSpec((m, columns), lambda core, i, *number: (0, core * steps + i)),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=WORD_BYTES + OTHER_BYTES,
            disable_bounds_checks=not checking(),
            disable_semaphore_checks=not checking(),
        ),
        cost_estimate=_cost(m, weight.shape, arguments, layers=arrays[0].shape[0]),
        interpret=interpret,
    )(*number, *(arguments if interpret else map(stay, arguments)))
    return y if alone else jnp.concatenate(cut.results(y), axis=1)


def _scratch(x: jax.Array, rows: int, cut: Cut, heights, w: MixedTensor, config: Config, buffer_rows: int):
    """Scratch memory of :func:`_kernel`, in the order of `Memory`: sizes, order, x, and so on."""
    columns, g, weights = cut.strips * LANES, w.group_size, len(cut.sizes)
    exact = jnp.int8 if config.unpack == "int8" else jnp.bfloat16
    digits = config.digits if config.unpack == "int8" else 1
    return [
        pltpu.SMEM((weights * len(w.widths),), jnp.int32),
        pltpu.SMEM((weights * w.groups,), jnp.int32),
        pltpu.VMEM(x.shape, x.dtype),
        *(pltpu.VMEM((2, height, columns), dtype) for height, dtype in heights),
        pltpu.SemaphoreType.DMA((3,)),
        pltpu.SemaphoreType.DMA((2, len(cut.blocks) + 1)),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((w.groups, LANES), jnp.float32),
        pltpu.VMEM((g, g), exact),
        pltpu.VMEM((w.groups + 1, digits * rows, g), exact),
        pltpu.VMEM((2, rows, -(-3 * w.groups // LANES) * LANES), jnp.bfloat16),
        pltpu.VMEM((rows, columns), jnp.float32),
        pltpu.VMEM((config.strips, w.groups, LANES), jnp.float32),
        pltpu.VMEM((2, config.strips, buffer_rows, LANES), jnp.uint32),
    ]


def split(bias: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Splits a bias ``[1, N]`` of all weights into that of each weight."""
    return jnp.split(bias, np.cumsum(sizes[:-1]).tolist(), axis=1)


def stay(a: jax.Array) -> jax.Array:
    """Returns an operand that XLA leaves in the device's memory.

    By default XLA copies what fits into VMEM before a kernel starts: the scales of all layers, to read those
    of one.
    """
    return pltpu.with_memory_space_constraint(a, pltpu.HBM)


def _padded_bytes(scratch) -> int:
    """Bytes of an array in VMEM, where its last two axes are padded to whole registers."""
    *outer, rows, columns = scratch.shape
    height = SUBLANES * 4 // scratch.dtype.itemsize
    whole = (*outer, -(-rows // height) * height, -(-columns // LANES) * LANES)
    return math.prod(whole) * scratch.dtype.itemsize


def _cost(m: int, shape: tuple[int, int], arguments, layers: int) -> pl.CostEstimate:
    """Cost estimate: every argument is read once, for one of the layers, and the result is written once."""
    read = sum(a.size * a.dtype.itemsize for a in arguments) // layers
    k, n = shape
    return pl.CostEstimate(flops=2 * m * k * n, transcendentals=0, bytes_accessed=read + m * n * 4)
