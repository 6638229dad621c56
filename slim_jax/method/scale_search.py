"""SQC: searches the scale and zero point of each group so that salient weights keep their value.

Every function fits one group ``w [g, N]`` at once, for all output channels; the bit width is data
(``[N]``), so one compiled program serves every allocation. A fit returns the values that will be stored: a
scale in eight bits (`pallas_kernels.scales`), or in bfloat16 for the paper's calibration and where eight bits
do not suffice (:func:`bytes_hold`), and a zero point on the grid of its code (`pallas_kernels.layout`).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from pallas_kernels import MixedTensor, scales

CLIP_FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Fractions of the group's range that the default search tries."""

ZERO_SHIFTS = (-0.5, 0.0, 0.5)
"""Shifts of the zero point, in units of the scale, that it tries with each fraction."""

REFINEMENTS = 2
"""Rounds of re-rounding and refitting after the default search."""

STARTS = tuple((factor, shift) for factor in CLIP_FACTORS for shift in ZERO_SHIFTS)
COARSE_STARTS = tuple((factor, 0.0) for factor in CLIP_FACTORS[::2])
"""Starts of the coarse search, which only estimates the costs of widths (`slim_jax.method.budget`): it takes
a fifth of the time, and its errors are 2 to 12 % larger, at each width by nearly the same percentage."""


class Grid(NamedTuple):
    """The quantization grid of one group: ``w_hat = scale * (code - zero)``.

    Attributes:
      scale: ``float32[N]``, as it will be stored.
      zero: ``float32[N]``, a multiple of ``2**(b - zero_bits)``.
      levels: ``float32[N]``, the largest code, ``2**b - 1``.
    """

    scale: jax.Array
    zero: jax.Array
    levels: jax.Array

    def code(self, w: Float[Array, "*g n"]) -> Float[Array, "*g n"]:
        """Returns the nearest code of each weight, an integer as float32."""
        scale, zero, levels = (_over_rows(value, w.ndim) for value in self)
        return jnp.clip(jnp.round(w / scale + zero), 0.0, levels)

    def value(self, code: Float[Array, "*g n"]) -> Float[Array, "*g n"]:
        """Returns the weight that each code stands for."""
        scale, zero, _ = (_over_rows(value, code.ndim) for value in self)
        return scale * (code - zero)


def stored_grids(tensor: MixedTensor) -> Grid:
    """Returns the grids ``[G, N]`` of a packed weight, with groups in the order of the input channels."""
    original = jnp.argsort(tensor.order)
    levels = 2.0 ** jnp.asarray(tensor.widths, jnp.float32) - 1
    levels = jnp.repeat(levels, tensor.segments, total_repeat_length=tensor.groups)[original]
    scale = tensor.scales()[original]
    return Grid(scale, tensor.zero_points()[original], jnp.broadcast_to(levels[:, None], scale.shape))


def _over_rows(value: jax.Array, ndim: int) -> jax.Array:
    """Reshapes ``[N]`` to ``[1, ..., N]``, since implicit rank promotion is an error."""
    return value.reshape((1,) * (ndim - 1) + (-1,))


Fit = Callable[[jax.Array, jax.Array, jax.Array, int, DTypeLike], Grid]
"""``fit(w [g, N], importance [g], bits [N], zero_bits, scale_dtype) -> Grid``."""


def scale_dtype(sqc: str) -> jnp.dtype:
    """Returns the dtype of the scales that a calibration in :data:`FITS` fits, provided eight bits hold them:
    bfloat16 for "paper", which reproduces the authors' choices, otherwise uint8."""
    return jnp.dtype(jnp.bfloat16 if sqc == "paper" else jnp.uint8)


COARSER = 1.25
"""Largest factor by which the smallest 8-bit scale may raise the squared error of an output channel."""


