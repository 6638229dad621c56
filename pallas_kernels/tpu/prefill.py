"""The matmul on TPUs in prefill (many rows of ``x``), where the matrix unit is the limit.

For each tile of output columns, the first step of the inner grid axis unpacks all its weights in VMEM to
bfloat16 ``scale * (code - zero)``, in the order of ``x``'s channels; then all blocks of rows of ``x`` are
multiplied by the tile. So a weight is unpacked once however many rows there are, and ``x`` needs no
reordering.

Two weights are unpacked at a time, in the halves of a 32-bit word. bfloat16 has neighbouring rows there, so
even and odd rows of words are loaded separately and their halves are combined (``_fields``). Then one shift
and one AND leave two codes at the top of two mantissas, and one OR turns them into ``1 + code / 2**bits``
(``_short_weights``). VMEM holds weights in pairs, too: whole registers, where rows of bfloat16 would be
halves.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import scales
from pallas_kernels.layout import MixedTensor, result_type, zero_bits, zero_step
from pallas_kernels.planes import WORD_BITS, plane_widths
from pallas_kernels.tpu.config import LANES, SUBLANES, VMEM_BYTES, Config
from pallas_kernels.tpu.operands import leading, zero_codes

MANTISSA_BITS = 7  # of bfloat16
HALF, LOW = np.uint32(16), np.uint32(0xFFFF)
BLOCK_BYTES = 44 << 20  # of VMEM, at most; the compiler uses the rest


def blocks(m: int, w: MixedTensor) -> tuple[int, int]:
    """Rows of ``x`` and columns of ``W`` in a block.

    Raises:
      NotImplementedError: not even the smallest block fits into VMEM.
    """
    k, n = w.groups * w.group_size, w.shape[1]
    blocks_by_cost = (512, 1024), (256, 1024), (512, 512), (256, 512), (256, 256), (128, 256), (128, 128)
    for rows, columns in blocks_by_cost:
        # Weights, words, scales and zeros; words, x and the result are double-buffered.
        column = 2 * k + 2 * 4 * w.words.shape[0] + 2 * 4 * w.groups
        if columns * column + 2 * rows * (2 * k + 4 * columns) <= BLOCK_BYTES:
            return min(rows, -(-m // 16) * 16), min(columns, -(-n // LANES) * LANES)
    raise NotImplementedError(f"a block of {k} channels does not fit into VMEM")


def prefill(x: jax.Array, w: MixedTensor, bias: jax.Array | None, config: Config, interpret) -> jax.Array:
    """``x[M, K] @ W + bias[1, N]`` with ``W`` and ``x`` rounded to bfloat16; float32 ``[M, N]``.

    Only ``config.vector`` matters here.
    """
    m, (k, n), g = x.shape[0], w.shape, w.group_size
    x = jnp.pad(x.astype(jnp.bfloat16), ((0, 0), (0, w.groups * g - k)))
    rows, columns = blocks(m, w)
    strips, last = columns // LANES, (n - 1) // LANES
    first_group, first_row = w.segment_starts()
    plan = jnp.stack([w.segments, first_group, first_row])

    # Segment sizes that are not traced become constant trip counts, for cost estimates.
    trips = tuple(map(int, w.segments)) if isinstance(w.segments, np.ndarray) else None

    def size(a):
        return a.size * a.dtype.itemsize

    def column(height):
        return pl.BlockSpec((height, columns), lambda i, j, *_: (0, i))

    def strip(s):
        return pl.BlockSpec(
            (w.words.shape[0], LANES), lambda i, j, *_: (0, jnp.minimum(i * strips + s, last))
        )

    columns_of = [w.scale, w.zero, *([] if bias is None else [bias])]
    return pl.pallas_call(
        partial(_kernel, w=w, strips=strips, trips=trips, vector=jnp.dtype(config.vector)),
        name="mixed_matmul_prefill",
        out_shape=result_type((m, n), (x, w)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(n, columns), pl.cdiv(m, rows)),
            in_specs=[
                pl.BlockSpec((rows, x.shape[1]), lambda i, j, *_: (j, 0)),
                column(w.groups),
                column(w.zero.shape[0]),
                *([] if bias is None else [column(1)]),
                *map(strip, range(strips)),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda i, j, *_: (j, i)),
            scratch_shapes=[
                pltpu.VMEM((x.shape[1] // 2, columns), jnp.uint32),  # pairs of bfloat16
                pltpu.VMEM((2, strips, w.groups, LANES), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        # x is read again for every tile of columns, everything else once.
        cost_estimate=pl.CostEstimate(
            flops=2 * m * k * n,
            transcendentals=0,
            bytes_accessed=size(x) * pl.cdiv(n, columns) + sum(map(size, (w.words, *columns_of))) + m * n * 4,
        ),
        interpret=interpret,
    )(plan, w.order, x, *columns_of, *[w.words] * strips)


def _kernel(plan, order, x_ref, scale_ref, zero_ref, *refs, w: MixedTensor, strips: int, trips, vector):
    bias_refs, word_refs, (out_ref, dense_ref, row_ref) = (
        refs[: -strips - 3],
        refs[-strips - 3 : -3],
        refs[-3:],
    )
    finish = partial(_short_weights, vector=vector) if zero_bits(w.widths) == 4 else _long_weights

    def unpack_group(c, carry, i, b):
        position = plan[1, i] + c
        row = plan[2, i] + c * (w.group_size * b // WORD_BITS)
        pairs = pl.ds(pl.multiple_of(order[position] * (w.group_size // 2), SUBLANES), w.group_size // 2)
        for s, ref in enumerate(word_refs):
            codes = partial(_codes, ref, row, b, w.group_size)
            scale, zero = (row_ref[j, s, pl.ds(position, 1), :] for j in range(2))
            weights = finish(codes, b, scale, zero, zero_step(b, w.widths))
            lanes = slice(s * LANES, (s + 1) * LANES)
            weights = jnp.concatenate(weights).astype(jnp.bfloat16)
            dense_ref[pairs, lanes] = pltpu.bitcast(weights, jnp.uint32)
        return carry

    @pl.when(pl.program_id(1) == 0)
    def unpack_tile():
        rows = [scales.decoded(scale_ref[...]), zero_codes(zero_ref[...], w).astype(jnp.float32)]
        for s in range(strips):
            for j in range(2):
                row_ref[j, s] = rows[j][:, s * LANES : (s + 1) * LANES]
        for i, b in enumerate(w.widths):
            lax.fori_loop(0, plan[0, i] if trips is None else trips[i], partial(unpack_group, i=i, b=b), 0)

    dense = pltpu.bitcast(dense_ref[...], jnp.bfloat16)
    product = jnp.dot(x_ref[...], dense, preferred_element_type=jnp.float32)
    for bias in bias_refs:  # one or none
        product += jnp.broadcast_to(bias[...], product.shape)
    out_ref[...] = product


def _short_weights(codes, bits: int, scale, zero, step: float, vector) -> list[jax.Array]:
    """Weights ``vector[16, 128]`` of each register of codes of up to 4 bits with 4-bit zero codes.

    ``1 + q / 2**b`` and 1 plus the zero point over ``2**b`` have few bits, so their difference is exact.
    """
    ones = np.uint32(0x3F803F80)
    found = [pltpu.bitcast(code | ones, jnp.bfloat16) for code in codes(MANTISSA_BITS - bits)]
    scale, offset = (
        jnp.broadcast_to(row, found[0].shape).astype(vector)
        for row in (scale * 2.0**bits, 1 + zero * (step / 2.0**bits))
    )
    return [(code.astype(vector) - offset) * scale for code in found]


def _long_weights(codes, bits: int, scale, zero, step: float) -> list[jax.Array]:
    """Weights ``bfloat16[16, 128]`` of each register of codes of up to 8 bits with 8-bit zero codes."""
    del bits
    offset = zero * step
    weights = []
    for code in codes(0):
        low, high = (half.astype(jnp.int32).astype(jnp.float32) for half in (code & LOW, code >> HALF))
        low, high = (
            lax.bitcast_convert_type(leading((code - offset) * scale), jnp.uint32) for code in (low, high)
        )
        weights.append(pltpu.bitcast(low >> HALF | high, jnp.bfloat16))
    return weights


def _codes(ref, row, bits: int, group_size: int, up: int) -> list[jax.Array]:
    """A group's codes times ``2**up``, 16 channels in each ``uint32[8, 128]``.

    Channels ``2 * r`` and ``2 * r + 1`` are in the halves of row ``r``, as in 16 rows of bfloat16.
    """
    codes: list = [None] * (group_size // (2 * SUBLANES))
    for n in plane_widths(bits):
        rows = group_size * n // WORD_BITS
        fields = [_fields(ref, row + first, rows, n) for first in range(0, rows, 2 * SUBLANES)]
        step = n * max(1, 2 * SUBLANES // rows)  # bits between sets of 16 channels in the same rows
        for t in range(len(codes)):
            part, slot = t % len(fields), t // len(fields)
            half, by = divmod(slot * step, WORD_BITS // 2)
            word = fields[part][half]
            word = word >> np.uint32(by - up) if by >= up else word << np.uint32(up - by)
            code = word & np.uint32((((1 << n) - 1) << up) * 0x00010001)
            codes[t] = code if codes[t] is None else codes[t] | code
        row, up = row + rows, up + n
    return codes


def _fields(ref, row, rows: int, n: int) -> tuple[jax.Array, jax.Array]:
    """Combines the words of pairs of rows: returns their low halves side by side, and their high halves.

    A plane of ``n`` bits with fewer than 16 ``rows`` is repeated, each copy shifted one slot further.
    """
    height = min(SUBLANES, max(1, rows // 2))
    channel = 2 * lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    pair = []
    for first in range(2):
        words = ref[pl.ds(row + first * (rows > 1), height, stride=2), :]
        words = jnp.concatenate([words] * (SUBLANES // height))
        if rows < 2 * SUBLANES:
            words >>= (lax.div(channel + first, rows) * n).astype(jnp.uint32)
        pair.append(words)
    even, odd = pair
    return (even & LOW) | odd << HALF, even >> HALF | (odd & ~LOW)
