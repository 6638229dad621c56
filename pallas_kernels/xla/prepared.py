"""Packed weights prepared for the XLA back end: a table of the steps of the multiplication loop."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import MixedTensor, exported, zero_step
from pallas_kernels.planes import WORD_BITS, plane_widths, shifted_planes
from pallas_kernels.prepared import Tiles, fit_together, side_by_side, static

TILE = 4096
"""Most columns of a tile: the sums that a step updates stay in the nearest cache."""
LEAST_TILE = 32
"""Least columns of a tile: with fewer, the overhead of a step would be noticeable."""


@exported
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(Tiles):
    """Prepared weights with a table of steps; a step is one plane of one group in one tile.

    Attributes:
      steps: ``int32[L, S, 5]``: plane (index in ``planes``), group, first row, row of scales and tile of a
        step.
      factors: ``float32[L, S, 2]``: the value of the plane's bit 0 in the code, and of one unit of the zero
        code (0 except in the lowest plane, so that a group's zero point counts once).
      counts: ``int32[L]``, the number of steps.
      planes: the widths of planes that occur; static.
    """

    implementation: ClassVar[str] = "xla"

    steps: jax.Array
    factors: jax.Array
    counts: jax.Array
    planes: tuple[int, ...] = static()


def joinable(weights: Sequence[MixedTensor]) -> bool:
    """True if weights that read the same input can be one product."""
    return fit_together(weights) and _tile([w.shape[1] for w in weights]) >= LEAST_TILE


def prepare(*weights: MixedTensor, in_place: bool = False) -> Steps:
    """Prepares weights that read the same input: computes all that does not depend on ``x``.

    Args:
      weights: the packed weights.
      in_place: if True, words keep their layout; for a single product with one weight.
    """
    return prepare_stack([weights], in_place=in_place)


def prepare_stack(
    layers: Sequence[Sequence[MixedTensor]], *, in_place: bool = False, consume: bool = False
) -> Steps:
    """:func:`prepare` for layers that differ only in values of their leaves and rows of words.

    Args:
      layers: the weights of each layer.
      in_place: see :func:`prepare`.
      consume: see :func:`pallas_kernels.prepared.side_by_side`.
    """
    first = layers[0]
    width = first[0].shape[1] if in_place else _tile([w.shape[1] for w in first])
    common = side_by_side(layers, width, consume=consume)
    tiles = np.array([w.shape[1] // width for w in first])
    first_tiles = np.arange(len(layers))[:, None] * tiles.sum() + np.cumsum(tiles) - tiles
    # A width whose group would need more words than there are does not occur.
    widths = {
        b for w, most in zip(first, common["rows"]) for b in w.widths if w.group_size * b <= most * WORD_BITS
    }
    planes = tuple(sorted({n for b in widths for n in plane_widths(b)}))
    table = jax.jit(jax.vmap(partial(_table, planes=planes, tiles=tiles)))
    first_tiles = jnp.asarray(first_tiles, jnp.int32)
    steps, factors, counts = table(common["tensors"], common["first_rows"], first_tiles)
    return Steps(**common, steps=steps, factors=factors, counts=counts, planes=planes)


def _tile(sizes: Sequence[int]) -> int:
    """Columns of a tile: the largest common divisor up to :data:`TILE`, or all if that is below 512."""
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
    """``steps``, ``factors`` and ``counts`` of :class:`Steps` for one layer."""
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
    """Planes of one width that lie ``stride`` rows apart.

    Numbered among all planes of the width, a run goes from ``start`` to before the next run's ``start``.
    """

    start: jax.Array  # scalars, int32
    position: jax.Array  # of the first plane's group, in storage order
    row: jax.Array  # of the first plane, in words
    stride: int
    factor: float  # value of the plane's bit 0 in the code
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
