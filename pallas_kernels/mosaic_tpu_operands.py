"""The other operands of the TPU kernel in decode: where groups lie, x as codes come out, scales and zeros."""

import dataclasses
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.layout import WORD_BITS, MixedTensor, pieces, zero_step
from pallas_kernels.mosaic_tpu_config import LANES, SUBLANES, UNPACKS, Config


@dataclasses.dataclass(frozen=True)
class Segment:
    """Where the groups of a width are; scalars of the kernel."""

    bits: int
    size: jax.Array | int
    chunks: jax.Array | int
    first_group: jax.Array | int
    first_row: jax.Array | int


def segments_of(sizes, w: MixedTensor, groups: int) -> list[Segment]:
    found = []
    group = row = 0
    for i, b in enumerate(w.widths):
        size = sizes[i]
        found.append(Segment(b, size, (size + groups - 1) // groups, group, row))
        group, row = group + size, row + size * (w.group_size * b // WORD_BITS)
    return found


def lift_of(bits: int, deep: bool) -> float:
    """What ``x . (128 + codes)`` of all planes counts too much, in units of the sum of x; see `unpack`."""
    return 128.0 * sum(16**i * (len(piece) if deep else 1) for i, piece in enumerate(pieces(bits)))


def block_rows(rows: int) -> int:
    """Height of the blocks that words are copied in: a quarter, so that work begins early."""
    return -(-rows // (4 * SUBLANES)) * SUBLANES


def prepare(order, x_ref, x_groups, unit_ref, sums_ref, move_ref, segments, w: MixedTensor, config: Config):
    """``x[rows, K]`` -> ``x_groups`` as codes come out, the value of its unit, and sums over groups.

    Groups are in the order of storage. ``unit_ref`` is ``[G + 1, rows, 128]``, all lanes equal; the last
    group of both is zero. ``sums_ref`` is ``[2, rows, 3 * G]`` and zeros behind: what the scales, and what
    the scales times the zero codes, are multiplied by, three times. ``move_ref`` is for the permutation.
    """
    g, field = w.group_size, UNPACKS[config.unpack]
    rows, lanes = x_ref.shape[-2], sums_ref.shape[-1]
    fields = WORD_BITS // field
    # Row = channel as in x, column = place in the order of codes; see "Order" in the module's docstring.
    # Codes that are at bit 2 are four times as large; 128 more columns sum up what x was before that.
    row, column = (lax.broadcasted_iota(jnp.int32, (g, g + LANES), axis) for axis in (0, 1))
    place = column % fields * (g // fields) + column // fields
    larger = jnp.where(row % (g // fields) // SUBLANES % 2 == 1, 4.0, 1.0)
    move_ref[...] = jnp.where(column < g, (row == place).astype(jnp.float32), larger).astype(jnp.bfloat16)
    register = lax.broadcasted_iota(jnp.int32, (rows, g), 1) % (g // fields) // SUBLANES
    smaller = jnp.where(register % 2 == 1, 0.25, 1.0)
    lane = lax.broadcasted_iota(jnp.int32, (rows, lanes), 1)
    spot = jnp.where(lane < 3 * w.groups, lane % w.groups, -2)

    def batch(b, carry):
        lifted, sums = carry
        positions = [jnp.minimum(b * config.batch + k, w.groups - 1) for k in range(config.batch)]
        units, digits = [], []
        for position in positions:
            group = order[position]
            if len(x_ref.shape) == 3:
                x = x_ref[group].astype(jnp.float32)
            else:
                x = x_ref[:, pl.ds(pl.multiple_of(group * g, LANES), g)].astype(jnp.float32)
            if field == 8:
                largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
                units.append(jnp.where(largest > 0, largest / (127.0 * 256 ** (config.digits - 1)), 1.0))
                rest = jnp.floor(x * (1.0 / units[-1]) * smaller + 0.5)
                for d in range(config.digits - 1, 0, -1):
                    # So that what rests is from -128 to 127 in each of the digits below.
                    below = 128 * sum(256**i for i in range(d))
                    digit = jnp.floor((rest + float(below)) * 256.0**-d)
                    digits.append(digit)
                    rest = rest - digit * 256.0**d
                digits.append(rest)
            else:
                digits.append(leading(x * smaller))
                lifted = jnp.where(spot == position, jnp.sum(digits[-1], 1, keepdims=True), lifted)
        # Exact: int8 digits are bfloat16 numbers, too.
        found = dot(jnp.concatenate(digits).astype(jnp.bfloat16), move_ref[...])
        count = found.shape[0] // config.batch
        for k, position in enumerate(positions):
            moved = found[k * count : (k + 1) * count, :g]
            x_groups[position] = (moved.astype(jnp.int32) if field == 8 else moved).astype(x_groups.dtype)
            totals = [found[i : i + rows, g:] for i in range(k * count, (k + 1) * count, rows)]
            total = reduce(lambda high, low: high * 256.0 + low, totals)
            if field == 8:
                total *= units[k]
                unit_ref[position] = jnp.broadcast_to(units[k], (rows, LANES))
            sums = jnp.where(spot == position, jnp.concatenate([total] * (lanes // LANES), 1), sums)
        return lifted, sums

    # What chunks take that go on past the end of their segment.
    x_groups[w.groups] = jnp.zeros(x_groups.shape[1:], x_groups.dtype)
    unit_ref[w.groups] = jnp.zeros(unit_ref.shape[1:], unit_ref.dtype)
    nothing = jnp.zeros((rows, lanes), jnp.float32)
    lifted, sums = lax.fori_loop(0, -(-w.groups // config.batch), batch, (nothing, nothing))
    for s in segments:
        inside = (spot >= s.first_group) & (spot < s.first_group + s.size)
        lifted = jnp.where(inside, lifted * lift_of(s.bits, config.deep), lifted)
        sums = jnp.where(inside, sums * zero_step(s.bits, w.widths), sums)
    sums_ref[0], sums_ref[1] = lifted, sums


def leading(x):
    """float32 rounded to 8 bits, which bfloat16 has (Veltkamp): XLA may drop a cast and its inverse."""
    scaled = x * 65537.0
    return scaled - (scaled - x)


def dot(a, b, dtype=jnp.float32):
    return jnp.dot(a, b, preferred_element_type=dtype)


def concatenate(arrays: list, axis: int) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=axis)


def thirds(x, groups: int, twice: bool) -> jax.Array:
    """``x[rows, 3 * G]``, there three times as from ``prepare``, as addends of 8 bits: bfloat16.

    The first is x rounded and the second the rest rounded; the third is the rest of that, or the first
    again if ``twice``.
    """
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1) // groups
    first = leading(x)
    second = leading(x - first)
    third = first if twice else x - first - second
    return jnp.where(lane == 0, first, jnp.where(lane == 1, second, third)).astype(jnp.bfloat16)


def correct(x, factors: list[jax.Array]):
    """The sum of products of the ``thirds`` of ``x`` with ``factors[G, columns]``, float32."""
    fill = jnp.zeros((x.shape[1] - 3 * factors[0].shape[0], factors[0].shape[1]), jnp.float32)
    rows = jnp.concatenate([*factors, fill] if fill.shape[0] else factors)
    return dot(x, rows.astype(jnp.bfloat16))
