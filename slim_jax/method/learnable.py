"""Method "slim-plus": trains a block's quantization by gradient descent until the block's output matches.

Bit widths stay as SBA chose them. ``learn`` names the learned parameters:

* "clip", the paper's SliM-LLM+: how far the range of each group and channel is clipped; weights are rounded
  to nearest on the grid that results;
* "rounding", the default, which is not in the paper: the scale, zero point and codes, each starting from the
  solver's.

Rounding passes gradients straight through (the derivative of ``round`` is taken as 1). The loss is computed
on the values that will be stored: scales in eight bits, or in bfloat16 if the solver's were, and zero points
on the grid of their codes.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import MixedTensor, pack, scales
from pallas_kernels.layout import zero_bits
from slim_jax.method.hessian import low_discrepancy
from slim_jax.method.scale_search import Grid, stored_grids
from slim_jax.model.block import sequence_positions
from slim_jax.model.config import DecoderConfig
from slim_jax.model.linear import COMPUTE_DTYPE
from slim_jax.model.params import Params, block_params, make_block

CLIP_START = 4.0
"""The paper's initial clipping parameter: ``sigmoid(4) = 0.982`` of the range."""

MARGIN = 0.4
"""Largest distance of a learned code's start from the solver's code; at 0.5 it would round to the next."""

Learned = dict[str, dict[str, jax.Array]]
"""Learned parameters of each layer, by its name in the block: see the functions that end in ``_start``."""


class ClipRange(NamedTuple):
    """Values that "clip" clips: the full-precision weight ``[G, g, N]``, and the ends of its range
    ``[G, 1, N]``."""

    weight: jax.Array
    low: jax.Array
    high: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    meta_fields=["zero_bits", "scale_dtype"],
    data_fields=["bits", "clip"],
)
@dataclasses.dataclass(frozen=True)
class Layer:
    """Values of a layer that training does not change; ``K`` is padded to whole groups, ``[G, g, N]``.

    Attributes:
      bits: ``[G, 1, 1]``, width of every group.
      zero_bits: bits of a stored zero point, static.
      scale_dtype: dtype of the stored scales, static.
      clip: for "clip"; None where codes are learned.
    """

    bits: jax.Array
    zero_bits: int
    scale_dtype: jnp.dtype
    clip: ClipRange | None = None


def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """Returns ``rounded`` with the gradient of ``x``."""
    return x + lax.stop_gradient(rounded - x)


def stored_grid(scale: jax.Array, zero: jax.Array, layer: Layer) -> Grid:
    """The grid as it will be stored, differentiable in ``scale`` and ``zero``."""
    scale = jnp.maximum(scale, 1e-30)
    step = jnp.exp2(layer.bits - layer.zero_bits)
    zero_code = jnp.clip(zero / step, 0.0, 2.0**layer.zero_bits - 1)
    return Grid(
        straight_through(scale, scales.rounded(scale, layer.scale_dtype)),
        straight_through(zero_code, jnp.round(zero_code)) * step,
        jnp.exp2(layer.bits) - 1,
    )


def quantized(learned: Mapping[str, jax.Array], layer: Layer) -> tuple[jax.Array, Grid]:
    """Codes ``[G, g, N]``, integers as float32, and the grid ``[G, 1, N]``, both differentiable."""
    if layer.clip is not None:
        weight, low, high = layer.clip
        offset = jnp.where(layer.bits == 1, learned["offset"], 0.0)
        high = jax.nn.sigmoid(learned["up"]) * high + offset
        low = jax.nn.sigmoid(learned["down"]) * low + offset
        scale = (high - low) / (jnp.exp2(layer.bits) - 1)
        zero = -low / scale
        # As in the paper's code, weights of 0 stay 0; the two values of a 1-bit group may lie anywhere.
        zero = jnp.where(layer.bits == 1, zero, straight_through(zero, jnp.round(zero)))
        grid = stored_grid(scale, zero, layer)
        code = weight / grid.scale + grid.zero
    else:
        grid = stored_grid(jnp.exp(learned["log_scale"]), learned["zero"], layer)
        code = learned["code"]
    code = jnp.clip(code, 0.0, grid.levels)
    return straight_through(code, jnp.round(code)), grid


