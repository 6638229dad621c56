"""The other operands of the TPU kernel in decode: where groups lie, x as codes come out, scales and zeros."""

import dataclasses
from itertools import pairwise

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


def blocks_of(rows: int) -> list[slice]:
    """The blocks that words are copied in; the first are smaller, so that work begins early."""
    ends = [0, *(-(-rows * part // (16 * SUBLANES)) * SUBLANES for part in (3, 6, 10)), rows]
    return [slice(start, end) for start, end in pairwise(ends) if start < end]


def prepare(order, x_ref, x_groups, unit_ref, sums_ref, move_ref, segments, w: MixedTensor, config: Config):
    """``x[rows, K]`` -> ``x_groups`` as codes come out, the value of its unit, and sums over groups.

    Groups are in the order of storage. ``unit_ref`` is ``[G + 1, rows, 128]``, all lanes equal; the last
    group of both is zero. ``sums_ref`` is ``[2, rows, 3 * G]`` and zeros behind: what the scales, and what
    the scales times the zero codes, are multiplied by, three times. ``move_ref`` is for the
    permutation and has the type that ``x`` came in. ``x_ref`` is ``[G, rows, g]`` where groups begin within
    registers.
    """
    g, field = w.group_size, UNPACKS[config.unpack]
    rows, lanes = sums_ref.shape[1:]
    fields = WORD_BITS // field
    # Row = channel as in x, column = place in the order of codes; see "Order" in the module's docstring.
    row, column = (lax.broadcasted_iota(jnp.int32, (g, g), axis) for axis in (0, 1))
    place = column % fields * (g // fields) + column // fields
    move_ref[...] = (row == place).astype(jnp.float32).astype(move_ref.dtype)
    # Codes that are at bit 2 are four times as large.
    register = lax.broadcasted_iota(jnp.int32, (rows, g), 1) // fields // SUBLANES
    larger, smaller = (jnp.where(register % 2 == 1, factor, 1.0) for factor in (4.0, 0.25))
    lane = lax.broadcasted_iota(jnp.int32, (rows, lanes), 1)
    spot = jnp.where(lane < 3 * w.groups, lane % w.groups, -2)

    def load(group):
        if len(x_ref.shape) == 3:
            return x_ref[group]
        return x_ref[:, pl.ds(pl.multiple_of(group * g, LANES), g)]

    def batch(b, carry):
        lifted, sums = carry
        positions = [jnp.minimum(b * config.batch + k, w.groups - 1) for k in range(config.batch)]
        moved = jnp.dot(  # exact: bfloat16 in one pass, float32 in several
            jnp.concatenate([load(order[position]) for position in positions]).astype(move_ref.dtype),
            move_ref[...],
            precision=lax.Precision.HIGHEST if move_ref.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        for k, position in enumerate(positions):
            x, unit = moved[k * rows : (k + 1) * rows], 1.0
            if field == 8:
                largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
                unit = jnp.where(largest > 0, largest / (127.0 * 256 ** (config.digits - 1)), 1.0)
                x = jnp.floor(x * (1.0 / unit) * smaller + 0.5)
                x_groups[position] = _digits(x.astype(jnp.int32), config.digits)
                unit_ref[position] = jnp.broadcast_to(unit, (rows, LANES))
            else:
                x = leading(x * smaller)
                x_groups[position] = x.astype(jnp.bfloat16)
                lifted = jnp.where(spot == position, jnp.sum(x, axis=1, keepdims=True), lifted)
            parts = [x]
            if config.digits == 3:  # so that sums of 24 bits are exact
                high = jnp.floor(x / 4096.0) * 4096.0
                parts = [x - high, high]
            total = sum(jnp.sum(part * larger, axis=1, keepdims=True) for part in parts)
            sums = jnp.where(spot == position, total * unit, sums)
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


def _digits(x, count: int) -> jax.Array:
    """int32 ``x[rows, g]`` as digits from -128 to 127, highest first: int8 ``[count * rows, g]``."""
    found: list = []
    for _ in range(count):
        found.insert(0, x)
        x = (x + 128) >> 8
    return jnp.concatenate(found).astype(jnp.int8)  # keeps the low 8 bits


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
