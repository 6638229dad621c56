"""Packed weights made ready to be multiplied many times by the XLA back end.

What a product works out of the weights alone (where each plane lies, what its codes are worth, zero codes a
byte each) is the same for every token, so a model that generates works it out once. Weights that read one
input become one product here, each with bits and an order of groups of its own. Nothing here is stored.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.layout import MixedTensor, stack, zero_step
from pallas_kernels.planes import WORD_BITS, plane_widths, shifted_planes

TILE = 4096
"""Columns of a tile at most: what a step adds to stays in the nearest cache."""
LEAST_TILE = 32
"""Columns of a tile at least; with fewer, a step's own work would show."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scale", "zero", "steps", "factors", "counts", "first_rows", "tensors", "layer"],
    meta_fields=["planes", "rows", "stacked"],
)
@dataclasses.dataclass(frozen=True)
class Prepared:
    """Packed weights ``[K, N_i]`` that read one input, or a stack of ``L`` layers of them, side by side.

    Output channels are cut into tiles of ``T``. A *step* is one plane of one group in one tile; all that it
    reads is adjacent in memory. ``L`` is 1 where nothing is stacked.

    Attributes:
      words: ``uint32[R, T]``: tiles one under the other, of each weight of each layer; nothing at the end.
      scale: ``[L * tiles * G, T]``, as the weights have them, in the same order.
      zero: ``uint8[L * tiles * G, T]``, a zero code a byte.
      steps: ``int32[L, S, 5]``: a step's plane (of ``planes``), group, first row, row of its scales, tile.
      factors: ``float32[L, S, 2]``: what bit 0 of the plane is worth in the code, and a unit of the zero
        code (0 except in the low plane, so that a group's zero point counts once).
      counts: ``int32[L]``, how many of the steps there are.
      first_rows: ``int32[L, weights, 2]``, where in the words a weight begins, and the rows of its tiles.
      tensors: the weights, stacked on an axis ``L``, without words and scales.
      layer: which of the stack to multiply with; None for the only one.
      planes: the widths of planes that occur; static.
      rows: of words, of each weight, in the layer that has most; static.
      stacked: whether layers are stacked; static.
    """

    words: jax.Array
    scale: jax.Array
    zero: jax.Array
    steps: jax.Array
    factors: jax.Array
    counts: jax.Array
    first_rows: jax.Array
    tensors: tuple[MixedTensor, ...]
    layer: jax.Array | None
    planes: tuple[int, ...]
    rows: tuple[int, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``(K, N)``, all weights side by side."""
        return self.tensors[0].shape[0], sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """``N`` of each weight."""
        return tuple(w.shape[1] for w in self.tensors)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the dequantized weights."""
        return self.tensors[0].dtype

    def at(self, layer: jax.Array) -> "Prepared":
        """One layer of the stack: nothing is sliced, products read its part where it lies."""
        return dataclasses.replace(self, layer=layer)

    def weights(self) -> list[MixedTensor]:
        """The packed weights, of a stack those of the layer."""
        layer = jnp.int32(0) if self.layer is None else self.layer
        one = partial(lax.dynamic_index_in_dim, index=layer, keepdims=False)
        width = self.words.shape[1]
        groups, found, first_tile = self.tensors[0].groups, [], layer * (self.shape[1] // width)
        for i, rest in enumerate(self.tensors):
            n, (first, own) = rest.shape[1] // width, one(self.first_rows)[i]
            tiles = [lax.dynamic_slice_in_dim(self.words, first + j * own, self.rows[i]) for j in range(n)]
            scale = lax.dynamic_slice_in_dim(self.scale, first_tile * groups, n * groups)
            scale = scale.reshape(n, groups, width).swapaxes(0, 1).reshape(groups, n * width)
            leaves = {name: one(getattr(rest, name)) for name in ("zero", "order", "segments")}
            words = tiles[0] if n == 1 else jnp.concatenate(tiles, axis=1)
            found.append(dataclasses.replace(rest, words=words, scale=scale, **leaves))
            first_tile = first_tile + n
        return found

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The dense weights ``[K, N]``, side by side."""
        return jnp.concatenate([w.dequantize(dtype) for w in self.weights()], axis=1)

    def columns(self, index: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """``dequantize(dtype)[:, index]`` as ``[*index.shape, K]`` of one weight that is not stacked."""
        (rest,), (rows,), width = self.tensors, self.rows, self.words.shape[1]
        flat = index.reshape(-1)
        tile, column = flat // width, flat % width

        def pick(a: jax.Array, count: int) -> jax.Array:
            return a[tile[None] * count + jnp.arange(count)[:, None], column[None]]

        some = dataclasses.replace(
            jax.tree.map(lambda leaf: leaf[0], rest),
            words=pick(self.words, rows),
            scale=pick(self.scale, rest.groups),
            zero=rest.zero[0][:, flat],
            shape=(rest.shape[0], flat.size),
        )
        return some.dequantize(dtype).T.reshape(*index.shape, rest.shape[0])


def joinable(weights: Sequence[MixedTensor]) -> bool:
    """Whether weights that read one input can be one product."""
    kinds = {(w.shape[0], w.group_size, w.scale.dtype, w.dtype) for w in weights}
    return len(kinds) == 1 and _tile([w.shape[1] for w in weights]) >= LEAST_TILE


def prepare(*weights: MixedTensor, in_place: bool = False) -> Prepared:
    """Works out what does not depend on ``x``, of weights that read one input.

    ``in_place``: words are left as they lie, for a single product with one weight.
    """
    return prepare_stack([weights], in_place=in_place)


def prepare_stack(layers: Sequence[Sequence[MixedTensor]], *, in_place: bool = False) -> Prepared:
    """:func:`prepare` for layers that are alike but for the values of their leaves and the rows of words.

    Args:
      layers: of each, its weights.
      in_place: see :func:`prepare`.
    """
    first = layers[0]
    width = first[0].shape[1] if in_place else _tile([w.shape[1] for w in first])
    rows = np.array([[w.words.shape[0] for w in layer] for layer in layers])
    tiles = np.array([w.shape[1] // width for w in first])
    ends = np.cumsum(rows * tiles).reshape(rows.shape)
    first_rows = jnp.asarray(np.stack([ends - rows * tiles, rows], axis=-1), jnp.int32)
    first_tiles = np.arange(len(layers))[:, None] * tiles.sum() + np.cumsum(tiles) - tiles

    def tiled(a: jax.Array) -> jax.Array:
        count = a.shape[1] // width
        return a if count == 1 else a.reshape(len(a), count, width).swapaxes(0, 1).reshape(-1, width)

    def joined(parts: list[jax.Array]) -> jax.Array:
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    words = [tiled(w.words) for layer in layers for w in layer]
    if rows.size > 1:  # the last tiles are read as if they had as many rows as any
        words.append(jnp.zeros((rows.max(), width), jnp.uint32))
    bare = [[dataclasses.replace(w, words=w.words[:0], scale=w.scale[:0]) for w in layer] for layer in layers]
    tensors = tuple(stack(same) for same in zip(*bare))
    # A width whose group would need more words than there are does not occur.
    widths = {
        b for w, most in zip(first, rows.max(0)) for b in w.widths if w.group_size * b <= most * WORD_BITS
    }
    planes = tuple(sorted({n for b in widths for n in plane_widths(b)}))
    table = partial(_table, planes=planes, tiles=tiles)
    steps, factors, counts = jax.vmap(table)(tensors, first_rows, jnp.asarray(first_tiles, jnp.int32))
    return Prepared(
        words=joined(words),
        scale=joined([tiled(w.scale) for layer in layers for w in layer]),
        zero=joined([tiled(w.zero_codes()) for layer in layers for w in layer]),
        steps=steps,
        factors=factors,
        counts=counts,
        first_rows=first_rows,
        tensors=tensors,
        layer=None,
        planes=planes,
        rows=tuple(rows.max(axis=0).tolist()),
        stacked=len(layers) > 1,
    )


def _tile(sizes: Sequence[int]) -> int:
    """Columns of a tile: the greatest common divisor up to :data:`TILE` that is not small, or all."""
    whole = math.gcd(*sizes)
    divisors = [whole // i for i in range(1, whole + 1) if whole % i == 0 and whole // i <= TILE]
    return divisors[0] if divisors[0] >= min(whole, 512) else whole


def _table(
    weights: Sequence[MixedTensor],
    first_rows: jax.Array,
    first_tiles: jax.Array,
    *,
    planes: tuple[int, ...],
    tiles: np.ndarray,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``steps``, ``factors`` and ``counts`` of :class:`Prepared` for one layer."""
    steps, factors, real = [], [], []
    for i, w in enumerate(weights):
        used = [k for k, n in enumerate(planes) if any(n in plane_widths(b) for b in w.widths)]
        parts = [_steps(w, planes[k]) for k in used]
        group, position, row = jnp.concatenate([found for found, _, _ in parts]).T
        kind = jnp.concatenate([jnp.full(len(found), k, jnp.int32) for k, (found, _, _) in zip(used, parts)])
        exists = jnp.concatenate([jnp.arange(len(found)) < count for found, _, count in parts])
        for tile in range(int(tiles[i])):
            first = first_rows[i, 0] + tile * first_rows[i, 1]
            scales = (first_tiles[i] + tile) * w.groups
            place = jnp.full_like(kind, int(tiles[:i].sum()) + tile)
            steps.append(jnp.stack([kind, group, row + first, position + scales, place], axis=1))
            factors.append(jnp.concatenate([values for _, values, _ in parts]))
            real.append(exists)
    exists = jnp.concatenate(real)
    order = jnp.argsort(~exists, stable=True)
    return jnp.concatenate(steps)[order], jnp.concatenate(factors)[order], exists.sum(dtype=jnp.int32)


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
        for plane, shift in shifted_planes(b):
            if plane == n:
                row = first_row[i] + w.group_size * shift // WORD_BITS
                step = zero_step(b, w.widths) if shift == 0 else 0.0
                stride = w.group_size * b // WORD_BITS
                runs.append(_Run(count, first_position[i], row, stride, 2.0**shift, step))
                count = count + w.segments[i]
    return runs, count


def _steps(w: MixedTensor, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Group, position and first row ``int32[S, 3]``, ``factors`` and the count of planes of width ``n``."""
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
