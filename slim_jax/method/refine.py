"""Coordinate-descent passes over a solved weight: scales, zero points and codes, under the whole Hessian.

GPTQ rounds every channel once and in order, to a grid that was fitted before the later channels were rounded.
Afterwards each of these choices can be made again with all others fixed. With ``D = W_hat - W [K, N]`` and
the damped Hessian ``H``, the squared error ``tr(D^T H D)`` is a parabola in any single scale, zero point or
weight. Coordinate descent moves it to the best value that can be stored, or leaves it. No step raises the
error.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import scales
from slim_jax.method.gptq import Solution
from slim_jax.placement import ONE_DEVICE, Placement


@partial(jax.jit, static_argnames=("group_size", "zero_bits", "passes", "placement"))
def refine(
    w: Float[Array, "k n"],
    h: Float[Array, "k k"],
    solution: Solution,
    bits: Float[Array, "g n"],
    *,
    group_size: int,
    zero_bits: int,
    passes: int,
    placement: Placement = ONE_DEVICE,
) -> Solution:
    """Returns a solution with the same bits and a squared error ``tr(D^T H D)`` that is no larger.

    Args:
      w: the weight that was solved, ``K`` a multiple of ``group_size``.
      h: damped Hessian; its rows and columns are zero for padding and for inputs that are always zero,
        which therefore keep their codes.
      solution: from `slim_jax.method.gptq.solve`.
      bits: bit width of every group and output channel.
      group_size: channels per group.
      zero_bits: bits of a stored zero point.
      passes: number of passes over all groups.
      placement: the chips that split the output channels.
    """

    def panel(h: jax.Array, channels: tuple[jax.Array, Solution, jax.Array]) -> Solution:
        return _refine(h, *channels, group_size, zero_bits, passes)

    return placement.over_panels(panel, h, (w, solution, bits))


def _refine(
    h: jax.Array,
    w: jax.Array,
    solution: Solution,
    bits: jax.Array,
    group_size: int,
    zero_bits: int,
    passes: int,
) -> Solution:
    step, levels, dtype = jnp.exp2(bits - zero_bits), jnp.exp2(bits) - 1, solution.scale.dtype

    def group(state: tuple[jax.Array, jax.Array, jax.Array, jax.Array], index: jax.Array):
        gradient, codes, all_scales, zeros = state
        start = index * group_size
        rows = lax.dynamic_slice_in_dim(h, start, group_size)
        own = lax.dynamic_slice_in_dim(rows, start, group_size, axis=1)
        code = lax.dynamic_slice_in_dim(codes, start, group_size)
        scale, zero = all_scales[index], zeros[index]
        before = scale[None] * (code - zero[None])
        slope = lax.dynamic_slice_in_dim(gradient, start, group_size)
        scale, slope = _better_scale(own, slope, code - zero[None], scale, dtype)
        zero, slope = _better_zero(own, slope, scale, zero, step[index], zero_bits)
        code = _better_codes(own, slope, code, scale, levels[index])
        gradient = gradient + rows.T @ (scale[None] * (code - zero[None]) - before)
        codes = lax.dynamic_update_slice_in_dim(codes, code, start, axis=0)
        return (gradient, codes, all_scales.at[index].set(scale), zeros.at[index].set(zero)), None

    def one_pass(_: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array, jax.Array]):
        return lax.scan(group, state, jnp.arange(bits.shape[0]))[0]

    start = solution.code.astype(jnp.float32), scales.decoded(solution.scale), solution.zero
    state = (h @ (solution.weight() - w), *start)
    _, codes, scale, zeros = lax.fori_loop(0, passes, one_pass, state)
    return Solution(codes.astype(jnp.uint8), scales.stored(scale, dtype), zeros)


def _step(slope: jax.Array, curvature: jax.Array) -> jax.Array:
    """Step to the lowest point of ``slope d + curvature d^2 / 2``; 0 where the curvature is not positive."""
    return jnp.where(curvature > 0, -slope / jnp.where(curvature > 0, curvature, 1.0), 0.0)


def _better_scale(
    own: jax.Array, slope: jax.Array, offset: jax.Array, scale: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Best scale ``[N]`` for ``offset = code - zero [g, N]``, and the slopes ``[g, N]`` after the change."""
    moved = own @ offset
    along, curvature = jnp.sum(offset * slope, axis=0), jnp.sum(offset * moved, axis=0)
    found = scales.rounded(scale + _step(along, curvature), dtype)
    change = found - scale
    lowers = change * along + 0.5 * change**2 * curvature < 0
    change = jnp.where(lowers & (found > 0.25 * scale), change, 0.0)
    return scale + change, slope + moved * change[None]


def _better_zero(
    own: jax.Array, slope: jax.Array, scale: jax.Array, zero: jax.Array, step: jax.Array, zero_bits: int
) -> tuple[jax.Array, jax.Array]:
    """Best zero point ``[N]`` that is a multiple of ``step``, and the slopes ``[g, N]`` after the change."""
    moved = jnp.sum(own, axis=1)
    along, curvature = -scale * jnp.sum(slope, axis=0), scale**2 * jnp.sum(moved)
    found = jnp.round((zero + _step(along, curvature)) / step)
    change = jnp.clip(found, 0.0, 2.0**zero_bits - 1) * step - zero
    lowers = change * along + 0.5 * change**2 * curvature < 0
    change = jnp.where(lowers, change, 0.0)
    return zero + change, slope - moved[:, None] * (scale * change)[None]


def _better_codes(
    own: jax.Array, slope: jax.Array, code: jax.Array, scale: jax.Array, levels: jax.Array
) -> jax.Array:
    """Best codes ``[g, N]``, found for one channel after another."""

    def channel(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        slope, code = state
        found = jnp.clip(jnp.round(code[j] + _step(slope[j], own[j, j]) / scale), 0.0, levels)
        return slope + own[:, j][:, None] * (scale * (found - code[j]))[None], code.at[j].set(found)

    return lax.fori_loop(0, code.shape[0], channel, (slope, code))[1]
