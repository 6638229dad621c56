"""GPTQ: rounding column by column, with each column's error fed forward to the columns after it.

Arrays in, arrays out; the pipeline handles models and files. In the paper's notation the weight is
``[N, K]`` and columns are rounded; here it is ``[K, N]`` as layers use it, so that a "column" (an
input channel) is a row in memory, and the layers that share an input are concatenated along ``N``.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import scales
from slim_jax.method.scale_search import FITS, Grid
from slim_jax.method.scale_search import scale_dtype as default_scale_dtype
from slim_jax.placement import ONE_DEVICE, Placement


class Solution(NamedTuple):
    """A quantized weight in the terms of `pallas_kernels.pack`.

    Attributes:
      code: ``uint8[K, N]``.
      scale: ``[G, N]``, ``uint8`` (`pallas_kernels.scales`) or ``bfloat16``.
      zero: ``float32[G, N]``, in units of the scale.
    """

    code: jax.Array
    scale: jax.Array
    zero: jax.Array

    def part(self, channels: slice) -> "Solution":
        """Returns the solution of one of several layers that were concatenated and solved together."""
        return Solution(*(leaf[:, channels] for leaf in self))

    def weight(self) -> jax.Array:
        """Dequantized weight, ``float32[K, N]``."""
        g = self.code.shape[0] // self.scale.shape[0]
        scale = jnp.repeat(scales.decoded(self.scale), g, axis=0)
        return scale * (self.code.astype(jnp.float32) - jnp.repeat(self.zero, g, axis=0))


def _round_group(w: jax.Array, u: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Rounds a group ``w [g, N]`` with its block ``[g, g]`` of ``U``; returns codes and scaled errors."""

    def column(j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
        w, codes, errors = state
        row = w[j]
        code = grid.code(row)
        error = (row - grid.value(code)) / u[j, j]  # OBS error of column j
        return w - u[j][:, None] * error[None, :], codes.at[j].set(code), errors.at[j].set(error)

    _, codes, errors = lax.fori_loop(0, w.shape[0], column, (w, jnp.zeros_like(w), jnp.zeros_like(w)))
    return codes, errors


@partial(jax.jit, static_argnames=("group_size", "zero_bits", "sqc", "feedback", "scale_dtype", "placement"))
def solve(
    w: Float[Array, "k n"],
    u: Float[Array, "k k"],
    importance: Float[Array, " k"],
    bits: Float[Array, "g n"],
    *,
    group_size: int,
    zero_bits: int,
    sqc: str,
    feedback: bool = True,
    scale_dtype: jnp.dtype | None = None,
    placement: Placement = ONE_DEVICE,
) -> Solution:
    """Quantizes a weight, or several concatenated along ``N``, group by group.

    Each group's grid is fitted to its weights after the errors of the groups before it have been fed
    forward to them. ``K`` must be a multiple of ``group_size`` (pad ``w`` with zeros, ``u`` with ones
    on the diagonal).

    Args:
      w: weights.
      u: upper Cholesky factor of the inverse Hessian (`slim_jax.method.hessian.inverse_cholesky`).
      importance: weight of each channel's squared error in the fit, ``1 / u_j^2``; 0 for padding.
      bits: bit width of every group and output channel.
      group_size: channels per group.
      zero_bits: bits of a stored zero point.
      sqc: a name of `slim_jax.method.scale_search.FITS`.
      feedback: if False, weights are rounded to nearest and errors are not fed forward.
      scale_dtype: dtype of the stored scales; `slim_jax.method.scale_search.scale_dtype` if None.
      placement: the chips that split the output channels.
    """

    dtype = default_scale_dtype(sqc) if scale_dtype is None else scale_dtype

    def panel(whole: tuple[jax.Array, jax.Array], channels: tuple[jax.Array, jax.Array]) -> Solution:
        (u, importance), (w, bits) = whole, channels

        def group(w: jax.Array, index: jax.Array):
            start = index * group_size
            block = lax.dynamic_slice_in_dim(w, start, group_size)
            rows = lax.dynamic_slice_in_dim(u, start, group_size)
            weight = lax.dynamic_slice_in_dim(importance, start, group_size)
            grid = FITS[sqc](block, weight, bits[index], zero_bits, dtype)
            if feedback:
                diagonal_block = lax.dynamic_slice_in_dim(rows, start, group_size, axis=1)
                codes, errors = _round_group(block, diagonal_block, grid)
                w = w - rows.T @ errors
            else:
                codes = grid.code(block)
            return w, (codes.astype(jnp.uint8), scales.stored(grid.scale, dtype), grid.zero)

        _, (codes, scale, zero) = lax.scan(group, w, jnp.arange(w.shape[0] // group_size))
        return Solution(codes.reshape(w.shape), scale, zero)

    return placement.over_panels(panel, (u, importance), (w, bits))