@partial(jax.jit, static_argnames="group_size")
def bytes_hold(w: Float[Array, "k n"], bits: Float[Array, " g"], *, group_size: int) -> Bool[Array, ""]:
    """True if eight bits can represent the scales that a layer's weights need.

    They can if no group needs a larger scale than `pallas_kernels.scales.LARGEST`, and if the smallest,
    `pallas_kernels.scales.SMALLEST`, multiplies the squared error of no output channel by more than
    :data:`COARSER`. A group needs a scale of its range over its levels. At 1 to 3 bits, however, fits clip
    the range: the scale that they find for a Gaussian at 2 bits is near 1.2 times the root mean square, and
    every further bit halves it, so the smaller of the two counts. Groups whose range is below 2**-24 of the
    layer's largest weight count as zeros.

    Args:
      w: the weights, ``K`` a multiple of ``group_size``.
      bits: width of every group.
      group_size: channels per group.
    """
    largest = jnp.max(jnp.abs(w))
    unit = jnp.where(largest > 0, largest, 1.0)
    blocks = (w / unit).reshape(-1, group_size, w.shape[1])
    spread = jnp.maximum(blocks.max(axis=1), 0.0) - jnp.minimum(blocks.min(axis=1), 0.0)
    over_levels = spread / (jnp.exp2(bits) - 1)[:, None]
    deviation = jnp.sqrt(jnp.mean(blocks**2, axis=1))
    wanted = jnp.minimum(over_levels, 1.2 * jnp.exp2(2 - bits)[:, None] * deviation)
    wanted = jnp.where(spread > 2.0**-24, wanted, 0.0)
    given = jnp.where(wanted > 0, jnp.maximum(wanted, scales.SMALLEST / unit), 0.0)
    coarser = jnp.sum(given**2, axis=0) > COARSER * jnp.sum(wanted**2, axis=0)
    return ~(jnp.any(coarser) | jnp.any(over_levels > scales.LARGEST / unit))


def _stored(
    scale: jax.Array,
    zero: jax.Array,
    bits: jax.Array,
    zero_bits: int,
    dtype: DTypeLike = jnp.uint8,
) -> Grid:
    """Returns the grid nearest to ``(scale, zero)`` that can be stored."""
    step = jnp.exp2(bits - zero_bits)
    code = jnp.clip(jnp.round(zero / step), 0.0, 2.0**zero_bits - 1)
    return Grid(scales.rounded(jnp.maximum(scale, 1e-30), dtype), code * step, jnp.exp2(bits) - 1)


