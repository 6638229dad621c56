"""The other operands of the TPU kernel in decode: where groups lie, x as codes come out, scales and zeros."""

import dataclasses
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.layout import WORD_BITS, MixedTensor, zero_step
from pallas_kernels.mosaic_tpu_config import LANES, SUBLANES, UNPACKS, Config


@dataclasses.dataclass(frozen=True)
class Segment:
    """Where the groups of a width are; scalars of the kernel."""

    bits: int
    size: jax.Array | int
    chunks: jax.Array | int
    first_chunk: jax.Array | int
    first_group: jax.Array | int
    first_row: jax.Array | int


def segments_of(sizes, w: MixedTensor, groups: int) -> list[Segment]:
    found = []
    chunk = group = row = 0
    for i, b in enumerate(w.widths):
        size = sizes[i]
        chunks = (size + groups - 1) // groups
        found.append(Segment(b, size, chunks, chunk, group, row))
        chunk, group, row = chunk + chunks, group + size, row + size * (w.group_size * b // WORD_BITS)
    return found


def prepare(order, x_ref, x_groups, unit_ref, sums_ref, segments, w: MixedTensor, config: Config):
    """``x[rows, K]`` -> ``x_groups`` as codes come out, the value of its unit, and sums over groups.

    ``unit_ref`` is ``[chunks, rows, 128]``, all lanes equal. ``sums_ref`` is ``[2, rows, 3 * G]`` and zeros
    behind: what the scales, and what the scales times the zero codes, are multiplied by, three times.
    """
    g, u, field = w.group_size, config.groups, UNPACKS[config.unpack]
    rows, lanes = x_ref.shape[-2], sums_ref.shape[-1]
    fields = WORD_BITS // field
    # Row = channel as in x, column = place in the order of codes; see "Order" in the module's docstring.
    row, column = (lax.broadcasted_iota(jnp.int32, (g, g), axis) for axis in (0, 1))
    move = (
        (row == column % fields * (g // fields) + column // fields).astype(jnp.float32).astype(jnp.bfloat16)
    )
    register = lax.broadcasted_iota(jnp.int32, (rows, g), 1) % (g // fields) // SUBLANES
    odd = register % 2 == 1
    lane = lax.broadcasted_iota(jnp.int32, (rows, lanes), 1)
    spot = jnp.where(lane < 3 * w.groups, lane % w.groups, -2)

    def chunk(t, lifted, sums):
        def of(value):  # of the segment that this chunk is in
            found = value(segments[0])
            for s in segments[1:]:
                found = jnp.where(t >= s.first_chunk, value(s), found)
            return found

        local = (t - of(lambda s: s.first_chunk)) * u
        size, first = of(lambda s: s.size), of(lambda s: s.first_group)
        positions, xs = [], []
        for k in range(u):
            position = jnp.where(local + k < size, first + local + k, -1)
            group = order[jnp.maximum(position, 0)]
            if len(x_ref.shape) == 3:
                x = x_ref[group]
            else:
                x = x_ref[:, pl.ds(pl.multiple_of(group * g, LANES), g)]
            x = jnp.where(position >= 0, x.astype(jnp.float32), 0.0)
            xs.append(x)
            positions.append(position)
        unit = jnp.ones((rows, 1), jnp.float32)
        if field == 8:
            largest = jnp.max(reduce(jnp.maximum, map(jnp.abs, xs)), axis=1, keepdims=True)
            unit = jnp.where(largest > 0, largest / (127.0 * 256 ** (config.digits - 1)), 1.0)
        per_unit = 1.0 / unit
        step = of(lambda s: jnp.float32(zero_step(s.bits, w.widths)))
        lift = of(lambda s: jnp.float32(128.0 if s.bits <= 4 else 17 * 128.0))
        stacked: list[jax.Array] = []
        for k, x in enumerate(xs):
            x = x * per_unit
            x = jnp.where(odd, x * 0.25, x)
            if field == 8:
                x = jnp.floor(x + 0.5)
                digits, rest = [], x
                for d in range(config.digits - 1, 0, -1):
                    # So that what rests is from -128 to 127 in each of the digits below.
                    below = 128 * sum(256**i for i in range(d))
                    digit = jnp.floor((rest + float(below)) * 256.0**-d)
                    digits.append(digit)
                    rest = rest - digit * 256.0**d
                digits = jnp.concatenate([*digits, rest])
            else:
                x = leading(x)
                digits = x
                lifted = jnp.where(spot == positions[k], jnp.sum(x, 1, keepdims=True) * lift, lifted)
            moved = dot(digits.astype(jnp.bfloat16), move)  # exact, int8 digits are bfloat16 numbers, too
            if field == 8:
                moved = moved.astype(jnp.int32)
            moved = moved.astype(x_groups.dtype)
            # Groups that are stacked: each in rows of its own, and zeros where the others' channels are.
            place = [jnp.zeros_like(moved)] * config.stack
            place[k % config.stack] = moved
            stacked.append(concatenate(place, 1))
            if len(stacked) == config.stack:
                x_groups[(t * u + k) // config.stack] = concatenate(stacked, 0)
                stacked = []
            total = jnp.sum(jnp.where(odd, x * 4.0, x), axis=1, keepdims=True) * (unit * step)
            sums = jnp.where(spot == positions[k], total, sums)
        unit_ref[t] = jnp.broadcast_to(unit, (rows, LANES))
        return lifted, sums

    def two(i, carry):  # at once, as a chunk is one long chain; there is room for one too many
        return chunk(2 * i + 1, *chunk(2 * i, *carry))

    nothing = jnp.zeros((rows, lanes), jnp.float32)
    count = segments[-1].first_chunk + segments[-1].chunks
    sums_ref[0], sums_ref[1] = lax.fori_loop(0, (count + 1) // 2, two, (nothing, nothing))


def leading(x):
    """float32 rounded to 8 bits, which bfloat16 has (Veltkamp): XLA may drop a cast and its inverse."""
    scaled = x * 65537.0
    return scaled - (scaled - x)


def dot(a, b, dtype=jnp.float32):
    return jnp.dot(a, b, preferred_element_type=dtype)


def concatenate(arrays: list, axis: int) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=axis)


def correct(x, factors: list[jax.Array]):
    """``x[rows, G] @ factors[G, columns]`` almost in float32, in one pass of bfloat16 products.

    ``x`` is there three times, as from ``prepare``. ``factors`` are what ``x`` rounded to bfloat16, the
    rest rounded, and for the third either the rest of that or again x rounded are multiplied by.
    """
    groups = factors[0].shape[0]
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1) // groups
    first = leading(x)
    second = leading(x - first)
    third = first if factors[2] is not factors[0] else x - first - second
    x = jnp.where(lane == 0, first, jnp.where(lane == 1, second, third))
    fill = jnp.zeros((x.shape[1] - 3 * groups, factors[0].shape[1]), jnp.float32)
    rows = jnp.concatenate([*factors, fill] if fill.shape[0] else factors)
    return dot(x.astype(jnp.bfloat16), rows.astype(jnp.bfloat16))
