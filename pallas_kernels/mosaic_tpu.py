"""The matmul on TPUs in decode (few rows of ``x``): words are read once and unpacked in registers.

The output is cut into tiles of columns, one per grid step. A step has all words of its columns in VMEM
(fast memory; Pallas copies the next tile's words there while this one is computed) and runs one loop per
bit width over *chunks* of ``Config.groups`` groups. How many groups have which width is data, so trip
counts and row numbers are read from a small table, ``_plan``; one compiled kernel serves all allocations.

*Unpacking* (``_fields``). Codes are never converted one by one. A 32-bit word is taken as four fields of
8 bits or two of 16, and one AND leaves one code in each field, at bit ``t``. For 8-bit fields that *is*
four int8 numbers ``q * 2**t``. For 16-bit fields an OR with ``0x4300`` makes two bfloat16 numbers,
``128 + q * 2**t``. The factor is divided out of ``x``; the 128 is subtracted at the end of all.

*x* is brought outside the kernel (``_prepare``) into the order in which codes come out of the words. For
int8 it becomes fixed point, ``x ≈ s * (256 * hi + lo)``, with one ``s`` for each row and chunk: both digits
go through the matrix unit together as twice the rows, which is free for few rows, and sums are exact
integers. The error is at most ``2**-13`` of the largest ``|x|`` in the row and chunk, usually far below
that of rounding to bfloat16. On bfloat16 fields (TPUs without int8, widths above 4) x is rounded to bfloat16.

*Scales and zeros* act on sums: ``y = sum_g scale_g * (x_g . q_g - zero_g * sum(x_g))``; the second term,
and the 128, are one small product per tile.

*Tiles of words.* Registers hold 8 rows of words, but a 1-bit plane of 128 channels has 4. Planes of
several groups then share a register, and the product is told apart by zeros in ``x``: the rows of ``x``
are repeated once per group, each with the other groups' channels set to zero.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layout import WORD_BITS, MixedTensor, plane_widths, zero_bits, zero_step
from pallas_kernels.mosaic_tpu_prefill import prefill

LANES = 128
DECODE_ROWS = 32
UNPACKS = {"int8": 8, "bfloat16": 16}  # strategy: bits of a field


@dataclasses.dataclass(frozen=True)
class Config:
    """What the decode kernel can be tuned by.

    Attributes:
      strips: columns of an output tile, in units of 128.
      groups: groups in a chunk, all unrolled; a power of two of at least 8.
      join: strips that one product takes together; 2 fills a matrix unit 256 wide.
      unpack: ``"int8"`` or ``"bfloat16"``, what the matrix unit multiplies.
    """

    strips: int = 8
    groups: int = 8
    join: int = 1
    unpack: str = "int8"

    def __post_init__(self) -> None:
        if self.strips < 1 or self.join < 1 or self.strips % self.join:
            raise ValueError(f"strips is {self.strips}, expected a positive multiple of join, {self.join}")
        if self.groups < 8 or self.groups & (self.groups - 1):
            raise ValueError(f"groups is {self.groups}, expected a power of two of at least 8")
        if self.unpack not in UNPACKS:
            raise ValueError(f"unpack is {self.unpack!r}, expected one of {list(UNPACKS)}")


def heuristic(device_kind: str, m: int, k: int, n: int) -> Config:
    """The configuration for a device (``jax.Device.device_kind``) and a product ``[m, k] @ [k, n]``."""
    del k
    kind = device_kind.lower()
    strips = min(8 if m <= 16 else 4, 1 << (-(-n // LANES) - 1).bit_length())
    unpack = "bfloat16" if "7" in kind else "int8"
    wide = "v6" in kind or "7" in kind
    return Config(strips=strips, unpack=unpack, join=2 if wide and strips % 2 == 0 else 1)


@dataclasses.dataclass(frozen=True)
class _Plane:
    """How one plane of a width lies in words and comes out of them."""

    n: int  # bits
    factor: int  # what x is multiplied by; relative to the other planes, what its bit 0 is worth
    offset: int  # first row in its group
    rows: int  # rows of words per group
    tile: int  # rows of words that are unpacked together
    share: int  # groups that share such a tile

    @classmethod
    def all_of(cls, bits: int, group_size: int) -> "list[_Plane]":
        planes, shift = [], 0
        for n in plane_widths(bits):
            rows, tile = group_size * n // WORD_BITS, 16 if n == 4 else 8
            factor = 4 if bits == 1 else 1 << shift  # 1 bit as in 3 bits, so that they share x
            planes.append(
                _Plane(n, factor, group_size * shift // WORD_BITS, rows, tile, max(1, tile // rows))
            )
            shift += n
        return planes

    @property
    def key(self) -> tuple[int, int]:
        return self.n, self.factor

    def order(self, x: jax.Array, field: int) -> jax.Array:
        """``[..., groups, g]`` in channel order -> ``[..., groups / share, share * g]`` as codes come out."""
        *batch, groups, g = x.shape
        per_word, slots = WORD_BITS // field, field // self.n
        parts = max(1, self.rows // self.tile)
        # Channel = (field, slot of the field, part, row of the part); a row of output is one code per field.
        x = x.reshape(*batch, groups // self.share, self.share, per_word, slots, parts, self.rows // parts)
        b = len(batch)
        x = x.transpose(*range(b), b, b + 4, b + 3, b + 1, b + 5, b + 2)
        return x.reshape(*batch, groups // self.share, self.share * g)

    def x_factors(self, field: int, group_size: int) -> np.ndarray:
        """``float32[share * g]`` in that order: ``factor / 2**t`` for codes that are left at bit ``t``."""
        bits = np.array([bit for _, bit in _fields(self.n, field)])
        run = self.tile * WORD_BITS // field
        parts = self.share * group_size // (run * len(bits))
        return np.tile(np.repeat(self.factor * 2.0**-bits, run), parts).astype(np.float32)


def _fields(n: int, field: int) -> list[tuple[int, int]]:
    """For every ``n``-bit slot of a field: right shift (left if negative), and the bit where it then lies.

    A bfloat16 has 7 bits of mantissa, so up to 7 bits of slots share a shift. In int8, x loses a bit of
    precision with each, so 4; single bits lie from bit 2 up, as a plane worth 4 in a 3-bit code must.
    """
    if field == 16:
        together = 7 // n
        return [(f // together * together * n, f % together * n) for f in range(field // n)]
    if n == 1:
        return [(-2, 2), (-2, 3), (0, 2), (0, 3), (0, 4), (0, 5), (4, 2), (4, 3)]
    return [(n * f // 4 * 4, n * f % 4) for f in range(field // n)]


def _unpack(words: jax.Array, n: int, field: int) -> jax.Array:
    """Words ``[tile, 128]`` -> ``[tile * 32 / n, 128]``, int8 ``q << t`` or bfloat16 ``128 + (q << t)``."""
    repeat = 0x00010001 if field == 16 else 0x01010101
    shifted = {0: words}
    out = []
    for shift, bit in _fields(n, field):
        if shift not in shifted:
            shifted[shift] = words >> np.uint32(shift) if shift > 0 else words << np.uint32(-shift)
        codes = shifted[shift] & np.uint32((((1 << n) - 1) << bit) * repeat)
        if field == 16:
            out.append(pltpu.bitcast(codes | np.uint32(0x43004300), jnp.bfloat16))
        else:
            out.append(pltpu.bitcast(codes, jnp.int8))
    return jnp.concatenate(out, axis=0)


# The columns of the plan: where the groups of a width are.
CHUNKS, FIRST_CHUNK, FIRST_GROUP, FIRST_ROW, PADS, PADS_AT = range(6)


def _plan(w: MixedTensor, groups: int) -> jax.Array:
    """``int32[len(widths), 6]``; a segment is filled up with empty groups to whole chunks.

    Registers are loaded 8 rows at a time, also for planes of fewer rows. So that no load begins before
    or ends after the words, empty groups come first in a segment, but at the end of the first chunk where
    the segment itself begins in the first rows.
    """
    first_group, first_row = w.segment_starts()
    chunks = -(-w.segments // groups)
    pads = chunks * groups - w.segments
    pads_at = jnp.where(first_row < _margin(w), groups - pads, 0)
    return jnp.stack([chunks, jnp.cumsum(chunks) - chunks, first_group, first_row, pads, pads_at], axis=1)


def _margin(w: MixedTensor) -> int:
    return max(p.tile for b in w.widths for p in _Plane.all_of(b, w.group_size))


def _max_chunks(w: MixedTensor, groups: int) -> int:
    return (w.groups + len(w.widths) * (groups - 1)) // groups


def _prepare(x: jax.Array, w: MixedTensor, plan: jax.Array, config: Config):
    """What the kernel reads of ``x[M, K]``, float32.

    Returns:
      for every plane of any width ``[chunks, groups / share, rows, share * g]``, int8 or bfloat16;
      the value of their unit, ``float32[chunks, M, 128]`` (all lanes equal);
      ``float32[2, M, G]``: what the scales, and what the scales times the zero codes, are multiplied by.
    """
    m, k = x.shape
    g, u, field = w.group_size, config.groups, UNPACKS[config.unpack]
    chunks = _max_chunks(w, u)
    slot = jnp.arange(chunks * u, dtype=jnp.int32)
    # Which segment a slot is in, and which group of it; empty groups read x of group 0 times zero.
    segment = jnp.sum(slot[:, None] >= ((plan[:, FIRST_CHUNK] + plan[:, CHUNKS]) * u)[None], axis=1)
    of = plan[jnp.minimum(segment, len(w.widths) - 1)]
    local = slot - of[:, FIRST_CHUNK] * u
    empty = (local >= of[:, PADS_AT]) & (local < of[:, PADS_AT] + of[:, PADS])
    empty |= segment >= len(w.widths)
    position = of[:, FIRST_GROUP] + local - jnp.where(local >= of[:, PADS_AT], of[:, PADS], 0)
    position = jnp.clip(position, 0, w.groups - 1)
    x = jnp.pad(x, ((0, 0), (0, w.groups * g - k))).reshape(m, w.groups, g)
    x = jnp.where(empty[None, :, None], 0.0, x[:, w.order[position]])  # [M, slots, g]

    unit = jnp.ones((m, chunks), jnp.float32)
    if field == 8:
        largest = jnp.max(jnp.abs(x.reshape(m, chunks, u * g)), axis=-1)
        unit = jnp.where(largest > 0, largest / 32512.0, 1.0)
        x = x / jnp.repeat(unit, u, axis=1)[:, :, None]
    planes, total, lifted = {}, None, jnp.zeros((m, chunks * u), jnp.float32)
    width = jnp.asarray(w.widths, jnp.int32)[jnp.minimum(segment, len(w.widths) - 1)]
    for b in w.widths:
        for plane in _Plane.all_of(b, g):
            factors = jnp.asarray(plane.x_factors(field, g))
            ordered = plane.order(x, field) * factors[None, None]
            if field == 8:
                ordered = jnp.round(ordered)
                high = jnp.round(ordered / 256.0)
                digits = jnp.stack([high, ordered - 256.0 * high]).astype(jnp.int8)
                digits = digits.reshape(2 * m, *ordered.shape[1:])
            else:
                digits = ordered.astype(jnp.bfloat16)
                ordered = digits.astype(jnp.float32)
                # The 128 of every number of this plane, in groups that have it.
                sums = 128.0 * _group_sums(ordered, plane, g, field)
                lifted += jnp.where((width == b)[None], sums, 0.0)
            if plane.key not in planes:
                rows = digits.shape[0]
                digits = digits.reshape(rows, chunks, u // plane.share, plane.share * g)
                planes[plane.key] = digits.transpose(1, 2, 0, 3)
            if plane.offset == 0:
                sums = _group_sums(ordered / factors[None, None], plane, g, field)
                total = sums if total is None else jnp.where((width == b)[None], sums, total)
    assert total is not None
    step = jnp.asarray([zero_step(b, w.widths) for b in w.widths], jnp.float32)
    worth = jnp.asarray([0.25 if b == 1 else 1.0 for b in w.widths], jnp.float32)  # of x * factor
    segment = jnp.minimum(segment, len(w.widths) - 1)
    unit_slot = jnp.repeat(unit, u, axis=1)
    both = jnp.stack([lifted * worth[segment][None], total * step[segment][None]]) * unit_slot[None]
    # Back from slots to positions: a position's slot is the one that is not empty.
    target = jnp.where(empty, w.groups, position)
    both = jnp.zeros((2, m, w.groups), jnp.float32).at[:, :, target].set(both, mode="drop")
    unit = unit * worth[segment[::u]][None]
    return planes, jnp.broadcast_to(unit.T[:, :, None], (chunks, m, LANES)), both


def _group_sums(ordered: jax.Array, plane: _Plane, g: int, field: int) -> jax.Array:
    """Sums over each group's channels of what ``plane.order`` returned, ``[M, groups]``."""
    m, tiles, _ = ordered.shape
    run = plane.tile * WORD_BITS // field // plane.share
    return ordered.reshape(m, tiles, -1, plane.share, run).sum((2, 4)).reshape(m, tiles * plane.share)


