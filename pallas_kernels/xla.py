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

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.layout import MixedTensor, vary_like
from pallas_kernels.planes import WORD_BITS
from pallas_kernels.prepared import Prepared, prepare

# Above this many rows, unpacking once is cheaper than masking every word once per row.
DECODE_ROWS = 8
# Independent sums per output: in one chain, every addition would wait for the one before.
CHAINS = 16


def mixed_matmul(x: Float[Array, "M K"], w: MixedTensor | Prepared) -> Float[Array, "M N"]:
    """``x @ W``, accumulated in float32; see :func:`pallas_kernels.mixed_matmul`."""
    if x.shape[0] <= DECODE_ROWS:
        return decode(x, w if isinstance(w, Prepared) else prepare(w))
    return prefill(x, w.weight() if isinstance(w, Prepared) else w)


def prefill(x: Float[Array, "M K"], w: MixedTensor) -> Float[Array, "M N"]:
    """The dense product with the dequantized weight, in ``w.dtype``."""
    return jnp.dot(x.astype(w.dtype), w.dequantize(), preferred_element_type=jnp.float32)


def decode(x: Float[Array, "M K"], w: Prepared) -> Float[Array, "M N"]:
    """The product without a dense weight, in float32 whatever its dtype is."""
    tensor, (m, k) = w.tensor, x.shape
    groups, g = tensor.groups, tensor.group_size
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, groups * g - k))).reshape(m, groups, g)
    x_sum = x.sum(-1)
    y = vary_like(jnp.zeros((m, w.shape[1]), jnp.float32), (x, tensor))
    for i, n in enumerate(w.steps):
        y = _add_planes(y, x * _slot_factors(g, n)[None, None], x_sum, w, n, i)
    return y


def _add_planes(
    y: jax.Array, x_MxGxg: jax.Array, x_sum: jax.Array, w: Prepared, n: int, index: int
) -> jax.Array:
    """Adds what all planes of width ``n`` contribute to ``y[M, N]``."""
    words, scale, rows = w.tensor.words, w.tensor.scale, w.tensor.group_size * n // WORD_BITS
    layer = jnp.int32(0) if w.layer is None else w.layer
    n_groups = scale.shape[-2]
    # Layers one under the other, so that a step's place is a row and nothing is sliced before the loop.
    scale, zero = (a.reshape(-1, a.shape[-1]) for a in (scale, w.zero))
    steps, factors = (a[n].reshape(-1, a[n].shape[-1]) for a in (w.steps, w.factors))
    first = layer * w.steps[n].shape[-2]
    count = w.counts.reshape(-1, w.counts.shape[-1])[layer, index]

    def body(t: jax.Array, y: jax.Array) -> jax.Array:
        group, position, row = (steps[first + t, i] for i in range(3))
        plane = lax.dynamic_slice_in_dim(words, row, rows)
        dot = factors[first + t, 0] * _plane_dot(x_MxGxg[:, group], plane, n)
        position = layer * n_groups + position
        zeros = (factors[first + t, 1] * x_sum[:, group])[:, None] * zero[position].astype(jnp.float32)[None]
        return y + scale[position].astype(jnp.float32)[None] * (dot - zeros)

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
