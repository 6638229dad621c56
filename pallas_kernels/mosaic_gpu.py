"""The matmul on NVIDIA GPUs: one Pallas Mosaic GPU kernel for sm_80, sm_90a and sm_100a, decode and prefill.

A *block* of 128 threads (four warps) computes a tile of ``y``: ``block_m`` rows by ``block_n`` columns, over
all groups or, with ``split_k``, over a share of each width's groups; XLA then adds the shares. It walks
through the groups of one width after another. How many groups a width has is data, so each width has a loop
of its own whose trip count is read from memory, and no branch depends on the width of a group.

*Codes are never converted one by one.* A bfloat16 in [128, 256) has 7 bits of mantissa worth 64 ... 1, so

    (word >> shift) & (mask * 0x00010001 << bit) | 0x43004300

is two bfloat16 numbers, ``128 + 2**bit * code`` of slot ``s`` (low half) and of slot ``s + slots / 2`` (high
half), and goes to the tensor cores as it is. Several slots share one shift (three of 2 bits, seven of 1).
What is wrong with these numbers is put right elsewhere, where it costs little, or nothing per weight:

* ``2**bit`` is divided out of x, and a plane's worth in the code (4 for the 1-bit plane of 3 bits) is
  multiplied in: powers of two, exact. x is also brought into the order in which words yield channels
  (:func:`~pallas_kernels.mosaic_gpu_operands.channel_order`). XLA does both before the kernel; x is small.
* the 128: a group's sum starts at ``-128 * sum(x')`` and not at 0 (``constant``).
* scales multiply a group's finished sum, ``[block_m, block_n]``.
* zero points: ``y -= (sum of x per group) @ (scale * zero)``, a product with one column per *group*, taken
  by the same tensor cores after the loops, with both sides split into bfloat16 parts so that nothing is lost
  (:func:`~pallas_kernels.mosaic_gpu_operands.chunked`).

*Memory.* A word is used by one thread only (but by all ``block_m`` rows), so words and scales go straight
from memory into registers, loaded one step ahead of their use; x, which all warps share, is pipelined
through shared memory. In decode the words are nearly all that is read; in prefill a masked word serves
``block_m / 16`` tensor-core instructions.

x is rounded to bfloat16; products are exact and summed in float32. Because a sum runs over ``128 + code``,
its rounding error is that of float32 sums some 2**6 times larger than the result: about 1e-5 of
``sum |x| |w|``, far below what rounding x does.

For what interpret mode does not prove see :mod:`pallas_kernels.mosaic_gpu_registers`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.layout import WORD_BITS, MixedTensor
from pallas_kernels.mosaic_gpu_operands import CHUNK, DEPTH, activations, planes_of, slot_pairs
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
from pallas_kernels.tuning import tuned

MAGIC = 0x43004300  # two bfloat16 of 128
DECODE_ROWS = 32
ROW_TILE = 16
COLUMN_MULTIPLE = 8  # rows of scales then start on 16 bytes

# Multiprocessors by device kind: how many blocks it takes to busy them all.
MULTIPROCESSORS = {"A100": 108, "H100": 132, "H200": 132, "B200": 148, "GB200": 148}


@dataclasses.dataclass(frozen=True)
class Config:
    """How the product is cut into blocks.

    Attributes:
      block_m: rows of x per block; 16, 32, 64 or 128.
      block_n: columns per block; 32, 64, 128 or 256.
      stages: steps of x in flight, or in use, in shared memory.
      groups_per_step: groups between two waits; also how far ahead words are loaded. What is left of a
        width when its groups do not divide by this is done one group a step.
      split_k: blocks that share the groups of one tile of y.

    Raises:
      ValueError: a field is not as above, or not in 1..16.
    """

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


def heuristic(device_kind: str, m: int, k: int, n: int) -> Config:
    """A configuration from counts of instructions and blocks; nothing here was timed.

    Decode takes one tile of 16 rows and splits K until every multiprocessor has a block; prefill takes 64
    rows, which share each masked word, and one group a step, for their sums fill the registers.
    """
    block_n = next(width for width in (128, 64, 32) if n >= width or width == 32)
    if m > DECODE_ROWS:
        return Config(block_m=64, block_n=block_n, stages=3, groups_per_step=1)
    processors = next((count for name, count in MULTIPROCESSORS.items() if name in device_kind), 108)
    blocks = -(-m // 16) * -(-n // block_n)
    split = 1
    # A share below 1024 channels would spend more on filling its pipelines than on its groups.
    while blocks * split < processors // 2 and k // (2 * split) >= 1024 and split < 8:
        split *= 2
    return Config(block_m=16, block_n=block_n, stages=3, groups_per_step=4, split_k=split)


def choose(device_kind: str, m: int, k: int, n: int) -> Config:
    """What was measured for this product, else what the :func:`heuristic` says."""
    fields = tuned("mosaic_gpu", device_kind, m, k, n)
    return heuristic(device_kind, m, k, n) if fields is None else Config(**fields)


def mixed_matmul(
    x: jax.Array,
    w: MixedTensor,
    *,
    bias: jax.Array | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """``x @ w (+ bias)``, x rounded to bfloat16, accumulated in float32.

    Args:
      x: bfloat16 or float32 ``[M, K]``.
      w: the packed weight ``[K, N]``.
      bias: ``[N]``, added in float32.
      config: by :func:`choose` for the first device if None.
      interpret: run by the Pallas interpreter, on any platform.

    Returns:
      float32 ``[M, N]``.

    Raises:
      NotImplementedError: groups are not of 32, 64 or 128 channels, x is of another type, or M is 0.
    """
    (m, k), n = x.shape, w.shape[1]
    if w.group_size not in (32, 64, 128):
        raise NotImplementedError(f"mosaic_gpu takes groups of 32, 64 or 128, not of {w.group_size}")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"mosaic_gpu takes bfloat16 or float32 activations, not {x.dtype}")
    if m == 0:
        raise NotImplementedError("mosaic_gpu has no block for a product without rows")
    if config is None:
        config = choose(jax.devices()[0].device_kind, m, k, n)
    # The last tile moves left over its neighbour, so N need not be a multiple of the tile. A weight narrower
    # than a tile, or with N no multiple of 8, is copied on every call: correct, not fast, and rare.
    columns = max(config.block_n, -(-n // COLUMN_MULTIPLE) * COLUMN_MULTIPLE)
    padded = [jnp.pad(a, ((0, 0), (0, columns - n))) for a in (w.words, w.scale, w.zero_codes())]
    if bias is not None:
        bias = jnp.pad(bias.astype(jnp.float32), (0, columns - n))
    return _product(x, w, padded, bias, config, interpret)[:m, :n]


def _product(
    x: jax.Array,
    w: MixedTensor,
    padded: list[jax.Array],
    bias: jax.Array | None,
    config: Config,
    interpret: bool,
) -> jax.Array:
    """``float32[rows, n]``: whole tiles of rows, and columns as in ``padded``: words, scale, zero codes."""
    words, scale, zero_code = padded
    n, groups, split = words.shape[1], w.groups, config.split_k
    keys = sorted({p.key for b in w.widths for p in planes_of(b)})
    rows = -(-x.shape[0] // config.block_m) * config.block_m
    xs, constant, sums = activations(x, w, keys, rows)
    if groups < CHUNK:
        scale, zero_code = (jnp.pad(a, ((0, CHUNK - groups), (0, 0))) for a in (scale, zero_code))
    fused = [bias] if bias is not None and split == 1 else []
    kernel = plgpu.kernel(
        partial(_body, w=w, keys=keys, config=config, n=n, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((split, rows, n), jnp.float32),
        grid=(rows // config.block_m, -(-n // config.block_n), split),
        grid_names=("m", "n", "s"),
        kernel_name="mixed_matmul",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    y = kernel(_plan(w, split), words, scale, zero_code, constant, sums, *xs, *fused)
    if split == 1:
        return y.reshape(rows, n)  # y[0] would copy
    return y.sum(0) if bias is None else y.sum(0) + bias[None]


def _plan(w: MixedTensor, split: int) -> jax.Array:
    """``int32[1 + 3 * widths * split]``: the magic number, then begin, count and first row of all shares.

    The magic number is here because as a literal it would be loaded again before every mask.
    """
    first_group, first_row = w.segment_starts()
    ends = w.segments[:, None] * jnp.arange(split + 1, dtype=jnp.int32)[None] // split
    begin, count = ends[:, :-1], ends[:, 1:] - ends[:, :-1]
    rows = jnp.asarray([w.group_size * b // WORD_BITS for b in w.widths], jnp.int32)[:, None]
    shares = jnp.stack([first_group[:, None] + begin, count, first_row[:, None] + begin * rows])
    return jnp.concatenate([jnp.full((1,), MAGIC, jnp.int32), shares.reshape(-1)])


def _body(plan, words, scale, zero_code, constant, sums, *refs, w, keys, config, n, interpret):  # type: ignore[no-untyped-def]
    """One block. Arguments are references to memory; ``refs``: x per key, the bias if any, y."""
    *x_refs, out = refs[: len(keys)] + refs[-1:]
    bias = refs[len(keys)] if len(refs) > len(keys) + 1 else None
    g, block_m, block_n = w.group_size, config.block_m, config.block_n
    split = config.split_k
    row_block, s = lax.axis_index("m"), lax.axis_index("s")
    column = lax.min(lax.axis_index("n") * block_n, n - block_n)
    columns = pl.ds(column, block_n)
    # The instruction takes 16 rows; with more in one operand, Mosaic would give each warp its own rows and
    # have all four unpack the same words. So everything with rows comes as a list of tiles of 16.
    tiles_16 = range(block_m // ROW_TILE)
    own_rows = [pl.ds(row_block * block_m + r * ROW_TILE, ROW_TILE) for r in tiles_16]
    magic = plan[0].astype(jnp.uint32)

    def load_row(ref):
        return plgpu.load(ref, layout=result_layout(block_n).reduce(0), optimized=False)

    def down(row):  # [block_n] -> [16, block_n]
        return lax.broadcast_in_dim(row, (ROW_TILE, block_n), [1])

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
        starts = [
            plgpu.load(constant.at[position, rows_16], layout=ACC.reduce(1), optimized=False)
            for rows_16 in own_rows
        ]
        return planes, load_row(scale.at[position, columns]), starts

    def add_group(b, acc, x, group):
        """acc + what one group contributes; ``x`` gives a plane's channels, by tiles of 16 rows."""
        planes, scale_row, starts = group
        parts = [lax.broadcast_in_dim(start, (ROW_TILE, block_n), [0]) for start in starts]
        for plane, tiles in zip(planes_of(b), planes):
            x_plane = x[plane.key]
            pairs = slot_pairs(plane.bits, g)
            for i, tile in enumerate(full_tiles(tiles, len(pairs) * plane.bits, interpret)):
                for t, (shift, bit) in enumerate(pairs):
                    mask = jnp.uint32(((1 << plane.bits) - 1) * 0x10001 << bit)
                    code = ((tile >> jnp.uint32(shift)) if shift else tile) & mask | magic
                    k = (i * len(pairs) + t) * DEPTH
                    operand = as_operand(code, interpret)
                    for r in tiles_16:
                        parts[r] = mma(parts[r], x_plane[r][:, k : k + DEPTH], operand, interpret)
        scale_tile = down(as_accumulator(scale_row, interpret))
        return [total + part * scale_tile for total, part in zip(acc, parts)]

    def segment(b, begin, row, steps, per_step, stages, acc):
        """Adds ``steps * per_step`` groups: x through shared memory, words one step ahead in registers."""
        rows = g * b // WORD_BITS
        lanes = min(g, 64)
        swizzled = (plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(2 * lanes))
        used = [p.key for p in planes_of(b)]
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
                x = {
                    key: [
                        plgpu.load(ref.at[pl.ds(r * ROW_TILE, ROW_TILE), pl.ds(u * g, g)], layout=LHS)
                        for r in tiles_16
                    ]
                    for key, ref in zip(used, x_step)
                }
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
        return pipeline(*(x_refs[keys.index(key)] for key in used))[0]

    acc = [plgpu.layout_cast(jnp.zeros((ROW_TILE, block_n), jnp.float32), ACC) for _ in tiles_16]
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
        """acc - (sums of x) @ (scale * zero), for 16 groups; blocks share them as they share groups."""
        chunk = s + t * split
        start = lax.min(chunk * CHUNK, max(w.groups, CHUNK) - CHUNK)
        products = []
        for half in range(2):
            at = pl.ds(start + half * (CHUNK // 2), CHUNK // 2)
            zeros = plgpu.load(zero_code.at[at, columns], layout=word_layout(block_n), optimized=False)
            scales = plgpu.load(scale.at[at, columns], layout=word_layout(block_n), optimized=False)
            products.append(scales.astype(jnp.float32) * zeros.astype(jnp.int32).astype(jnp.float32))
        # A product of two numbers of 8 bits has 16, and is the sum of two bfloat16: cut off the top, twice.
        rights, upper_half = [], jnp.uint32(0xFFFF0000)
        for _ in range(2):
            tops = [lax.bitcast_convert_type(p, jnp.uint32) & upper_half for p in products]
            rights.append(as_operand((tops[0] >> jnp.uint32(16)) | tops[1], interpret))
            products = [p - lax.bitcast_convert_type(top, jnp.float32) for p, top in zip(products, tops)]
        for r in tiles_16:
            for part in range(3):
                left = plgpu.load(sums.at[chunk, part, own_rows[r]], layout=LHS, optimized=False)
                for right in rights:
                    acc[r] = mma(acc[r], left, right, interpret)
        return acc

    chunk_count = -(-w.groups // CHUNK)
    acc = lax.fori_loop(0, lax.div(chunk_count - s + (split - 1), split), correct, acc)
    for rows_16, total in zip(own_rows, acc):
        y = from_accumulator(total, interpret)
        if bias is not None:
            y = y + down(load_row(bias.at[columns]))
        plgpu.store(out.at[s, rows_16, columns], y, optimized=False)
