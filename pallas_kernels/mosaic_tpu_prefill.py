"""The matmul on TPUs in prefill (many rows of ``x``), where the matrix unit is the limit.

For each tile of output columns, the first step of the inner grid axis unpacks all its weights to bfloat16
``scale * (code - zero)`` in VMEM, in the order of ``x``'s channels, and all blocks of rows of ``x`` are then
multiplied by it. So a weight is unpacked once however many rows there are, and ``x`` needs no reordering.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layout import WORD_BITS, MixedTensor, plane_widths, result_type, zero_bits, zero_step

LANES = 128
SUBLANES = 8
VMEM_BYTES = 44 << 20  # of 64 MiB on the smallest, v7x


def blocks(m: int, k: int, n: int) -> tuple[int, int]:
    """Rows of ``x`` and columns of ``W`` in a tile."""
    for rows, columns in ((512, 1024), (512, 512), (256, 512), (256, 256), (128, 256), (128, 128)):
        # x and the result are double-buffered; words are counted at 8 bits, twice.
        used = 2 * rows * k * 2 + columns * k * (2 + 2) + 2 * rows * columns * 4
        if used <= VMEM_BYTES:
            return min(rows, -(-m // 16) * 16), min(columns, -(-n // LANES) * LANES)
    raise NotImplementedError(f"a block of {k} channels does not fit into VMEM")


def prefill(x: jax.Array, w: MixedTensor, bias: jax.Array | None, interpret) -> jax.Array:
    """``x[M, K] @ W + bias[1, N]`` with ``W`` and ``x`` rounded to bfloat16; float32 ``[M, N]``."""
    m, (k, n), g = x.shape[0], w.shape, w.group_size
    x = jnp.pad(x.astype(jnp.bfloat16), ((0, 0), (0, w.groups * g - k)))
    words = jnp.pad(w.words, ((0, max(0, SUBLANES - w.words.shape[0])), (0, 0)))
    rows, columns = blocks(m, x.shape[1], n)
    strips, last = columns // LANES, (n - 1) // LANES
    first_group, first_row = w.segment_starts()
    plan = jnp.stack([w.segments, first_group, first_row])

    # Segment sizes that are no traced data become constant trip counts, for cost estimates.
    trips = tuple(map(int, w.segments)) if isinstance(w.segments, np.ndarray) else None

    def size(a):
        return a.size * a.dtype.itemsize

    def column(height):
        return pl.BlockSpec((height, columns), lambda i, j, *_: (0, i))

    def strip(s):
        return pl.BlockSpec((words.shape[0], LANES), lambda i, j, *_: (0, jnp.minimum(i * strips + s, last)))

    columns_of = [w.scale, w.zero, *([] if bias is None else [bias])]
    return pl.pallas_call(
        partial(_kernel, w=w, strips=strips, trips=trips),
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
                pltpu.VMEM((x.shape[1], columns), jnp.bfloat16),
                pltpu.VMEM((2, strips, w.groups, LANES), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=60 << 20
        ),
        # x is read again for every tile of columns, all else once.
        cost_estimate=pl.CostEstimate(
            flops=2 * m * k * n,
            transcendentals=0,
            bytes_accessed=size(x) * pl.cdiv(n, columns) + sum(map(size, (words, *columns_of))) + m * n * 4,
        ),
        interpret=interpret,
    )(plan, w.order, x, *columns_of, *[words] * strips)


def _kernel(plan, order, x_ref, scale_ref, zero_ref, *refs, w: MixedTensor, strips: int, trips):
    bias_refs, word_refs, (out_ref, dense_ref, row_ref) = (
        refs[: -strips - 3],
        refs[-strips - 3 : -3],
        refs[-3:],
    )

    def unpack_group(c, carry, i, b):
        position = plan[1, i] + c
        row = plan[2, i] + c * (w.group_size * b // WORD_BITS)
        channel = pl.multiple_of(order[position] * w.group_size, WORD_BITS)
        for s in range(strips):
            scale = row_ref[0, s, pl.ds(position, 1), :]
            offset = row_ref[1, s, pl.ds(position, 1), :] * zero_step(b, w.widths)
            weights = [
                code.astype(jnp.int32).astype(jnp.float32) * scale - offset
                for code in _codes(word_refs[s], row, b, w.group_size)
            ]
            dense_ref[pl.ds(channel, w.group_size), s * LANES : (s + 1) * LANES] = jnp.concatenate(
                weights, axis=0
            ).astype(jnp.bfloat16)
        return carry

    @pl.when(pl.program_id(1) == 0)
    def unpack_tile():
        scale = scale_ref[...].astype(jnp.float32)
        zero = zero_ref[...].astype(jnp.int32)
        if zero_bits(w.widths) == 4:
            zero = jnp.concatenate([zero & 15, zero >> 4], axis=0)[: w.groups]
        for s in range(strips):
            lanes = slice(s * LANES, (s + 1) * LANES)
            row_ref[0, s] = scale[:, lanes]
            row_ref[1, s] = zero[:, lanes].astype(jnp.float32) * scale[:, lanes]
        for i, b in enumerate(w.widths):
            lax.fori_loop(0, plan[0, i] if trips is None else trips[i], partial(unpack_group, i=i, b=b), 0)

    product = jnp.dot(x_ref[...], dense_ref[...], preferred_element_type=jnp.float32)
    for bias in bias_refs:  # one or none
        product += jnp.broadcast_to(bias[...], product.shape)
    out_ref[...] = product


def _codes(ref, row, bits: int, group_size: int) -> list[jax.Array]:
    """A group's codes as ``uint32[8, 128]`` for every 8 channels in a row."""
    codes: list[jax.Array] = []
    shift = 0
    for n in plane_widths(bits):
        rows = group_size * n // WORD_BITS
        tiles = [
            _load(ref, row + group_size * shift // WORD_BITS + SUBLANES * t, min(rows, SUBLANES))
            for t in range(max(1, rows // SUBLANES))
        ]
        # Planes of fewer than 8 rows are there 8 / rows times over, one under the other, and each copy
        # is shifted by one slot more, so that the channels of 8 rows follow one another.
        copies = max(1, SUBLANES // rows)
        sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
        spread = (sublane // min(rows, SUBLANES) * n).astype(jnp.uint32)
        for t in range(group_size // SUBLANES):
            word, by = tiles[t % len(tiles)], t // len(tiles) * copies * n
            by_sublane = np.uint32(by) if copies == 1 else spread + np.uint32(by)
            code = (word >> by_sublane) & np.uint32((1 << n) - 1)
            if shift == 0:
                codes.append(code)
            else:
                codes[t] = codes[t] | (code << np.uint32(shift))
        shift += n
    return codes


def _load(ref, row, rows: int) -> jax.Array:
    """``rows`` rows from ``row`` on, repeated to 8, without reading outside of ``ref``."""
    if rows == SUBLANES:
        return ref[pl.ds(row, SUBLANES), :]
    start = jnp.minimum(row, ref.shape[0] - SUBLANES)
    words = pltpu.roll(ref[pl.ds(start, SUBLANES), :], (SUBLANES - (row - start)) % SUBLANES, 0)
    sublane = lax.broadcasted_iota(jnp.int32, words.shape, 0)
    while rows < SUBLANES:
        words = jnp.where(sublane % (2 * rows) < rows, words, pltpu.roll(words, rows, 0))
        rows *= 2
    return words