@partial(jax.jit, static_argnames=("zero_bits", "scale_dtype"))
def clip_start(
    w: jax.Array, bits: jax.Array, *, zero_bits: int, scale_dtype: jnp.dtype
) -> tuple[dict[str, jax.Array], Layer]:
    """Initial clipping parameters for full-precision weights ``[G, g, N]``; they clip little.

    A 1-bit group's range is ``mean -+ mean|w - mean|``, its two values, and ``offset`` shifts both.
    """
    one = bits == 1
    mean = jnp.mean(w, axis=1, keepdims=True)
    deviation = jnp.mean(jnp.abs(w - mean), axis=1, keepdims=True)
    low = jnp.where(one, mean - deviation, jnp.minimum(jnp.min(w, axis=1, keepdims=True), 0.0))
    high = jnp.where(one, mean + deviation, jnp.maximum(jnp.max(w, axis=1, keepdims=True), 0.0))
    high = jnp.where(low == high, low + 1.0, high)
    gamma = jnp.full_like(low, CLIP_START)
    learned = {"up": gamma, "down": gamma, "offset": jnp.zeros_like(low)}
    return learned, Layer(bits, zero_bits, scale_dtype, ClipRange(w, low, high))


def undecided(scale: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Scales that are stored as the same values as the given ones.

    8-bit scales are replaced by ones that are evenly spread over the interval that is stored as the same
    value. Otherwise no stored scale would change until its parameter has moved by half a step, and then all
    would change at once.
    """
    if dtype != jnp.uint8:
        return scale
    shares = jnp.asarray(low_discrepancy(scale.size).reshape(scale.shape), jnp.float32)
    return scales.within(scales.encoded(scale), shares)


@jax.jit
def solved_start(tensor: MixedTensor, w: jax.Array, bits: jax.Array) -> tuple[dict[str, jax.Array], Layer]:
    """Initial scales, zero points and codes, all as the solver chose them.

    A code starts at the weight's own place on the grid, but within ``MARGIN`` of the solver's code, so that
    it rounds to the solver's code and the weights closest to a rounding border cross it first.
    """
    groups, g, n = w.shape
    codes = jnp.pad(tensor.codes().astype(jnp.float32), ((0, groups * g - tensor.shape[0]), (0, 0)))
    code = codes.reshape(groups, g, n)
    scale, zero, _ = (value[:, None] for value in stored_grids(tensor))
    return {
        "log_scale": jnp.log(undecided(scale, tensor.scale.dtype)),
        "zero": zero,
        "code": code + jnp.clip(w / scale + zero - code, -MARGIN, MARGIN),
    }, Layer(bits, zero_bits(tensor.widths), tensor.scale.dtype)


def dense_weights(learned: Learned, layers: Mapping[str, Layer]) -> dict[str, jax.Array]:
    """Quantized weight ``[K', N]`` of every layer, padded to whole groups, differentiable."""
    out = {}
    for name, layer in layers.items():
        code, grid = quantized(learned[name], layer)
        w = grid.scale * (code - grid.zero)
        out[name] = w.reshape(-1, w.shape[-1])
    return out


def pack_learned(learned: Mapping[str, jax.Array], layer: Layer, like: MixedTensor) -> MixedTensor:
    """Packs the weight that the loss was computed on, with the shape and widths of ``like``."""
    code, grid = quantized(learned, layer)
    step = jnp.exp2(layer.bits - layer.zero_bits)
    k, n = like.shape
    return pack(
        np.asarray(code, np.uint8).reshape(-1, n)[:k],
        np.asarray(scales.stored(grid.scale[:, 0], layer.scale_dtype)),
        np.rint(np.asarray(grid.zero / step)[:, 0]).astype(np.uint8),
        np.asarray(layer.bits, np.int64).reshape(-1),
        group_size=like.group_size,
        widths=like.widths,
        dtype=like.dtype,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples that a block is trained on.

    Attributes:
      x: ``[S, T, D]``, the block's inputs after the quantized blocks.
      y: ``[S, T, D]``, the output of the full-precision block after full-precision blocks.
      y_here: ``[S, T, D]``, the output of the full-precision block for ``x``; None if the loss has no
        augmented term.
    """

    x: jax.Array
    y: jax.Array
    y_here: jax.Array | None


@dataclasses.dataclass(frozen=True)
class BlockLoss:
    """Mean squared difference of a quantized block's output from its targets; hashable.

    Attributes:
      config: the decoder's config.
      augmented: weight of the paper's augmented term, whose target is the full-precision block's output
        for the quantized block's own inputs.
    """

    config: DecoderConfig
    augmented: float = 1.0

    def __call__(
        self, learned: Learned, layers: Mapping[str, Layer], rest: Params, batch: Samples
    ) -> Float[Array, ""]:
        """Returns the loss of a batch; ``rest`` are the block's parameters that are not learned."""
        params = dict(rest)
        shapes = block_params(self.config)
        for layer, w in dense_weights(learned, layers).items():
            name = f"{layer}.weight"
            params[name] = w[: shapes[name].shape[0]].astype(COMPUTE_DTYPE)  # without the padding
        block = make_block(self.config, params)
        y, _ = block(batch.x, sequence_positions(batch.x))
        loss = jnp.mean((y - batch.y) ** 2)
        if self.augmented and batch.y_here is not None:
            loss += self.augmented * jnp.mean((y - batch.y_here) ** 2)
        return loss
