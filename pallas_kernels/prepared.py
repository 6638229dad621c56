"""A packed weight made ready to be multiplied many times by the XLA back end.

What a product works out of the weight alone (where each plane lies, what its codes are worth, zero codes a
byte each) is the same for every token, so a model that generates works it out once. Nothing here is stored.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.layout import MixedTensor, stack, zero_step
from pallas_kernels.planes import WORD_BITS, plane_widths


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tensor", "zero", "steps", "factors", "counts", "first_rows", "layer"],
    meta_fields=["rows"],
)
@dataclasses.dataclass(frozen=True)
class Prepared:
    """A packed weight, or a stack of ``L`` layers, with all that decoding would work out of it every time.

    A *step* is one plane of one group. Attributes with ``L`` lack that axis for a single weight.

    Attributes:
      tensor: the packed weight; of a stack, leaves have an axis ``L`` except ``words``, where the layers lie
        one under the other, as many rows as each has, and ``rows`` of nothing at the end.
      zero: ``uint8[L, G, N]``, a zero code a byte.
      steps: of each plane width, ``int32[L, S, 3]``: a step's group, its place in storage, its first row.
      factors: of each plane width, ``float32[L, S, 2]``: what bit 0 of the plane is worth in the code, and
        a unit of the zero code (0 except in the low plane, so that a group's zero point counts once).
      counts: ``int32[L, widths]``, how many of a width's steps there are.
      first_rows: ``int32[L]``, where in the words a layer of the stack begins; None for a single weight.
      layer: which of the stack to multiply with; None for a single weight.
      rows: of words, of the layer that has most; static.
    """

    tensor: MixedTensor
    zero: jax.Array
    steps: dict[int, jax.Array]
    factors: dict[int, jax.Array]
    counts: jax.Array
    first_rows: jax.Array | None
    layer: jax.Array | None
    rows: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(K, N)``."""
        return self.tensor.shape

    def at(self, layer: jax.Array) -> "Prepared":
        """One layer of the stack: nothing is sliced, products read its part where it lies."""
        return dataclasses.replace(self, layer=layer)

    def weight(self) -> MixedTensor:
        """The packed weight, of a stack that of the layer."""
        if self.layer is None or self.first_rows is None:
            return self.tensor
        one = partial(lax.dynamic_index_in_dim, index=self.layer, keepdims=False)
        words = lax.dynamic_slice_in_dim(self.tensor.words, one(self.first_rows), self.rows)
        rest = dataclasses.replace(self.tensor, words=self.tensor.zero)
        return dataclasses.replace(jax.tree.map(one, rest), words=words)


def prepare(w: MixedTensor) -> Prepared:
    """Works out what does not depend on ``x``."""
    # A width whose group would need more words than there are does not occur.
    widths = [b for b in w.widths if w.group_size * b // WORD_BITS <= w.words.shape[0]]
    tables = {n: _steps(w, n) for n in sorted({n for b in widths for n in plane_widths(b)})}
    return Prepared(
        tensor=w,
        zero=w.zero_codes(),
        steps={n: steps for n, (steps, _, _) in tables.items()},
        factors={n: factors for n, (_, factors, _) in tables.items()},
        counts=jnp.stack([count for _, _, count in tables.values()]),
        first_rows=None,
        layer=None,
        rows=w.words.shape[0],
    )


def prepare_stack(layers: Sequence[MixedTensor]) -> Prepared:
    """:func:`prepare` for layers that are alike but for the values of their leaves and the rows of words."""
    counts = [w.words.shape[0] for w in layers]
    most, n = max(counts), layers[0].words.shape[1]
    stacked = jax.vmap(prepare)(stack(layers))
    first_rows = jnp.asarray(np.cumsum([0, *counts[:-1]]), jnp.int32)
    words = jnp.concatenate([*(w.words for w in layers), jnp.zeros((most, n), jnp.uint32)])
    return dataclasses.replace(
        stacked,
        tensor=dataclasses.replace(stacked.tensor, words=words),
        steps={n: steps.at[:, :, 2].add(first_rows[:, None]) for n, steps in stacked.steps.items()},
        first_rows=first_rows,
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
