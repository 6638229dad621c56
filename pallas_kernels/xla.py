"""The matmul in plain XLA: runs on every platform, and is the reference for the other back ends.

Two regimes, chosen by the number of rows of ``x``, which is static. *Prefill* makes the dense weight and
takes one product: the cost of unpacking is shared by many rows. *Decode* never makes it: memory traffic
is the packed words, and each masked row of words is multiplied into the result at once,

    y = sum over groups of  scale * (x_g . code_g - zero * sum(x_g)).

The shape of the decode loop is decided by XLA's CPU back end (jax 0.12): a ``while`` whose body holds
only elementwise work becomes one vectorised kernel that pays nothing per iteration, while the same body
with a dot or a sort in it, or outside a loop, runs five times slower. So there is one loop per *plane*
width, with a dynamic trip count; what differs between groups is scalars computed in its body.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.layout import WORD_BITS, MixedTensor, plane_widths, vary_like, zero_step

# Above this many rows, unpacking once is cheaper than masking every word once per row.
DECODE_ROWS = 8
# Independent sums per output: in one chain, every addition would wait for the one before.
CHAINS = 16


def mixed_matmul(x: Float[Array, "M K"], w: MixedTensor) -> Float[Array, "M N"]:
    """``x @ W``, accumulated in float32; see :func:`pallas_kernels.mixed_matmul`."""
    return decode(x, w) if x.shape[0] <= DECODE_ROWS else prefill(x, w)


def prefill(x: Float[Array, "M K"], w: MixedTensor) -> Float[Array, "M N"]:
    """The dense product with the dequantized weight, in ``w.dtype``."""
    return jnp.dot(x.astype(w.dtype), w.dequantize(), preferred_element_type=jnp.float32)


def decode(x: Float[Array, "M K"], w: MixedTensor) -> Float[Array, "M N"]:
    """The product without a dense weight, in float32 whatever ``w.dtype`` is."""
    m, k = x.shape
    g = w.group_size
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, w.groups * g - k))).reshape(m, w.groups, g)
    zero_code = w.zero_codes()
    y = vary_like(jnp.zeros((m, w.shape[1]), jnp.float32), (x, w))
    # A width whose group would need more words than there are does not occur.
    widths = [b for b in w.widths if w.group_size * b // WORD_BITS <= w.words.shape[0]]
    for n in sorted({n for b in widths for n in plane_widths(b)}):
        y = _add_planes(y, x, w, zero_code, n)
    return y


class _Run(NamedTuple):
    """Planes that lie ``stride`` rows apart: the ``start``-th to the next run's, of all planes of a width."""

    start: jax.Array  # scalars, int32
    position: jax.Array  # of the first plane's group, in storage order
    row: jax.Array  # of the first plane, in words
    stride: int
    factor: float  # what bit 0 of the plane is worth in the code
    zero_step: float  # 0 except in the low plane, so that a group's zero point counts once


def _runs(w: MixedTensor, n: int) -> tuple[list[_Run], jax.Array]:
    """The runs of planes of width ``n``, and the number of these planes."""
    first_position, first_row = w.segment_starts()
    runs, count = [], jnp.int32(0)
    for i, b in enumerate(w.widths):
        shift = 0
        for plane in plane_widths(b):
            if plane == n:
                row = first_row[i] + w.group_size * shift // WORD_BITS
                step = zero_step(b, w.widths) if shift == 0 else 0.0
                stride = w.group_size * b // WORD_BITS
                runs.append(_Run(count, first_position[i], row, stride, 2.0**shift, step))
                count = count + w.segments[i]
            shift += plane
    return runs, count


def _add_planes(y: jax.Array, x_MxGxg: jax.Array, w: MixedTensor, zero_code: jax.Array, n: int) -> jax.Array:
    """Adds what all planes of width ``n`` contribute to ``y[M, N]``."""
    runs, count = _runs(w, n)
    x_slots = x_MxGxg * _slot_factors(w.group_size, n)[None, None]
    x_sum = x_MxGxg.sum(-1)

    def body(t: jax.Array, y: jax.Array) -> jax.Array:
        run = runs[0]
        for later in runs[1:]:
            run = jax.tree.map(partial(jnp.where, t >= later.start), later, run)
        position = run.position + t - run.start
        group = w.order[position]
        row = run.row + (t - run.start) * run.stride
        words = lax.dynamic_slice_in_dim(w.words, row, w.group_size * n // WORD_BITS)
        dot = run.factor * _plane_dot(x_slots[:, group], words, n)
        zero = (run.zero_step * x_sum[:, group])[:, None] * zero_code[position].astype(jnp.float32)[None]
        return y + w.scale[position].astype(jnp.float32)[None] * (dot - zero)

    return lax.fori_loop(0, count, body, y)


def _slot_factors(group_size: int, n: int) -> np.ndarray:
    """``float32[g]``: ``2**-(n * slot)`` for every channel, since codes are masked where they lie, unshifted.

    The last slot is shifted instead (a mask would leave the sign bit set); its factor is 1.
    """
    slots = WORD_BITS // n
    factors = 2.0 ** (-n * np.arange(slots))
    factors[-1] = 1.0
    return np.repeat(factors, group_size // slots).astype(np.float32)


def _plane_dot(x: jax.Array, words: jax.Array, n: int) -> jax.Array:
    """``x[M, g] . plane[g, N]``, unrolled; ``x`` carries the slot factors."""
    slots, rows = WORD_BITS // n, words.shape[0]
    sums: list[jax.Array] = []
    for j in range(rows):
        for s in range(slots):
            last = s == slots - 1
            code = words[j] >> np.uint32(n * s) if last else words[j] & np.uint32(((1 << n) - 1) << (n * s))
            # Through int32, which every CPU converts in one instruction.
            term = x[:, s * rows + j, None] * code.astype(jnp.int32).astype(jnp.float32)[None]
            chain = (j * slots + s) % CHAINS
            if chain == len(sums):
                sums.append(term)
            else:
                sums[chain] += term
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2])]
    return sums[0]
