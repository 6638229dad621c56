"""Unpacks codes from words in TPU registers; see "Unpacking" and "Order" in `pallas_kernels.tpu.decode`."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.planes import WORD_BITS
from pallas_kernels.tpu.config import SUBLANES


def bit_of(t):
    """Bit at which the codes in register ``t`` of a group begin in their fields: 0 or 2."""
    return 2 * (t % 2)


def unpack(ref, row, piece, group_size: int, field: int, late) -> jax.Array:
    """One piece of the group at ``row``, ``[g, 128]``: int8 ``q << bit`` or bfloat16 ``128 + (q << bit)``.

    ``late(constant)`` returns the constant behind a scheduling barrier: as soon as work may begin.
    """
    repeat = 0x00010001 if field == 16 else 0x01010101
    registers = group_size * field // WORD_BITS // SUBLANES
    codes: list = [None] * registers
    for n, shift in piece:
        rows, above, first = group_size * n // WORD_BITS, shift % 4, row + group_size * shift // WORD_BITS
        words = [_load(ref, first + t * SUBLANES, rows, n, late) for t in range(max(1, rows // SUBLANES))]
        shifted: dict[tuple[int, int], jax.Array] = {}
        for t in range(registers):
            part, slot = t % len(words), t // len(words)
            by = slot * n * max(1, SUBLANES // rows) - bit_of(t) - above
            if (part, by) not in shifted:
                shifted[part, by] = _shift(words[part], by, late)
            code = shifted[part, by] & late(np.uint32((((1 << n) - 1) << (bit_of(t) + above)) * repeat))
            codes[t] = code if codes[t] is None else codes[t] | code
    if field == 16:
        return jnp.concatenate([pltpu.bitcast(c | np.uint32(0x43004300), jnp.bfloat16) for c in codes])
    return jnp.concatenate([pltpu.bitcast(c, jnp.int8) for c in codes])


def _shift(words, by: int, late):
    if by == 0:
        return words
    return words >> late(np.uint32(by)) if by > 0 else words << late(np.uint32(-by))


def _load(ref, row, rows: int, n: int, late) -> jax.Array:
    """8 rows of a plane of ``n`` bits.

    If a group has fewer ``rows``, they are repeated, and each copy is shifted one slot further.
    """
    words = ref[pl.ds(row, SUBLANES), :]
    if rows >= SUBLANES:
        return words
    sublane = lax.broadcasted_iota(jnp.int32, words.shape, 0)
    for k in range(1, SUBLANES // rows):
        words = jnp.where(late(sublane) < k * rows, words, ref[pl.ds(row - k * rows, SUBLANES), :])
    return words >> late((lax.div(sublane, rows) * n).astype(jnp.uint32))
