"""The matmul on TPUs in decode (few rows of ``x``): words are read once and unpacked in registers.

The output is cut into tiles of columns, one per grid step. While a tile is computed, the kernel copies
the next tile's words into VMEM (fast memory). A step runs one loop per bit width over *chunks* of
``Config.groups`` groups. How many groups have which width is data, and so are trip counts and row
numbers: one compiled kernel serves all allocations.

*Unpacking* (``_unpack``). Codes are never converted one by one. A 32-bit word is taken as four fields of
8 bits or two of 16, and one AND leaves one code in each field, at bit 0 or 2. For 8-bit fields that *is*
four int8 numbers ``q << bit``. For 16-bit fields an OR with ``0x4300`` makes two bfloat16 numbers,
``128 + (q << bit)``. The factor is divided out of ``x``; the 128 is subtracted with the zeros.

*Order.* In every plane, field ``f`` of a word holds channels ``f * g / fields`` to ``(f + 1) * g / fields``
of its group. Wherever a plane's rows fill registers of 8 rows only after being repeated, every copy is
shifted by one slot more. Then codes of all widths come out in the same order, channel
``f * g / fields + 8 * t + r`` in field ``f`` of row ``r`` of register ``t``: planes of a width can be
joined with an OR, and one order of ``x`` serves all. Codes wider than 4 bits are two products of up to 4.

*x* (``_prepare``) is brought into that order in the first step, by a product with a permutation matrix.
For int8 it becomes fixed point, ``x ≈ s * (65536 * a + 256 * b + c)``, with one ``s`` for each row and
chunk: all digits go through the matrix unit together as three times the rows, and sums are exact integers.
The error is at most ``2**-21`` of the largest ``|x|`` in the row and chunk: beside an outlier a thousand
times the rest, which real activations have, the rest keeps 11 bits. (With two digits it would keep 3.)
On bfloat16 fields (TPUs without int8) x is rounded to bfloat16.

*Scales and zeros* act on sums: ``y = sum_g scale_g * (x_g . q_g - zero_g * sum(x_g))``; the second term,
and the 128, are one small product per tile.
"""

import dataclasses
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.layout import WORD_BITS, MixedTensor, plane_widths, zero_bits, zero_step
from pallas_kernels.mosaic_tpu_prefill import prefill
from pallas_kernels.tuning import tuned

LANES = 128
SUBLANES = 8
DECODE_ROWS = 32
GROUP_SIZES = (32, 64, 128, 256)
VMEM_BYTES = 40 << 20  # for words; of 64 MiB on the smallest, v7x
UNPACKS = {"int8": 8, "bfloat16": 16}  # strategy: bits of a field


@dataclasses.dataclass(frozen=True)
class Config:
    """What the decode kernel can be tuned by.

    Attributes:
      strips: columns of an output tile, in units of 128.
      groups: groups in a chunk, all unrolled.
      join: strips that one product takes together; 2 fills a matrix unit 256 wide.
      stack: groups of 128 channels that one product takes together; 2 fills a matrix unit 256 deep.
      unpack: ``"int8"`` or ``"bfloat16"``, what the matrix unit multiplies.
      digits: of 8 bits, that x has in int8; 2 or 3.
      cores: cores of a device that share the columns; 2 on v4 and v5p.
    """

    strips: int = 8
    groups: int = 8
    join: int = 1
    stack: int = 1
    unpack: str = "int8"
    digits: int = 3
    cores: int = 1

    def __post_init__(self) -> None:
        if self.strips < 1 or self.join < 1 or self.strips % self.join:
            raise ValueError(f"strips is {self.strips}, expected a positive multiple of join, {self.join}")
        if self.groups < 1 or self.stack < 1 or self.groups % self.stack:
            raise ValueError(f"groups is {self.groups}, expected a positive multiple of stack, {self.stack}")
        if self.digits not in (2, 3):
            raise ValueError(f"digits is {self.digits}, expected 2 or 3")
        if self.cores < 1:
            raise ValueError(f"cores is {self.cores}, expected at least 1")
        if self.unpack not in UNPACKS:
            raise ValueError(f"unpack is {self.unpack!r}, expected one of {list(UNPACKS)}")


