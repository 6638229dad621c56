"""Attention of one new token on NVIDIA GPUs in one launch, which also writes the token's key and value.

Written for Triton, whose blocks need no layouts: every key and value is read once, and the rest is small. A
program processes one key-value head of one sample, with all query heads that read it, and every ``parts``-th
block of slots, so that a few heads and a long cache still fill the chip. Each program computes its own
softmax; XLA combines them, a few numbers each, where it prepares the next product's input.

Only blocks of slots that are in use are read. Empty slots and padding have positions of -1.
"""

import dataclasses
import warnings
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.chips import Device
from pallas_kernels.gpu.config import CAPABILITIES
from pallas_kernels.layout import result_type

try:  # JAX has announced its removal
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        from jax.experimental.pallas import triton
except ImportError:
    triton = None  # type: ignore[assignment]

BLOCK = 64
"""Slots that a program reads at a time."""
LEAST_ROWS = 16
"""Rows of a tensor-core instruction, to which the queries of a head are padded."""
WIDTHS = (16, 32, 64, 128, 256)
"""Supported features of a head: Triton's blocks are powers of two, and more would spill registers."""
MOST_PARTS = 8
"""Most parts of a head's slots; XLA adds them one by one."""
LOWEST = -1e30
"""Score that counts for nothing; finite, so that differences of two are numbers."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Conversion of the product of a query and a key to a score.

    The product is multiplied by ``scale``; then, if there is a ``softcap``, the score becomes
    ``softcap * tanh(score / softcap)``.
    """

    scale: float
    softcap: float | None = None


def supported(device: Device, width: int, dtype: jnp.dtype) -> bool:
    """True if target and JAX support the kernel for heads of ``width`` features and a cache of ``dtype``."""
    known = device.platform == "cuda" and device.compute_capability in (None, *CAPABILITIES)
    known = known and all(hasattr(triton, name) for name in ("CompilerParams", "load", "store", "dot"))
    return known and width in WIDTHS and dtype in (jnp.bfloat16, jnp.float32)


