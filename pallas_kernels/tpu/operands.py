"""Operands of the TPU decode kernel except words: group positions, x in the order of codes, scales, zeros."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.layout import MixedTensor, zero_bits, zero_step
from pallas_kernels.planes import WORD_BITS, pieces
from pallas_kernels.tpu.config import LANES, SUBLANES, UNPACKS, Config
from pallas_kernels.tpu.unpack import bit_of


@dataclasses.dataclass(frozen=True)
class Segment:
    """Number and position of the groups of one width, as scalars of the kernel."""

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
    """Offset correction: the excess of ``x . (128 + codes)`` over all planes, per unit of the sum of x.

    See `pallas_kernels.tpu.unpack`.
    """
    return 128.0 * sum(16**i * (len(piece) if deep else 1) for i, piece in enumerate(pieces(bits)))


def measure_rows(x_ref, middle_ref, w: MixedTensor, config: Config) -> None:
    """Writes row scales to ``middle_ref[rows, 128]``, equal in all lanes.

    A row scale is the geometric mean of the row's largest and mean ``|x|``, so an outlier costs the rest of
    its row and the rest of its group alike. It is NaN if the row is not finite.
    """
    g, together = w.group_size, 2 * config.batch

    def batch(b, carry):
        largest, total = carry
        for k in range(together):
            group = b * together + k
            x = jnp.abs(_load(x_ref, jnp.minimum(group, w.groups - 1), g))
            if w.groups % together:
                x = jnp.where(group < w.groups, x, 0.0)
            largest, total = jnp.maximum(largest, x), total + x
        return largest, total

    nothing = jnp.zeros((middle_ref.shape[0], g), jnp.float32)
    largest, total = lax.fori_loop(0, -(-w.groups // together), batch, (nothing, nothing))
    mean = jnp.sum(total, axis=1, keepdims=True) / (w.groups * g)
    middle = jnp.sqrt(jnp.max(largest, axis=1, keepdims=True)) * jnp.sqrt(mean)
    middle = jnp.where(middle == 0, 1.0, jnp.where(middle < jnp.inf, middle, jnp.nan))
    middle_ref[...] = jnp.broadcast_to(middle, middle_ref.shape)


def measure_groups(order, x_ref, middle_ref, unit_ref, w: MixedTensor, config: Config) -> None:
    """Writes steps to ``unit_ref[G, 128]``, equal in all lanes.

    A step is the value of the last digit of ``x`` in a group, in units of ``middle_ref``. It is large enough
    for all finite rows.
    """
    together = 2 * config.batch
    shrink = _across(1.0 / middle_ref[...], w.group_size)

    def batch(b, _):
        for k in range(together):
            position = jnp.minimum(b * together + k, w.groups - 1)
            x = jnp.abs(_load(x_ref, order[position], w.group_size) * shrink)
            largest = jnp.max(jnp.where(x < jnp.inf, x, 0.0), axis=(0, 1), keepdims=True)
            unit = jnp.where(largest > 0, largest / (127.0 * 256 ** (config.digits - 1)), 1.0)
            unit_ref[pl.ds(position, 1), :] = jnp.broadcast_to(unit, (1, LANES))

    lax.fori_loop(0, -(-w.groups // together), batch, None)


def permutation(group_size: int, config: Config) -> jax.Array:
    """Permutation matrix ``[g, g]``: rows are channels in ``x``, columns are places in the order of codes.

    See "Order" in `pallas_kernels.tpu.decode`.
    """
    fields = WORD_BITS // UNPACKS[config.unpack]
    row, column = (lax.broadcasted_iota(jnp.int32, (group_size, group_size), axis) for axis in (0, 1))
    place = lax.rem(column, fields) * (group_size // fields) + lax.div(column, fields)
    return (row == place).astype(jnp.float32)


def prepare(
    order, x_ref, middle_ref, unit_ref, move_ref, x_groups, sums_ref, segments, w: MixedTensor, config: Config
) -> None:
    """Writes ``x[rows, K]`` to ``x_groups`` in the order of codes, and the sums of x over groups.

    Groups are in storage order; after them ``x_groups`` has one of zeros. ``sums_ref`` is
    ``[2, rows, 3 * G]``, padded with zeros: the factors of the scales, and those of the scales times the zero
    codes, each as three addends. ``x_ref`` is ``[G, rows, g]`` if groups begin within registers.
    """
    g, field = w.group_size, UNPACKS[config.unpack]
    rows, lanes = sums_ref.shape[1:]
    fields = WORD_BITS // field
    exact, accumulator = (jnp.int8, jnp.int32) if field == 8 else (jnp.bfloat16, jnp.float32)
    # Codes at bit 2 are four times as large.
    register = lax.rem(lax.broadcasted_iota(jnp.int32, (rows, g), 1), g // fields) // SUBLANES
    larger, smaller = (jnp.where(bit_of(register) == 2, factor, 1.0) for factor in (4.0, 0.25))
    lane = lax.broadcasted_iota(jnp.int32, (rows, lanes), 1)
    spot = jnp.where(lane < 3 * w.groups, lax.rem(lane, w.groups), -2)
    shrink = smaller / _across(middle_ref[...], g) if field == 8 else smaller

    def batch(b, carry):
        lifted, sums = carry
        positions = [jnp.minimum(b * config.batch + k, w.groups - 1) for k in range(config.batch)]
        parts = []
        for position in positions:
            x = _load(x_ref, order[position], g)
            if field == 8:
                unit = unit_ref[pl.ds(position, 1), :]
                x = jnp.floor(x * (shrink * (1.0 / _across(unit, g))) + 0.5)
                parts.append(_digits(x.astype(jnp.int32), config.digits))
            else:
                x = leading(x * shrink)
                parts.append(x)
                lifted = jnp.where(spot == position, jnp.sum(x, axis=1, keepdims=True), lifted)
            addends = [x]
            if field == 8 and config.digits == 3:  # so that sums of 24 bits are exact
                high = jnp.floor(x / 4096.0) * 4096.0
                addends = [x - high, high]
            total = sum(jnp.sum(addend * larger, axis=1, keepdims=True) for addend in addends)
            total = total * _across(unit, lanes) if field == 8 else total
            sums = jnp.where(spot == position, total, sums)
        height = x_groups.shape[1]
        moved = dot(jnp.concatenate(parts).astype(exact), move_ref[...], accumulator)
        for k, position in enumerate(positions):
            x_groups[position] = moved[k * height : (k + 1) * height].astype(exact)
        return lifted, sums

    # Zeros for chunks that extend past the end of their segment.
    x_groups[w.groups] = jnp.zeros(x_groups.shape[1:], x_groups.dtype)
    nothing = jnp.zeros((rows, lanes), jnp.float32)
    lifted, sums = lax.fori_loop(0, -(-w.groups // config.batch), batch, (nothing, nothing))
    for s in segments:
        inside = (spot >= s.first_group) & (spot < s.first_group + s.size)
        lifted = jnp.where(inside, lifted * lift_of(s.bits, config.deep), lifted)
        sums = jnp.where(inside, sums * zero_step(s.bits, w.widths), sums)
    sums_ref[0], sums_ref[1] = _thirds(lifted, w.groups, twice=False), _thirds(sums, w.groups, twice=True)


def _load(x_ref, group, group_size: int) -> jax.Array:
    """One group of x, float32 ``[rows, g]``; a single row is repeated 8 times."""
    if len(x_ref.shape) == 3:
        x = x_ref[group]
    else:
        x = x_ref[:, pl.ds(pl.multiple_of(group * group_size, LANES), group_size)]
    x = x.astype(jnp.float32)
    return x if x.shape[0] > 1 else jnp.broadcast_to(x, (SUBLANES, group_size))


def _across(x, lanes: int) -> jax.Array:
    """``x[..., 128]``, equal in all lanes, as ``[..., lanes]``."""
    return x[:, :lanes] if lanes <= LANES else jnp.concatenate([x] * (lanes // LANES), axis=1)


def _thirds(x, groups: int, twice: bool) -> jax.Array:
    """Splits ``x[rows, 3 * G]``, the same values three times, into addends of 8 bits: bfloat16.

    The first is x rounded and the second the remainder rounded; the third is what then remains, or the first
    again if ``twice``.
    """
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    first = leading(x)
    second = leading(x - first)
    third = first if twice else x - first - second
    return jnp.where(lane < groups, first, jnp.where(lane < 2 * groups, second, third)).astype(jnp.bfloat16)


def _digits(x, count: int) -> jax.Array:
    """Splits int32 ``x[rows, g]`` into digits from -128 to 127, highest first: int32 ``[count * rows, g]``.

    Only the low 8 bits of a digit are valid, except of the highest.
    """
    found: list = []
    for _ in range(count):
        found.insert(0, x)
        x = (x + 128) >> 8
    return jnp.concatenate(found)


def zero_codes(stored, w: MixedTensor) -> jax.Array:
    """Zero codes as int32 ``[G, columns]``, from columns of ``w.zero`` in registers."""
    zero = stored.astype(jnp.int32)
    if zero_bits(w.widths) == 8:
        return zero
    return jnp.concatenate([zero & 15, zero >> 4], axis=0)[: w.groups]


def leading(x):
    """Rounds float32 to 8 bits, as bfloat16 has (Veltkamp); XLA might drop a cast and its inverse."""
    scaled = x * 65537.0
    return scaled - (scaled - x)


def truncate(x):
    """Truncates float32 to its first 8 bits, which bfloat16 can hold."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def dot(a, b, dtype=jnp.float32):
    return jnp.dot(a, b, preferred_element_type=dtype)


def concatenate(arrays: list, axis: int) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=axis)


def correct(x, factors: list[jax.Array]):
    """Sum of the products of three addends of ``x`` with ``factors[G, columns]``, float32."""
    fill = jnp.zeros((x.shape[1] - 3 * factors[0].shape[0], factors[0].shape[1]), jnp.float32)
    rows = jnp.concatenate([*factors, fill] if fill.shape[0] else factors)
    return dot(x, rows.astype(jnp.bfloat16))
