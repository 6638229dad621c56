"""The matmul on NVIDIA GPUs: one Pallas Mosaic GPU kernel for sm_80, sm_90a and sm_100a."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layout import WORD_BITS, MixedTensor, plane_widths, zero_step
from pallas_kernels.mosaic_gpu_registers import (
    ACC,
    LHS,
    as_accumulator,
    as_operand,
    from_accumulator,
    full_tiles,
    load_words,
    mma,
    result_layout,
    word_layout,
)

MAGIC = 0x43004300
TILE = 16
MANTISSA_BITS = 7
MIN_BLOCK_N = 32
CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """How the product is cut into blocks of one warpgroup (128 threads)."""

    block_m: int = 16
    block_n: int = 128
    stages: int = 3
    groups_per_step: int = 4
    split_k: int = 1

    def __post_init__(self) -> None:
        if self.block_m not in (16, 32, 64, 128):
            raise ValueError(f"block_m is {self.block_m}, expected 16, 32, 64 or 128")
        if self.block_n not in (32, 64, 128, 256):
            raise ValueError(f"block_n is {self.block_n}, expected 32, 64, 128 or 256")
        for name in ("stages", "groups_per_step", "split_k"):
            if not 1 <= getattr(self, name) <= 16:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 to 16")


@dataclasses.dataclass(frozen=True)
class Plane:
    bits: int
    copy: int
    shift: int


def planes_of(width: int) -> tuple[Plane, ...]:
    planes: list[Plane] = []
    shift = 0
    for n in plane_widths(width):
        planes.append(Plane(n, sum(p.bits == n for p in planes), shift))
        shift += n
    return tuple(planes)


def slot_pairs(bits: int, group_size: int) -> list[tuple[int, int]]:
    """(shift, bit)"""
    pairs = group_size // TILE if group_size * bits < 8 * WORD_BITS else WORD_BITS // (2 * bits)
    fit = MANTISSA_BITS // bits
    return [(bits * (t - t % fit), bits * (t % fit)) for t in range(pairs)]


def channel_order(bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """channel (in group) of each k index and the bit at which its code is read."""
    rows, half = group_size * bits // WORD_BITS, WORD_BITS // (2 * bits)
    pairs = slot_pairs(bits, group_size)
    channel, bit = [], []
    for block in range(max(1, rows // 8)):
        for t, (_, b) in enumerate(pairs):
            for i in range(8):
                row = 8 * block + i if rows >= 8 else i % rows
                virtual = 0 if rows >= 8 else i // rows
                for h in range(2):
                    channel.append((t + virtual * len(pairs) + h * half) * rows + row)
                    bit.append(b)
    return np.asarray(channel, np.int32), np.asarray(bit, np.int32)


def heuristic(device_kind: str, m: int, k: int, n: int) -> Config:
    del device_kind, k
    if m > 32:
        return Config(block_m=64, block_n=128, stages=3, groups_per_step=1)
    return Config()


def mixed_matmul(
    x: jax.Array,
    w: MixedTensor,
    *,
    bias: jax.Array | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    m, k = x.shape
    n = w.shape[1]
    if w.group_size not in (32, 64, 128):
        raise NotImplementedError(
            f"mosaic_gpu needs groups of 32, 64 or 128 channels, this weight has {w.group_size}"
        )
    if config is None:
        config = heuristic(jax.devices()[0].device_kind, m, k, n)
    # A tile at the edge moves left over its neighbour; a weight narrower than a tile, or whose rows do
    # not start on 16 bytes, is padded (a copy per call: no model that we know has such a layer).
    columns = max(config.block_n, -(-n // 8) * 8)
    w_columns = [jnp.pad(a, ((0, 0), (0, columns - n))) for a in (w.words, w.scale, w.zero_codes())]
    y = _product(x, w, *w_columns, bias, config, interpret)
    return y[:m, :n]


def _product(x, w, words, scale, zero_code, bias, config, interpret):
    m = x.shape[0]
    n = words.shape[1]
    groups, g = w.groups, w.group_size
    block_m, block_n, split = config.block_m, config.block_n, config.split_k
    keys = sorted({(p.bits, p.copy) for b in w.widths for p in planes_of(b)})
    rows = -(-m // block_m) * block_m
    xs, constant, sums = _activations(x, w, keys, rows)

    if groups < CHUNK:
        scale, zero_code = (jnp.pad(a, ((0, CHUNK - groups), (0, 0))) for a in (scale, zero_code))
    fuse_bias = bias is not None and split == 1
    extra = [jnp.pad(bias.astype(jnp.float32), (0, n - bias.shape[0]))] if fuse_bias else []
    grid = (rows // block_m, -(-n // block_n), split)
    kernel = plgpu.kernel(
        partial(_body, w=w, keys=keys, config=config, n=n, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((split, rows, n), jnp.float32),
        grid=grid,
        grid_names=("m", "n", "s"),
        kernel_name="mixed_matmul",
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )
    y = kernel(_plan(w, split), words, scale, zero_code, constant, sums, *xs, *extra)
    y = y[0] if split == 1 else y.sum(0)
    if bias is not None and not fuse_bias:
        y = y + jnp.pad(bias.astype(jnp.float32), (0, n - bias.shape[0]))[None]
    return y


def _plan(w: MixedTensor, split: int) -> jax.Array:
    """int32[1 + 3 W S]: magic, begin, count, row."""
    first_group, first_row = w.segment_starts()
    ends = w.segments[:, None] * jnp.arange(split + 1, dtype=jnp.int32)[None] // split
    begin = first_group[:, None] + ends[:, :-1]
    count = ends[:, 1:] - ends[:, :-1]
    rows = jnp.asarray([w.group_size * b // WORD_BITS for b in w.widths], jnp.int32)[:, None]
    row = first_row[:, None] + ends[:, :-1] * rows
    return jnp.concatenate([jnp.full((1,), MAGIC, jnp.int32), jnp.stack([begin, count, row]).reshape(-1)])


def _activations(x, w, keys, rows):
    m, k = x.shape
    groups, g = w.groups, w.group_size
    x = jnp.pad(x.astype(jnp.bfloat16), ((0, rows - m), (0, groups * g - k)))

    def by_group(table) -> jax.Array:  # a constant per width -> float32[G] in storage order
        return jnp.repeat(jnp.asarray(table, jnp.float32), w.segments, total_repeat_length=groups)

    xs, constant = [], jnp.zeros((rows, groups), jnp.float32)
    for bits, copy in keys:
        channel, bit = channel_order(bits, g)
        index = w.order[:, None] * g + jnp.asarray(channel)[None]
        worth = by_group(
            [sum(2.0**p.shift for p in planes_of(b) if (p.bits, p.copy) == (bits, copy)) for b in w.widths]
        )
        factor = worth[:, None] * jnp.asarray(2.0**-bit, jnp.float32)[None]
        x_plane = x[:, index] * factor.astype(jnp.bfloat16)[None]  # [M, G, g], exact
        constant -= 128.0 * x_plane.astype(jnp.float32).sum(-1)
        xs.append(x_plane.reshape(rows, groups * g))

    total = x.reshape(rows, groups, g)[:, w.order].astype(jnp.float32).sum(-1)
    total = -total * by_group([zero_step(b, w.widths) for b in w.widths])[None]
    return xs, constant.T, _chunks(total)


def _chunks(total: jax.Array) -> jax.Array:
    """float32[M, G] -> bf16[C, 3, M, 16]"""
    rows, groups = total.shape
    total = jnp.pad(total, ((0, 0), (0, max(0, CHUNK - groups))))
    groups = total.shape[1]
    count = -(-groups // CHUNK)
    start = np.minimum(np.arange(count) * CHUNK, groups - CHUNK)
    # Words' low halves are even rows of the operand, high halves odd ones.
    interleave = np.arange(CHUNK).reshape(2, CHUNK // 2).T.reshape(-1)
    position = start[:, None] + interleave[None]
    fresh = position >= (np.arange(count) * CHUNK)[:, None]
    chunks = jnp.where(jnp.asarray(fresh)[None], total[:, position], 0).transpose(1, 0, 2)  # [C, M, 16]
    parts = []
    for _ in range(3):
        parts.append(chunks.astype(jnp.bfloat16))
        chunks = chunks - parts[-1].astype(jnp.float32)
    return jnp.stack(parts, 1)


def _body(plan, words, scale, zero_code, constant, sums, *refs, w, keys, config, n, interpret):
    *x_refs, out = refs[: len(keys)] + refs[-1:]
    bias = refs[len(keys)] if len(refs) > len(keys) + 1 else None
    g, block_m, block_n = w.group_size, config.block_m, config.block_n
    split = config.split_k
    row_block, s = lax.axis_index("m"), lax.axis_index("s")
    column = lax.min(lax.axis_index("n") * block_n, n - block_n)
    columns, own_rows = pl.ds(column, block_n), pl.ds(row_block * block_m, block_m)
    magic = plan[0].astype(jnp.uint32)

    def load_row(ref):
        return plgpu.load(ref, layout=result_layout(block_n).reduce(0), optimized=False)

    def across(row):  # [block_n] -> float32[block_m, block_n]
        return lax.broadcast_in_dim(as_accumulator(row, interpret), (block_m, block_n), [1])

    def fetch(b, position, row):
        """Starts loading one group from memory to registers; a place past the end gives the last group."""
        rows = g * b // WORD_BITS
        position = lax.min(position, w.groups - 1)
        row = lax.min(row, words.shape[0] - rows)
        planes, first = [], 0
        for plane in planes_of(b):
            plane_rows = g * plane.bits // WORD_BITS
            planes.append(load_words(words.at[pl.ds(row + first, plane_rows), columns]))
            first += plane_rows
        start = plgpu.load(constant.at[position, own_rows], layout=ACC.reduce(1), optimized=False)
        return planes, load_row(scale.at[position, columns]), start

    def add_group(b, acc, x, group):
        """acc + what one group contributes; ``x`` gives a plane's columns from shared memory."""
        planes, scale_row, start = group
        part = lax.broadcast_in_dim(start, (block_m, block_n), [0])
        for plane, tiles in zip(planes_of(b), planes):
            x_plane = x[keys.index((plane.bits, plane.copy))]
            pairs = slot_pairs(plane.bits, g)
            for i, tile in enumerate(full_tiles(tiles, len(pairs) * plane.bits, interpret)):
                for t, (shift, bit) in enumerate(pairs):
                    mask = jnp.uint32(((1 << plane.bits) - 1) * 0x10001 << bit)
                    code = ((tile >> jnp.uint32(shift)) if shift else tile) & mask | magic
                    k = (i * len(pairs) + t) * TILE
                    part = mma(part, x_plane[:, k : k + TILE], as_operand(code, interpret), interpret)
        return acc + part * across(scale_row)

    def segment(b, begin, row, steps, per_step, stages, acc):
        """Adds ``steps * per_step`` groups: x through shared memory, words one step ahead in registers."""
        rows = g * b // WORD_BITS
        lanes = min(g, 64)
        swizzled = (plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(2 * lanes))
        used = [i for i, key in enumerate(keys) if key in [(p.bits, p.copy) for p in planes_of(b)]]
        x_spec = plgpu.BlockSpec(
            (pl.Element(block_m), pl.Element(per_step * g)),
            lambda t: (row_block * block_m, (begin + t * per_step) * g),
            transforms=swizzled,
            oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
        )

        def fetch_nth(i):
            return fetch(b, begin + i, row + i * rows)

        def step(indices, *refs):
            *x_step, (acc, groups) = refs
            for u in range(per_step):
                x = {i: plgpu.load(ref.at[:, pl.ds(u * g, g)], layout=LHS) for i, ref in zip(used, x_step)}
                acc = add_group(b, acc, x, groups[u])
                # Only now, so that the registers just read are those loaded into.
                groups[u] = fetch_nth((indices[0] + 1) * per_step + u)
            return acc, groups

        pipeline = plgpu.emit_pipeline(
            step,
            grid=(steps,),
            in_specs=[x_spec] * len(used),
            max_concurrent_steps=stages,
            init_carry=(acc, [fetch_nth(u) for u in range(per_step)]),
        )
        return pipeline(*(x_refs[i] for i in used))[0]

    acc = plgpu.layout_cast(jnp.zeros((block_m, block_n), jnp.float32), ACC)
    per_step = config.groups_per_step
    for i, b in enumerate(w.widths):
        if g * b // WORD_BITS > words.shape[0]:
            continue  # not even one group of this width fits
        begin, count, row = (plan[1 + (j * len(w.widths) + i) * split + s] for j in range(3))
        steps = lax.div(count, per_step)
        acc = segment(b, begin, row, steps, per_step, config.stages, acc)
        if per_step > 1:
            done = steps * per_step
            rest_row = row + done * (g * b // WORD_BITS)
            acc = segment(b, begin + done, rest_row, count - done, 1, per_step, acc)

    def correct(t, acc):
        chunk = s + t * split
        start = lax.min(chunk * CHUNK, max(w.groups, CHUNK) - CHUNK)
        products = []
        for half in range(2):
            at = pl.ds(start + half * (CHUNK // 2), CHUNK // 2)
            zero = plgpu.load(zero_code.at[at, columns], layout=word_layout(block_n), optimized=False)
            scl = plgpu.load(scale.at[at, columns], layout=word_layout(block_n), optimized=False)
            products.append(scl.astype(jnp.float32) * zero.astype(jnp.int32).astype(jnp.float32))
        tops = []
        high = jnp.uint32(0xFFFF0000)
        for _ in range(2):
            bits = [lax.bitcast_convert_type(p, jnp.uint32) & high for p in products]
            tops.append(as_operand((bits[0] >> jnp.uint32(16)) | bits[1], interpret))
            products = [p - lax.bitcast_convert_type(v, jnp.float32) for p, v in zip(products, bits)]
        for part in range(3):
            left = plgpu.load(
                sums.at[chunk, part, own_rows], layout=LHS, optimized=False
            )
            for top in tops:
                acc = mma(acc, left, top, interpret)
        return acc

    chunk_count = -(-w.groups // CHUNK)
    acc = lax.fori_loop(0, lax.div(chunk_count - s + (split - 1), split), correct, acc)
    y = from_accumulator(acc, interpret)
    if bias is not None:
        y = y + lax.broadcast_in_dim(load_row(bias.at[columns]), (block_m, block_n), [1])
    plgpu.store(out.at[s, own_rows, columns], y, optimized=False)