def _range(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest weight of each channel, 0 included; -1 and 1 where all are 0."""
    low, high = jnp.minimum(w.min(axis=0), 0.0), jnp.maximum(w.max(axis=0), 0.0)
    empty = (low == 0) & (high == 0)
    return jnp.where(empty, -1.0, low), jnp.where(empty, 1.0, high)


def _min_max(w: jax.Array, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, high = _range(w)
    scale = (high - low) / (jnp.exp2(bits) - 1)
    return scale, -low / scale


def _better(error: jax.Array, grid: Grid, best: tuple[jax.Array, Grid]) -> tuple[jax.Array, Grid]:
    best_error, best_grid = best
    keep = error < best_error
    chosen = jax.tree.map(lambda new, old: jnp.where(keep, new, old), grid, best_grid)
    return jnp.where(keep, error, best_error), chosen


def fit_min_max(
    w: jax.Array,
    importance: jax.Array,
    bits: jax.Array,
    zero_bits: int,
    dtype: DTypeLike = jnp.uint8,
) -> Grid:
    """Fits the range of the weights, with an integer zero point: the usual grid of GPTQ and round-to-nearest.

    8-bit scales are rounded up, so that no weight lies outside. At 1 bit, where the ends of the range would
    be the only values, the values are the authors' ``mean(w) +- mean|w|``.
    """
    scale, zero = _min_max(w, bits)
    if dtype == jnp.uint8:
        wider = scales.decoded(scales.encoded(scale, up=True))
        scale, zero = wider, zero * scale / wider
    grid = _stored(scale, jnp.round(zero), bits, zero_bits, dtype)
    real = (importance > 0).astype(jnp.float32)[:, None]
    count = jnp.maximum(jnp.sum(real), 1.0)  # the sum is 0 if all inputs of a group are dead
    mean = jnp.sum(w * real, axis=0) / count
    alpha = jnp.maximum(jnp.sum(jnp.abs(w) * real, axis=0) / count, 1e-30)
    binary = _stored(2 * alpha, 0.5 - mean / (2 * alpha), bits, zero_bits, dtype)
    return jax.tree.map(lambda one, many: jnp.where(bits == 1, one, many), binary, grid)


def _refit(w: jax.Array, importance: jax.Array, code: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Scale and zero that minimize ``sum_j importance_j (w_j - scale (code_j - zero))^2``, codes fixed; those
    of ``grid`` where the codes do not determine a positive scale."""
    total = jnp.sum(importance)
    weight = (importance / jnp.where(total > 0, total, 1.0))[:, None]
    mean_code, mean_w = jnp.sum(weight * code, axis=0), jnp.sum(weight * w, axis=0)
    offset = code - mean_code[None]
    centred = weight * offset
    variance = jnp.sum(centred * offset, axis=0)
    scale = jnp.sum(centred * (w - mean_w[None]), axis=0) / jnp.maximum(variance, 1e-12)
    usable = (variance > 1e-12) & (scale > 0)
    scale = jnp.where(usable, scale, grid.scale)
    return scale, jnp.where(usable, mean_code - mean_w / scale, grid.zero)


def fit_search(
    w: jax.Array,
    importance: jax.Array,
    bits: jax.Array,
    zero_bits: int,
    dtype: DTypeLike = jnp.uint8,
    starts: tuple[tuple[float, float], ...] = STARTS,
) -> Grid:
    """Minimizes ``sum_j importance_j (w_j - w_hat_j)^2`` over clip factors, scale and zero point.

    For each clip factor and shift of the zero point, the codes are fixed and the scale and zero point are
    solved for by weighted least squares (the zero point may be fractional). The best result, as stored, is
    rounded and refitted :data:`REFINEMENTS` more times.
    """
    scale, zero = _min_max(w, bits)

    def error(grid: Grid, code: jax.Array) -> jax.Array:
        return jnp.sum(importance[:, None] * (w - grid.value(code)) ** 2, axis=0)

    def refine(grid: Grid, best: tuple[jax.Array, Grid]) -> tuple[jax.Array, Grid]:
        refined = _stored(*_refit(w, importance, grid.code(w), grid), bits, zero_bits, dtype)
        return _better(error(refined, refined.code(w)), refined, best)

    def attempt(best: tuple[jax.Array, Grid], start: jax.Array) -> tuple[tuple[jax.Array, Grid], None]:
        grid = _stored(start[0] * scale, zero + start[1], bits, zero_bits, dtype)
        return refine(grid, best), None

    start = _stored(scale, zero, bits, zero_bits, dtype)
    best = (error(start, start.code(w)), start)
    best, _ = jax.lax.scan(attempt, best, jnp.asarray(starts, jnp.float32))
    return jax.lax.fori_loop(0, REFINEMENTS, lambda _, best: refine(best[1], best), best)[1]


def fit_paper(
    w: jax.Array,
    importance: jax.Array,
    bits: jax.Array,
    zero_bits: int,
    dtype: DTypeLike = jnp.bfloat16,
) -> Grid:
    """Fits as the authors' code does (with their repository's settings, not those of the paper's text).

    It tries 101 clip factors in [0.9, 1.1], minimizes the unweighted ``sum |w - w_hat|^2.4``, and uses an
    integer zero point; the values of a 1-bit group are ``mean(w) +- mean(|w|)``.
    """
    real = importance > 0
    low, high = _range(w)
    levels = jnp.exp2(bits) - 1

    def try_clip(best: tuple[jax.Array, Grid], factor: jax.Array) -> tuple[tuple[jax.Array, Grid], None]:
        scale = (factor * high - factor * low) / levels
        grid = _stored(scale, jnp.round(-factor * low / scale), bits, zero_bits, dtype)
        miss = jnp.abs(w - grid.value(grid.code(w)))
        return _better(jnp.sum(jnp.where(real[:, None], miss**2.4, 0.0), axis=0), grid, best), None

    up, down = jnp.linspace(1.0, 1.1, 51)[1:], jnp.linspace(1.0, 0.9, 51)[1:]
    least = fit_min_max(w, importance, bits, zero_bits, dtype)
    start = (jnp.full(w.shape[1:], jnp.inf), least)
    (_, grid), _ = jax.lax.scan(try_clip, start, jnp.concatenate([jnp.ones(1), up, down]))
    return jax.tree.map(lambda one, many: jnp.where(bits == 1, one, many), start[1], grid)


FITS: dict[str, Fit] = {
    "search": fit_search,
    "coarse": partial(fit_search, starts=COARSE_STARTS),
    "paper": fit_paper,
    "minmax": fit_min_max,
}
"""Calibrations by name: those that :class:`slim_jax.config.SlimConfig` takes as ``sqc``, and "coarse"."""