def heuristic(device_kind: str, m: int, k: int, n: int) -> Config:
    """The configuration for a device (``jax.Device.device_kind``) and a product ``[m, k] @ [k, n]``."""
    del k
    kind = device_kind.lower()
    strips = min(8 if m <= 16 else 4, 1 << (-(-n // LANES) - 1).bit_length())
    unpack = "bfloat16" if "7" in kind else "int8"
    wide = "v6" in kind or "7" in kind
    cores = 2 if kind in ("tpu v4", "tpu v5", "tpu v5p") else 1
    return Config(strips, join=2 if wide and strips % 2 == 0 else 1, unpack=unpack, cores=cores)


def choose(device_kind: str, m: int, k: int, n: int) -> Config:
    """What was measured for this product, else what the :func:`heuristic` says."""
    fields = tuned("mosaic_tpu", device_kind, m, k, n)
    return heuristic(device_kind, m, k, n) if fields is None else Config(**fields)


def _bit(t):
    """Where register ``t`` of a group's codes has its codes in a field."""
    return 2 * (t % 2)


def _pieces(bits: int) -> list[list[tuple[int, int]]]:
    """Planes ``(width, shift)`` of a code, in pieces of up to 4 bits: 7 -> [[(4, 0)], [(2, 4), (1, 6)]]."""
    planes: list[tuple[int, int]] = []
    shift = 0
    for n in plane_widths(bits):
        planes.append((n, shift))
        shift += n
    return [found for low in (0, 4) if (found := [plane for plane in planes if plane[1] // 4 * 4 == low])]


def _unpack(ref, row, piece, group_size: int, field: int) -> jax.Array:
    """``[g, 128]``, one piece of the group at ``row``: int8 ``q << bit`` or bfloat16 ``128 + (q << bit)``."""
    repeat = 0x00010001 if field == 16 else 0x01010101
    registers = group_size * field // WORD_BITS // SUBLANES
    codes: list = [None] * registers
    for n, shift in piece:
        rows, above, first = group_size * n // WORD_BITS, shift % 4, row + group_size * shift // WORD_BITS
        words = [_load(ref, first + t * SUBLANES, rows, n) for t in range(max(1, rows // SUBLANES))]
        shifted: dict[tuple[int, int], jax.Array] = {}
        for t in range(registers):
            part, slot = t % len(words), t // len(words)
            by = slot * n * max(1, SUBLANES // rows) - _bit(t) - above
            if (part, by) not in shifted:
                shifted[part, by] = _shift(words[part], by)
            code = shifted[part, by] & np.uint32((((1 << n) - 1) << (_bit(t) + above)) * repeat)
            codes[t] = code if codes[t] is None else codes[t] | code
    if field == 16:
        return jnp.concatenate([pltpu.bitcast(c | np.uint32(0x43004300), jnp.bfloat16) for c in codes])
    return jnp.concatenate([pltpu.bitcast(c, jnp.int8) for c in codes])


def _shift(words, by: int):
    if by == 0:
        return words
    return words >> np.uint32(by) if by > 0 else words << np.uint32(-by)


def _load(ref, row, rows: int, n: int) -> jax.Array:
    """8 rows of a plane of ``n`` bits; a group's fewer ``rows`` are repeated, each copy a slot further."""
    words = ref[pl.ds(row, SUBLANES), :]
    if rows >= SUBLANES:
        return words
    sublane = lax.broadcasted_iota(jnp.int32, words.shape, 0)
    for k in range(1, SUBLANES // rows):
        words = jnp.where(sublane < k * rows, words, ref[pl.ds(row - k * rows, SUBLANES), :])
    return words >> (sublane // rows * n).astype(jnp.uint32)


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Where the groups of a width are; scalars of the kernel."""

    bits: int
    size: jax.Array | int
    chunks: jax.Array | int
    first_chunk: jax.Array | int
    first_group: jax.Array | int
    first_row: jax.Array | int


def _segments(sizes, w: MixedTensor, groups: int) -> list[_Segment]:
    found = []
    chunk = group = row = 0
    for i, b in enumerate(w.widths):
        size = sizes[i]
        chunks = (size + groups - 1) // groups
        found.append(_Segment(b, size, chunks, chunk, group, row))
        chunk, group, row = chunk + chunks, group + size, row + size * (w.group_size * b // WORD_BITS)
    return found


def _prepare(order, x_ref, x_groups, unit_ref, sums_ref, segments, w: MixedTensor, config: Config):
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
                x = _leading(x)
                digits = x
                lifted = jnp.where(spot == positions[k], jnp.sum(x, 1, keepdims=True) * lift, lifted)
            moved = _dot(digits.astype(jnp.bfloat16), move)  # exact, int8 digits are bfloat16 numbers, too
            if field == 8:
                moved = moved.astype(jnp.int32)
            moved = moved.astype(x_groups.dtype)
            # Groups that are stacked: each in rows of its own, and zeros where the others' channels are.
            place = [jnp.zeros_like(moved)] * config.stack
            place[k % config.stack] = moved
            stacked.append(_concatenate(place, 1))
            if len(stacked) == config.stack:
                x_groups[(t * u + k) // config.stack] = _concatenate(stacked, 0)
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


def _leading(x):
    """float32 rounded to 8 bits, which bfloat16 has (Veltkamp): XLA may drop a cast and its inverse."""
    scaled = x * 65537.0
    return scaled - (scaled - x)


def _dot(a, b, dtype=jnp.float32):
    return jnp.dot(a, b, preferred_element_type=dtype)


def _concatenate(arrays: list, axis: int) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=axis)


def _correct(x, factors: list[jax.Array]):
    """``x[rows, G] @ factors[G, columns]`` almost in float32, in one pass of bfloat16 products.

    ``x`` is there three times, as from ``_prepare``. ``factors`` are what ``x`` rounded to bfloat16, the
    rest rounded, and for the third either the rest of that or again x rounded are multiplied by.
    """
    groups = factors[0].shape[0]
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1) // groups
    first = _leading(x)
    second = _leading(x - first)
    third = first if factors[2] is not factors[0] else x - first - second
    x = jnp.where(lane == 0, first, jnp.where(lane == 1, second, third))
    fill = jnp.zeros((x.shape[1] - 3 * groups, factors[0].shape[1]), jnp.float32)
    rows = jnp.concatenate([*factors, fill] if fill.shape[0] else factors)
    return _dot(x.astype(jnp.bfloat16), rows.astype(jnp.bfloat16))


def _kernel(*refs, w: MixedTensor, config: Config, trips, has_bias: bool):
    sizes, order, x_ref, scale_ref, zero_ref = refs[:5]
    bias_ref = refs[5] if has_bias else None
    words_ref, out_ref, *scratch = refs[5 + has_bias :]
    x_groups, unit_ref, sums_ref, acc_ref, scale_rows, buffer, arrived = scratch
    u, field = config.groups, UNPACKS[config.unpack]
    segments = _segments(sizes if trips is None else trips, w, u)
    strips, last = config.strips, words_ref.shape[1] // LANES - 1
    step, steps = pl.program_id(1), pl.num_programs(1)
    half = step % 2

    def copy(step, half):  # of one tile's words, to half of the buffer
        for j in range(strips):
            strip = jnp.minimum((pl.program_id(0) * steps + step) * strips + j, last)
            yield pltpu.make_async_copy(
                words_ref.at[:, pl.ds(pl.multiple_of(strip * LANES, LANES), LANES)],
                buffer.at[half, j, pl.ds(SUBLANES, words_ref.shape[0])],
                arrived.at[half],
            )

    @pl.when(step == 0)
    def first():
        for c in copy(0, 0):
            c.start()
        _prepare(order, x_ref, x_groups, unit_ref, sums_ref, segments, w, config)

    @pl.when(step + 1 < steps)
    def following():
        for c in copy(step + 1, 1 - half):
            c.start()

    scale = scale_ref[...].astype(jnp.float32)  # [G, columns]
    for j in range(strips):
        scale_rows[j] = scale[:, j * LANES : (j + 1) * LANES]
    zero = zero_ref[...].astype(jnp.int32)
    if zero_bits(w.widths) == 4:
        zero = jnp.concatenate([zero & 15, zero >> 4], axis=0)[: w.groups]
    offset = scale * zero.astype(jnp.float32)
    high = _leading(offset)
    past = _correct(sums_ref[1], [high, high, offset - high])
    if field == 16:
        past += _correct(sums_ref[0], [scale] * 3)
    acc_ref[...] = -past if bias_ref is None else jnp.broadcast_to(bias_ref[...], past.shape) - past

    for c in copy(step, half):
        c.wait()

    for s in segments:
        chunk = partial(_chunk, s=s, half=half, w=w, config=config, scratch=scratch)
        lax.fori_loop(0, s.chunks, chunk, 0)
    out_ref[...] = acc_ref[: out_ref.shape[0]]


def _chunk(c, carry, *, s: _Segment, half, w: MixedTensor, config: Config, scratch):
    """Adds the product with one chunk's groups to ``acc_ref``."""
    x_groups, unit_ref, _, acc_ref, scale_rows, buffer, _ = scratch
    g, u, join, field = w.group_size, config.groups, config.join, UNPACKS[config.unpack]
    rows, t, stack = acc_ref.shape[0], s.first_chunk + c, config.stack
    group_rows = g * s.bits // WORD_BITS
    for j in range(0, config.strips, join):
        total = [jnp.zeros((rows, LANES), jnp.float32)] * join
        for first in range(0, u, stack):
            x, products = x_groups[(t * u + first) // stack], []
            # Past the segment's end x is zero, and the buffer goes on for a chunk.
            begins = [SUBLANES + s.first_row + (c * u + first + k) * group_rows for k in range(stack)]
            for piece in reversed(_pieces(s.bits)):
                strips = [
                    _concatenate([_unpack(buffer.at[half, j + i], row, piece, g, field) for row in begins], 0)
                    for i in range(join)
                ]
                products.append(_dot(x, _concatenate(strips, 1), jnp.int32 if field == 8 else jnp.float32))
            found = products[0] if len(products) == 1 else products[0] * 16 + products[1]  # highest first
            size = found.shape[0] // stack
            for k in range(stack):
                part = found[k * size : (k + 1) * size]
                if field == 8:
                    part = _value([part[d * rows : (d + 1) * rows] for d in range(config.digits)])
                scale_row = jnp.minimum(s.first_group + c * u + first + k, w.groups - 1)
                for i in range(join):
                    scale = scale_rows[j + i, pl.ds(scale_row, 1), :]
                    total[i] += part[:, i * LANES : (i + 1) * LANES] * scale
        for i in range(join):
            lanes = slice((j + i) * LANES, (j + i + 1) * LANES)
            acc_ref[:, lanes] += total[i] * unit_ref[t] if field == 8 else total[i]
    return carry


def _value(digits) -> jax.Array:
    """float32 value of int32 sums of products with the digits of ``x``, highest first."""
    value = ((digits[-2] << 8) + digits[-1]).astype(jnp.float32)
    return value if len(digits) == 2 else digits[0].astype(jnp.float32) * 65536.0 + value


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
      config: by :func:`choose` for the default device if None.
      interpret: as in ``pl.pallas_call``.

    Returns:
      float32 ``[M, N]``.

    Raises:
      NotImplementedError: M is 0, the group size is not 32, 64, 128 or 256, or K is too large for VMEM.
    """
    m, (k, n) = x.shape[0], w.shape
    if config is None:
        config = choose(jax.devices()[0].device_kind, m, k, n)
    if m == 0:
        raise NotImplementedError("x has no rows")
    if w.group_size not in GROUP_SIZES:
        raise NotImplementedError(f"the group size is {w.group_size}, not one of {GROUP_SIZES}")
    bias = None if bias is None else bias.astype(jnp.float32)[None]
    if m > DECODE_ROWS:
        return prefill(x, w, jnp.zeros((1, n), jnp.float32) if bias is None else bias, interpret)
    return _decode(x, w, bias, config, interpret)


def _decode(x: jax.Array, w: MixedTensor, bias, config: Config, interpret) -> jax.Array:
    m, (k, n), g, u = x.shape[0], w.shape, w.group_size, config.groups
    # Copies in the kernel are whole registers; nothing to do here for balanced allocations and usual N.
    words = _pad(w.words, SUBLANES, LANES)
    x = _pad(x, SUBLANES if m <= SUBLANES else 16, w.groups * g)
    if g % LANES:  # groups begin within registers
        x = x.reshape(x.shape[0], w.groups, g).swapaxes(0, 1)
    rows = x.shape[-2]
    if x.dtype != jnp.float32 and rows == SUBLANES:
        x = x.astype(jnp.float32)  # registers of bfloat16 have 16 rows

    # A chunk may go on past the end of its segment, and a load of 8 rows begin before its group.
    buffer_rows = words.shape[0] + u * g * max(w.widths) // WORD_BITS + 2 * SUBLANES
    strips = config.strips
    while strips > config.join and 2 * strips * buffer_rows * LANES * 4 > VMEM_BYTES:
        strips = max(config.join, strips // 2 // config.join * config.join)
    if 2 * strips * buffer_rows * LANES * 4 > VMEM_BYTES:
        raise NotImplementedError(f"{config.join * LANES} columns of {k} channels do not fit into VMEM")
    config = dataclasses.replace(config, strips=strips, stack=config.stack if g == LANES else 1)
    columns = strips * LANES
    tiles = pl.cdiv(n, columns)
    cores = config.cores if tiles % config.cores == 0 else 1
    steps = tiles // cores
    chunks = (w.groups + len(w.widths) * (u - 1)) // u + 1  # the most there can be, and one, see _prepare
    int8, stack = config.unpack == "int8", config.stack
    x_shape = (chunks * u // stack, stack * (config.digits * rows if int8 else rows), stack * g)

    def whole(a):
        return pl.BlockSpec(a.shape, lambda core, i, *_: (0,) * a.ndim)

    def column(height):
        return pl.BlockSpec((height, columns), lambda core, i, *_: (0, core * steps + i))

    # Segment sizes that are a NumPy array, not traced, become constant trip counts: for cost estimates.
    trips = tuple(map(int, w.segments)) if isinstance(w.segments, np.ndarray) else None
    arguments = [x, w.scale, w.zero, *([] if bias is None else [bias]), words]
    return pl.pallas_call(
        partial(_kernel, w=w, config=config, trips=trips, has_bias=bias is not None),
        name="mixed_matmul_decode",
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores, steps),
            in_specs=[
                whole(x),
                column(w.groups),
                column(w.zero.shape[0]),
                *([] if bias is None else [column(1)]),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=column(m),
            scratch_shapes=[
                pltpu.VMEM(x_shape, jnp.int8 if int8 else jnp.bfloat16),
                pltpu.VMEM((chunks, rows, LANES), jnp.float32),
                pltpu.VMEM((2, rows, -(-3 * w.groups // LANES) * LANES), jnp.float32),
                pltpu.VMEM((rows, columns), jnp.float32),
                pltpu.VMEM((strips, w.groups, LANES), jnp.float32),
                pltpu.VMEM((2, strips, buffer_rows, LANES), jnp.uint32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES + (16 << 20),
            disable_bounds_checks=True,
            disable_semaphore_checks=True,
        ),
        cost_estimate=_cost(m, w, arguments),
        interpret=interpret,
    )(w.segments, w.order, *arguments)


def _pad(a: jax.Array, rows: int, columns: int) -> jax.Array:
    """Zeros up to multiples of ``rows`` and ``columns``."""
    missing = [(0, -size % multiple) for size, multiple in zip(a.shape, (rows, columns))]
    return jnp.pad(a, missing) if any(after for _, after in missing) else a


def _cost(m: int, w: MixedTensor, arguments) -> pl.CostEstimate:
    """Every argument is read once, and the result written once."""
    read = sum(a.size * a.dtype.itemsize for a in (w.segments, w.order, *arguments))
    k, n = w.shape
    return pl.CostEstimate(flops=2 * m * k * n, transcendentals=0, bytes_accessed=read + m * n * 4)
