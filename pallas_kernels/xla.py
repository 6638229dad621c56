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

import dataclasses
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
    return decode_prepared(x, prepare(w))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tensor", "zero", "steps", "factors", "counts", "layer"],
    meta_fields=["shape"],
)
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A packed weight, or a stack of ``L`` layers, with all that decoding would work out of it every time.

    A *step* is one plane of one group. Attributes with ``L`` lack that axis for a single weight.

    Attributes:
      tensor: the packed weight.
      zero: ``uint8[L, G, N]``, a zero code a byte.
      steps: of each plane width, ``int32[L, S, 3]``: a step's group, its place in storage, its first row.
      factors: of each plane width, ``float32[L, S, 2]``: what bit 0 of the plane is worth in the code, and
        a unit of the zero code (0 except in the low plane, so that a group's zero point counts once).
      counts: ``int32[L, widths]``, how many of a width's steps there are.
      layer: which of the stack to multiply with; None for a single weight.
      shape: ``(K, N)``.
    """

    tensor: MixedTensor
    zero: jax.Array
    steps: dict[int, jax.Array]
    factors: dict[int, jax.Array]
    counts: jax.Array
    layer: jax.Array | None
    shape: tuple[int, int]

    def at(self, layer: jax.Array) -> "Prepared":
        """One layer of the stack: nothing is sliced, products read its part where it lies."""
        return dataclasses.replace(self, layer=layer)

    def weight(self) -> MixedTensor:
        """The packed weight, of a stack that of the layer."""
        if self.layer is None:
            return self.tensor
        return jax.tree.map(partial(lax.dynamic_index_in_dim, index=self.layer, keepdims=False), self.tensor)


def prepare(w: MixedTensor) -> Prepared:
    """Works out what does not depend on ``x``; leaves may be stacked on a leading axis."""
    if w.words.ndim == 3:
        return jax.vmap(prepare)(w)
    # A width whose group would need more words than there are does not occur.
    widths = [b for b in w.widths if w.group_size * b // WORD_BITS <= w.words.shape[0]]
    tables = {n: _steps(w, n) for n in sorted({n for b in widths for n in plane_widths(b)})}
    return Prepared(
        tensor=w,
        zero=w.zero_codes(),
        steps={n: steps for n, (steps, _, _) in tables.items()},
        factors={n: factors for n, (_, factors, _) in tables.items()},
        counts=jnp.stack([count for _, _, count in tables.values()]),
        layer=None,
        shape=w.shape,
    )


class _Run(NamedTuple):
    """Planes that lie ``stride`` rows apart: the ``start``-th to the next run's, of all planes of a width."""

    start: jax.Array  # scalars, int32
    position: jax.Array  # of the first plane's group, in storage order
    row: jax.Array  # of the first plane, in words
    stride: int
    factor: float  # what bit 0 of the plane is worth in the code
    zero_step: float


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


def _steps(w: MixedTensor, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``steps``, ``factors`` and the count of :class:`Prepared` for planes of width ``n``."""
    runs, count = _runs(w, n)
    most = w.groups * max(plane_widths(b).count(n) for b in w.widths)
    t = jnp.arange(most, dtype=jnp.int32)
    run = runs[0]
    for later in runs[1:]:
        run = jax.tree.map(partial(jnp.where, t >= later.start), later, run)
    within = t - run.start
    position = jnp.minimum(run.position + within, w.groups - 1)
    steps = jnp.stack([w.order[position], position, run.row + within * run.stride], axis=1)
    factors = [jnp.broadcast_to(jnp.float32(value), (most,)) for value in (run.factor, run.zero_step)]
    return steps, jnp.stack(factors, axis=1), count


def decode_prepared(x: Float[Array, "M K"], w: Prepared) -> Float[Array, "M N"]:
    """As :func:`decode`."""
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
    n_rows, n_groups = words.shape[-2], scale.shape[-2]
    # Layers one under the other, so that a step's place is a row and nothing is sliced before the loop.
    words, scale, zero = (a.reshape(-1, a.shape[-1]) for a in (words, scale, w.zero))
    steps, factors = (a[n].reshape(-1, a[n].shape[-1]) for a in (w.steps, w.factors))
    first = layer * w.steps[n].shape[-2]
    count = w.counts.reshape(-1, w.counts.shape[-1])[layer, index]

    def body(t: jax.Array, y: jax.Array) -> jax.Array:
        group, position, row = (steps[first + t, i] for i in range(3))
        plane = lax.dynamic_slice_in_dim(words, layer * n_rows + row, rows)
        dot = factors[first + t, 0] * _plane_dot(x_MxGxg[:, group], plane, n)
        position = layer * n_groups + position
        zero_sum = (factors[first + t, 1] * x_sum[:, group])[:, None] * zero[position].astype(jnp.float32)[None]
        return y + scale[position].astype(jnp.float32)[None] * (dot - zero_sum)

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