def _kernel(plan, c_ref, unit_ref, scale_ref, zero_ref, bias_ref, *refs, keys, w, config, trips):
    x_refs, refs = dict(zip(keys, refs)), refs[len(keys) :]
    word_refs, (out_ref, acc_ref, row_ref) = refs[: config.strips], refs[config.strips :]
    u, field = config.groups, UNPACKS[config.unpack]
    m = acc_ref.shape[0]

    scale = scale_ref[...].astype(jnp.float32)  # [G, columns]
    for j in range(config.strips):
        row_ref[j] = scale[:, j * LANES : (j + 1) * LANES]
    zero = zero_ref[...].astype(jnp.int32)
    if zero_bits(w.widths) == 4:
        zero = jnp.concatenate([zero & 15, zero >> 4], axis=0)[: w.groups]
    dot = partial(jnp.dot, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    past = dot(c_ref[1], scale * zero.astype(jnp.float32))
    if field == 16:
        past += dot(c_ref[0], scale)
    acc_ref[...] = jnp.broadcast_to(bias_ref[...], past.shape) - past

    for i, b in enumerate(w.widths):
        planes = _Plane.all_of(b, w.group_size)
        share = max(p.share for p in planes)

        def chunk(c, carry, i=i, b=b, planes=planes, share=share):
            t = plan[i, FIRST_CHUNK] + c
            sums = [jnp.zeros((m, LANES), jnp.float32)] * config.strips

            def index(k):  # of the chunk's k-th group in its segment
                local = c * u + k
                return local - jnp.where(local >= plan[i, PADS_AT], plan[i, PADS], 0)

            for first in range(0, u, share):
                row = [
                    plan[i, FIRST_ROW] + index(first + k) * (w.group_size * b // WORD_BITS)
                    for k in range(share)
                ]
                scale_row = [
                    jnp.clip(plan[i, FIRST_GROUP] + index(first + k), 0, w.groups - 1) for k in range(share)
                ]
                lhs = _lhs(x_refs, t, first, planes, share, field)
                for j in range(0, config.strips, config.join):
                    strips = [_rhs(ref, row, planes, share, field) for ref in word_refs[j : j + config.join]]
                    rhs = strips[0] if len(strips) == 1 else jnp.concatenate(strips, axis=1)
                    kind = jnp.int32 if field == 8 else jnp.float32
                    found = jnp.dot(lhs, rhs, preferred_element_type=kind)
                    for k in range(share):
                        part = found[k * lhs.shape[0] // share : (k + 1) * lhs.shape[0] // share]
                        if field == 8:
                            part = ((part[:m] << 8) + part[m:]).astype(jnp.float32)
                        for s in range(config.join):
                            row_k = row_ref[j + s, pl.ds(scale_row[k], 1), :]
                            sums[j + s] += part[:, s * LANES : (s + 1) * LANES] * row_k
            for j in range(config.strips):
                acc_ref[:, j * LANES : (j + 1) * LANES] += sums[j] * unit_ref[t]
            return carry

        lax.fori_loop(0, plan[i, CHUNKS] if trips is None else trips[i], chunk, 0)
    out_ref[...] = acc_ref[: out_ref.shape[0]]


def _lhs(x_refs, t, first, planes, share, field):
    """``[share * rows, share * g * planes]``: x of ``share`` groups, each in its own rows, zero elsewhere."""
    blocks = []
    for k in range(share):
        row = []
        for plane in planes:
            for tile in range(share // plane.share):
                x = x_refs[plane.key][t, first // plane.share + tile]
                if k // plane.share != tile:
                    row.append(jnp.zeros_like(x))
                elif plane.share == 1:
                    row.append(x)
                else:
                    bits = pltpu.bitcast(x, jnp.uint32)
                    per_word = WORD_BITS // field
                    lane = lax.broadcasted_iota(jnp.int32, bits.shape, 1)
                    owner = lane % (plane.tile * per_word) // (plane.rows * per_word)
                    bits = jnp.where(owner == k % plane.share, bits, np.uint32(0))
                    row.append(pltpu.bitcast(bits, x.dtype))
        blocks.append(row[0] if len(row) == 1 else jnp.concatenate(row, axis=1))
    return blocks[0] if share == 1 else jnp.concatenate(blocks, axis=0)


def _rhs(ref, row, planes, share, field):
    """``[share * g * planes, 128]``: the codes of ``share`` groups whose first rows are given."""
    tiles = []
    for plane in planes:
        for tile in range(share // plane.share):
            parts = max(1, plane.rows // plane.tile)
            for p in range(parts):
                words = None
                for k in range(plane.share):
                    start = row[tile * plane.share + k] + plane.offset + p * plane.tile - k * plane.rows
                    # Only empty groups, whose x is zero, can be out of bounds.
                    start = jnp.clip(start, 0, ref.shape[0] - plane.tile)
                    loaded = ref[pl.ds(start, plane.tile), :]
                    if words is None:
                        words = loaded
                    else:
                        sublane = lax.broadcasted_iota(jnp.int32, loaded.shape, 0)
                        words = jnp.where(sublane < k * plane.rows, words, loaded)
                tiles.append(_unpack(words, plane.n, field))
    return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=0)


def mixed_matmul(
    x: jax.Array,
    w: MixedTensor,
    *,
    bias: jax.Array | None = None,
    config: Config | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """``x @ W + bias`` on a TPU, accumulated in float32.

    Args:
      x: bfloat16 or float32 ``[M, K]``; what it is rounded to is in the module's docstring.
      w: the packed weight ``[K, N]``.
      bias: ``[N]``, added in float32.
      config: by :func:`heuristic` for the default device if None.
      interpret: as in ``pl.pallas_call``.

    Returns:
      float32 ``[M, N]``.

    Raises:
      NotImplementedError: M is 0, K too large for VMEM in prefill, or int8 asked for with widths above 4.
    """
    m, (k, n) = x.shape[0], w.shape
    if config is None:
        config = heuristic(jax.devices()[0].device_kind, m, k, n)
        if max(w.widths) > 4:
            config = dataclasses.replace(config, unpack="bfloat16")
    if m == 0:
        raise NotImplementedError("x has no rows")
    if config.unpack == "int8" and max(w.widths) > 4:
        raise NotImplementedError("unpack='int8' takes widths up to 4; use 'bfloat16'")
    bias = jnp.zeros((1, n), jnp.float32) if bias is None else bias.astype(jnp.float32)[None]
    if m > DECODE_ROWS:
        return prefill(x, w, bias, interpret)
    rows = -(-m // 16) * 16
    x = jnp.pad(x.astype(jnp.float32), ((0, rows - m), (0, 0)))
    return _decode(x, w, bias, m, config, interpret)


def _decode(x, w: MixedTensor, bias, m: int, config: Config, interpret) -> jax.Array:
    plan = _plan(w, config.groups)
    planes, unit, both = _prepare(x, w, plan, config)
    words, margin = w.words, _margin(w)
    if w.groups <= config.groups + margin:
        # So few groups that a load could pass the last row, see _plan: a copy of words this small is cheap.
        words = jnp.pad(words, ((0, margin), (0, 0)))
    return decode_call(plan, both, unit, w, bias, planes, words, m, config, interpret)


def decode_call(plan, both, unit, w: MixedTensor, bias, planes, words, m: int, config: Config, interpret):
    """The kernel proper, on what ``_plan`` and ``_prepare`` return; apart, for cost tools.

    Segment sizes that are a NumPy array, not traced, become constant trip counts: for cost estimates.
    """
    n, u, rows = w.shape[1], config.groups, both.shape[1]
    trips = tuple(-(-int(s) // u) for s in w.segments) if isinstance(w.segments, np.ndarray) else None
    columns = config.strips * LANES
    last = (n - 1) // LANES
    whole = lambda a: pl.BlockSpec(a.shape, lambda i, plan: (0,) * a.ndim)  # noqa: E731
    column = lambda r: pl.BlockSpec((r, columns), lambda i, plan: (0, i))  # noqa: E731
    strip = lambda j: pl.BlockSpec(  # noqa: E731
        (words.shape[0], LANES), lambda i, plan: (0, jnp.minimum(i * config.strips + j, last))
    )
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(n, columns),),
        in_specs=[
            whole(both),
            whole(unit),
            column(w.groups),
            column(w.zero.shape[0]),
            column(1),
            *map(whole, planes.values()),
            *map(strip, range(config.strips)),
        ],
        out_specs=column(m),
        scratch_shapes=[
            pltpu.VMEM((rows, columns), jnp.float32),
            pltpu.VMEM((config.strips, w.groups, LANES), jnp.float32),
        ],
    )
    return pl.pallas_call(
        partial(_kernel, keys=tuple(planes), w=w, config=config, trips=trips),
        name="mixed_matmul_decode",
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )(plan, both, unit, w.scale, w.zero, bias, *planes.values(), *[words] * config.strips)


def kernel_alone(m: int, w: MixedTensor, config: Config, fixed=lambda w: w):
    """The decode kernel without what XLA does to ``x`` before, and its abstract arguments: for cost tools."""
    x = jax.ShapeDtypeStruct((-(-m // 16) * 16, w.shape[0]), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, w.shape[1]), jnp.float32)

    def before(x, w):
        plan = _plan(w, config.groups)
        return plan, *_prepare(x, w, plan, config)

    def call(prepared, w, bias):
        plan, planes, unit, both = prepared
        return decode_call(plan, both, unit, fixed(w), bias, planes, w.words, m, config, False)

    return call, (jax.eval_shape(before, x, w), w, bias)
