"""The matmul in plain XLA: runs on every platform, and is the reference for the other back ends.

There are two regimes. *Prefill* dequantizes the weight and computes one dense product: many rows share the
cost of unpacking. *Decode*, for a few rows on CPUs only, never dequantizes: memory traffic is the packed
words, and each masked row of words is multiplied and added to the result at once,

    y = sum over groups of  scale * (x_g . code_g - zero * sum(x_g)).

XLA's CPU back end (jax 0.12) determines the shape of the decode loop: a ``while`` whose body holds only
elementwise operations becomes one vectorised kernel without overhead per iteration, while the same body with
a dot or a sort in it, or outside a loop, runs five times slower. Everything else that is launched costs a
microsecond or more. So a product is one loop over its steps, the body computes all that a step needs, and the
steps are distributed over a few such loops, which an executor may run at the same time (that of jaxlib 0.12
on two cores does not: it runs independent programs one after another).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import scales
from pallas_kernels.layout import MixedTensor, vary_like
from pallas_kernels.planes import WORD_BITS
from pallas_kernels.prepared import Prepared
from pallas_kernels.xla.prepared import Steps, prepare

# Above this many rows, unpacking once is cheaper than masking every word once per row.
DECODE_ROWS = 8
# Loops of a product; the executor may run each on its own thread.
LOOPS = 2
# Independent sums per output: in a single chain, every addition would wait for the previous one.
CHAINS = 16


def is_decode(rows: Any) -> bool:
    """True if CPUs compute a product of so many rows of ``x`` as decode; False for a symbolic number."""
    return isinstance(rows, int) and rows <= DECODE_ROWS


def mixed_matmul(x: Float[Array, "M K"], w: MixedTensor | Prepared) -> Float[Array, "M N"]:
    """``x @ W``, accumulated in float32; see :func:`pallas_kernels.mixed_matmul`."""
    if is_decode(x.shape[0]) and isinstance(w, Steps | MixedTensor):
        return lax.platform_dependent(x, w, cpu=_decode, default=_dense)
    return _dense(x, w)


def _decode(x: jax.Array, w: Steps | MixedTensor) -> jax.Array:
    return decode(x, w if isinstance(w, Steps) else prepare(w, in_place=True))


def _dense(x: jax.Array, w: MixedTensor | Prepared) -> jax.Array:
    if isinstance(w, Prepared):
        x = x if w.norm is None else w.norm(x)
        return jnp.concatenate([prefill(x, one) for one in w.weights()], axis=1)
    return prefill(x, w)


def prefill(x: Float[Array, "M K"], w: MixedTensor) -> Float[Array, "M N"]:
    """The dense product with the dequantized weight, in ``w.dtype``."""
    return jnp.dot(x.astype(w.dtype), w.dequantize(), preferred_element_type=jnp.float32)


def decode(x: Float[Array, "M K"], w: Steps) -> Float[Array, "M N"]:
    """The product without a dense weight, in float32 whatever the weight's dtype."""
    one, (m, k) = w.tensors[0], x.shape
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, one.groups * one.group_size - k)))
    x = x.reshape(m, one.groups, one.group_size)
    loops = min(LOOPS, w.steps.shape[1])
    y = [_add_steps(x, w, i, loops) for i in range(loops)]
    return sum(y[1:], y[0])


def _add_steps(x_MxGxg: jax.Array, w: Steps, first: int, stride: int) -> jax.Array:
    """The contribution to ``y[M, N]`` of every ``stride``-th step, from step ``first`` on."""
    layer = jnp.int32(0) if w.layer is None else w.layer
    m, width, g = x_MxGxg.shape[0], w.words.shape[1], w.tensors[0].group_size

    # Indices are never negative; checking would be a separate program for each.
    at = partial(lax.dynamic_slice, allow_negative_indices=False)

    def more(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return first + carry[0] * stride < at(w.counts, (layer,), (1,))[0]

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        t, y = carry
        i = first + t * stride
        kind, group, row, position, tile = at(w.steps, (layer, i, 0), (1, 1, 5))[0, 0]
        factor, zero_unit = at(w.factors, (layer, i, 0), (1, 1, 2))[0, 0]
        x = at(x_MxGxg, (0, group, 0), (m, 1, g))[:, 0]
        dots = [
            lambda n=n: _plane_dot(x, at(w.words, (row, 0), (g * n // WORD_BITS, width)), n) for n in w.planes
        ]
        dot = dots[0]() if len(dots) == 1 else lax.switch(kind, dots)
        zero = lax.dynamic_slice_in_dim(w.zero, position, 1).astype(jnp.float32)
        scale = scales.decoded(lax.dynamic_slice_in_dim(w.scale, position, 1))
        add = scale * (factor * dot - zero_unit * _row_sums(x)[:, None] * zero)
        before = at(y, (0, tile * width), (m, width))
        return t + 1, lax.dynamic_update_slice(
            y, before + add, (0, tile * width), allow_negative_indices=False
        )

    # The barrier gives each loop its own zeros and count; loops that share constants would copy them.
    t, y, _ = lax.optimization_barrier(
        (jnp.int32(0), jnp.zeros((m, w.shape[1]), jnp.float32), jnp.int32(first))
    )
    return lax.while_loop(more, body, (t, vary_like(y, (x_MxGxg, w))))[1]


def _row_sums(x: jax.Array) -> jax.Array:
    """``x.sum(-1)`` as sums of single columns: a few scalar operations, where a reduction would be a loop."""
    sums = [x[:, i] for i in range(x.shape[1])]
    while len(sums) > 1:  # an odd one is kept for the next pass
        sums = [*(a + b for a, b in zip(sums[::2], sums[1::2])), *sums[len(sums) // 2 * 2 :]]
    return sums[0]


def _plane_dot(x: jax.Array, words: jax.Array, n: int) -> jax.Array:
    """``x[M, g] . plane[g, N]``, unrolled.

    Codes are masked in place, unshifted, and ``x`` is multiplied by ``2**-(n * slot)`` instead; only the last
    slot is shifted (a mask would leave the sign bit set).
    """
    slots, rows = WORD_BITS // n, words.shape[0]
    sums: list[jax.Array] = []
    for j in range(rows):
        for s in range(slots):
            last = s == slots - 1
            code = words[j] >> np.uint32(n * s) if last else words[j] & np.uint32(((1 << n) - 1) << (n * s))
            factor = x[:, s * rows + j, None] * np.float32(1.0 if last else 2.0 ** (-n * s))
            # Through int32, which every CPU converts in one instruction.
            term = factor * code.astype(jnp.int32).astype(jnp.float32)[None]
            chain = (j * slots + s) % CHAINS
            if chain == len(sums):
                sums.append(term)
            else:
                sums[chain] += term
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2])]
    return sums[0]