def parts_of(device: Device, heads: int, slots: int) -> int:
    """Number of programs that share a head's slots, for ``heads`` heads of all samples."""
    parts, idle = 1, (device.processors or 108) // heads
    while 2 * parts <= min(idle, MOST_PARTS, slots // BLOCK):
        parts *= 2
    return parts


def attend(
    token: Float[Array, "b qkv"],
    rotation: Float[Array, "b 2 d"] | None,
    keys: Float[Array, "b kv s d"],
    values: Float[Array, "b kv s d"],
    positions: Int[Array, "b"],
    slot_positions: Int[Array, "b s"],
    start: Int[Array, ""],
    window: Int[Array, ""],
    *,
    scores: Scores,
    parts: int,
    interpret: bool = False,
) -> tuple[Float[Array, "b hd"], Float[Array, "b kv s d"], Float[Array, "b kv s d"]]:
    """``softmax(scale * q k^T) v`` over the slots at or before each query's position, the new one included.

    Operands of products are in the cache's dtype, sums in float32.

    Args:
      token: queries of all ``h`` heads of the new token, its keys and its values, side by side, as one
        product returns them; head ``i`` reads key-value head ``i // (h // kv)``.
      rotation: factors for each feature of its queries and keys, and for the feature half a head away, whose
        products are added: `slim_jax.model.rotary.Rotation.by_feature`. None if they need no rotation.
      keys: keys of all slots.
      values: values of all slots.
      positions: position of the new token; -1 for padding, whose output means nothing.
      slot_positions: position of the token in each slot, the new one included; -1 in empty slots.
      start: the slot of the new token, the last that is in use.
      window: number of positions that a query sees, its own included.
      scores: conversion of products to scores.
      parts: programs for a head, see :func:`parts_of`.
      interpret: run by the Pallas interpreter, on any platform.

    Returns:
      Outputs of the heads side by side, in float32; keys; and values. The last two are the arguments' own
      memory, in which one slot has been written.
    """
    batch, kv, _, d = keys.shape
    heads = token.shape[1] // d - 2 * kv
    share = heads // kv
    rows = max(LEAST_ROWS, pl.next_power_of_2(share))
    if rotation is None:
        rotation = jnp.stack([jnp.ones((batch, d)), jnp.zeros((batch, d))], axis=1)
    like = (token, rotation, keys, values)
    sums = (batch, kv, parts, rows)
    one, top, total, keys, values = pl.pallas_call(
        partial(_body, scores=scores, parts=parts, share=share, rows=rows),
        out_shape=[
            result_type((*sums, d), like),
            result_type(sums, like),
            result_type(sums, like),
            jax.typeof(keys),
            jax.typeof(values),
        ],
        grid=(batch, kv, parts),
        input_output_aliases={6: 3, 7: 4},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        name="attend",
        interpret=interpret,
    )(start[None], window[None], positions, slot_positions, token, rotation, keys, values)
    return _together(one, top, total)[:, :, :share].reshape(batch, heads * d), keys, values


def _together(one: jax.Array, top: jax.Array, total: jax.Array) -> jax.Array:
    """Combines the parts ``[..., parts, rows, d]`` of a softmax.

    It is written out part by part, as sums that XLA can fuse into the next launch.
    """
    each = [(one[:, :, i], top[:, :, i], total[:, :, i]) for i in range(one.shape[2])]
    highest = each[0][1]
    for _, own, _ in each[1:]:
        highest = jnp.maximum(highest, own)
    above = below = jnp.float32(0)
    for values, own, count in each:
        weight = jnp.exp(own - highest)
        above, below = above + weight[..., None] * values, below + weight * count
    return above / jnp.maximum(below, jnp.finfo(jnp.float32).tiny)[..., None]


def _body(  # type: ignore[no-untyped-def]
    start, window, positions, slot_positions, token, rotation, old_keys, old_values, one, top, total, keys,
    values, *, scores: Scores, parts: int, share: int, rows: int,
) -> None:  # fmt: skip
    """Processes one part of the slots of one head: partial sums, and the new slot if it is in this part."""
    sample, head, part = (pl.program_id(axis) for axis in range(3))
    new, slots, width = start[0], old_keys.shape[2], old_keys.shape[3]
    dtype, position, visible_for = old_keys.dtype, positions[sample], window[0]
    q, k, v = _new(token, rotation, old_keys, share, rows)

    def block_of(ref, own, at, slot):
        found = triton.load(ref.at[sample, head, pl.ds(at, BLOCK)], mask=(slot < slots)[:, None], other=0)
        return jnp.where((slot == new)[:, None], own, found)  # no program waits for the write

    def add(i, sums):
        acc, highest, count = sums
        at = (part + i * parts) * BLOCK
        slot = at + jnp.arange(BLOCK)
        score = _dot(q, block_of(old_keys, k, at, slot).T) * scores.scale
        if scores.softcap is not None:
            score = scores.softcap * jnp.tanh(score / scores.softcap)
        place = triton.load(slot_positions.at[sample, pl.ds(at, BLOCK)], mask=slot < slots, other=-1)
        ago = position - place
        seen = ((place >= 0) & (ago >= 0) & (ago < visible_for))[None]
        score = jnp.where(seen, score, LOWEST)
        now = jnp.maximum(highest, jnp.max(score, axis=1))
        weight = jnp.where(seen, jnp.exp(score - now[:, None]), 0)
        kept = jnp.exp(highest - now)
        acc = acc * kept[:, None] + _dot(weight.astype(dtype), block_of(old_values, v, at, slot))
        return acc, now, count * kept + jnp.sum(weight, axis=1)

    last = lax.div(new, BLOCK)
    nothing = (jnp.zeros((rows, width)), jnp.full((rows,), LOWEST), jnp.zeros((rows,)))
    times = lax.div(last - part + parts, parts)  # blocks of this part, up to the last
    acc, highest, count = lax.fori_loop(0, times, add, nothing)
    one[sample, head, part], top[sample, head, part], total[sample, head, part] = acc, highest, count
    own = jnp.full((1, width), lax.rem(last, parts) == part)
    for ref, row in ((keys, k), (values, v)):
        triton.store(ref.at[sample, head, pl.ds(new, 1)], row, mask=own)


def _new(token, rotation, keys, share, rows):  # type: ignore[no-untyped-def]
    """The new token's queries ``[rows, d]`` for the program's head, and its key and value ``[1, d]``."""
    (sample, head), (_, kv, _, width), dtype = map(pl.program_id, range(2)), keys.shape, keys.dtype
    feature, row = jnp.arange(width)[None], jnp.arange(rows)[:, None]
    away = jnp.where(feature < width // 2, feature + width // 2, feature - width // 2)
    cos, sin = (rotation[sample, pl.ds(i, 1)] for i in range(2))

    def turned(first, **mask):
        own = triton.load(token.at[sample, first + feature], **mask)
        return own * cos + triton.load(token.at[sample, first + away], **mask) * sin

    in_use = jnp.broadcast_to(row < share, (rows, width))
    own = kv * share + head  # index of the head's key
    q = turned((head * share + row) * width, mask=in_use, other=0)
    v = triton.load(token.at[sample, (own + kv) * width + feature])
    return tuple(a.astype(dtype) for a in (q, turned(own * width), v))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return triton.dot(a, b, allow_tf32=False)
