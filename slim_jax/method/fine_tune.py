"""End-to-end fine-tuning: trains a packed model's scales and norms to match the full-precision logits.

Codes and zero points are fixed, so the stored code of each weight does not change. Every scale and every norm
gain is multiplied by the exponential of a learned parameter. The loss is

    KL(p || q) = sum_v p_v (log p_v - log q_v),

averaged over tokens, with ``p`` from the full-precision model and ``q`` from the packed one. The model is
a scan over its blocks; the backward pass recomputes the values inside a block, except the results of matrix
products. If blocks differ in kind or packing, each series of consecutive blocks that are alike, a scan
segment, is one scan.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import MixedTensor, scales
from pallas_kernels.layout import stack
from slim_jax.method.learnable import straight_through, undecided
from slim_jax.method.scale_search import stored_grids
from slim_jax.model.block import sequence_positions
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import COMPUTE_DTYPE
from slim_jax.model.params import Params, as_computed, make_block, make_outer

Segment = tuple[int, int]
"""A scan segment, consecutive blocks of one kind and packing: the index of its first block, and the index
after its last."""


class Learned(NamedTuple):
    """Logarithms of the learned factors, by parameter name, ``float32``.

    Attributes:
      blocks: ``[L, ...]`` each, for all blocks of a scan segment.
      outer: for the parameters outside the blocks.
    """

    blocks: dict[Segment, dict[str, jax.Array]]
    outer: dict[str, jax.Array]

    def of(self, index: int) -> dict[str, jax.Array]:
        """Returns the log factors of one block."""
        start, stop = next((start, stop) for start, stop in self.blocks if start <= index < stop)
        return {name: factors[index - start] for name, factors in self.blocks[start, stop].items()}


class Fixed(NamedTuple):
    """Parameters that fine-tuning starts from and does not change.

    Attributes:
      blocks: all parameters of the blocks, stacked for each scan segment.
      outer: the packed model's parameters outside the blocks.
      full: those of the full-precision model, of which only the LM head is used.
    """

    blocks: dict[Segment, dict[str, Any]]
    outer: Params
    full: Params


class Batch(NamedTuple):
    """Samples: tokens ``int32[B, T]`` and the full-precision model's LM head inputs ``[B, T, e]``."""

    tokens: jax.Array
    target: jax.Array


@jax.jit
def scaled(tensor: MixedTensor, log_factor: Float[Array, "g n"]) -> MixedTensor:
    """Multiplies the scales of a packed weight; the groups of ``log_factor`` are in storage order."""
    scale = tensor.scales() * jnp.exp(log_factor)
    return dataclasses.replace(tensor, scale=scales.stored(scale, tensor.scale.dtype))


def _weight(tensor: MixedTensor, log_factor: jax.Array) -> jax.Array:
    """Dense, differentiable version of the weight that :func:`scaled` returns."""
    grid, order = stored_grids(tensor), jnp.argsort(tensor.order)
    scale = grid.scale * jnp.exp(log_factor[order])
    scale = straight_through(scale, scales.rounded(scale, tensor.scale.dtype))
    g, (k, n) = tensor.group_size, tensor.shape
    code = jnp.pad(tensor.codes(), ((0, tensor.groups * g - k), (0, 0))).reshape(-1, g, n)
    w = scale[:, None] * (code.astype(jnp.float32) - grid.zero[:, None])
    return w.reshape(-1, n)[:k].astype(COMPUTE_DTYPE)


def _applied(params: Params, factors: Mapping[str, jax.Array], norm_offset: float) -> dict[str, jax.Array]:
    """Dense parameters as calibration computes with them, with the learned factors applied."""

    def value(name: str, value: Any) -> jax.Array:
        if isinstance(value, MixedTensor):
            return _weight(value, factors[name])
        return _gain(value, factors[name], norm_offset) if name in factors else as_computed(name, value)

    return {name: value(name, given) for name, given in params.items()}


def _gain(value: jax.Array | np.ndarray, log_factor: jax.Array, norm_offset: float) -> jax.Array:
    """Multiplies a norm's gain, which is ``value + norm_offset``; returns the new value, as stored."""
    gain = (jnp.asarray(value, jnp.float32) + norm_offset) * jnp.exp(log_factor) - norm_offset
    return straight_through(gain, gain.astype(value.dtype).astype(jnp.float32))


def apply(params: Params, factors: Mapping[str, jax.Array], norm_offset: float) -> dict[str, Any]:
    """Applies learned factors to packed parameters, as stored; ``norm_offset`` is the decoder config's."""

    def value(name: str, value: Any) -> Any:
        if name not in factors:
            return value
        if isinstance(value, MixedTensor):
            return scaled(value, factors[name])
        return _gain(value, factors[name], norm_offset).astype(value.dtype)

    return {name: value(name, given) for name, given in params.items()}


def stacked(config: DecoderConfig, blocks: Sequence[Params]) -> dict[Segment, dict[str, Any]]:
    """Stacks the parameters of each scan segment's blocks on a leading axis."""

    def join(values: list[Any]) -> Any:
        return stack(values) if isinstance(values[0], MixedTensor) else jnp.stack(values)

    kinds = [(config.block(index), _packing(block)) for index, block in enumerate(blocks)]
    starts = [i for i in range(len(blocks)) if i == 0 or kinds[i] != kinds[i - 1]]
    return {
        (start, end): {name: join([block[name] for block in blocks[start:end]]) for name in blocks[start]}
        for start, end in zip(starts, [*starts[1:], len(blocks)])
    }


def _packing(block: Params) -> dict[str, Any]:
    """Properties by which blocks are compared: only parameters that agree in them can be stacked."""

    def of(w: Any) -> tuple[Any, ...]:
        if isinstance(w, MixedTensor):
            return w.shape, w.group_size, w.widths, w.scale.dtype, w.dtype
        return w.shape, w.dtype

    return {name: of(w) for name, w in block.items()}


def no_change(params: Params, *, inside: bool) -> dict[str, jax.Array]:
    """Initial log factors of the norm gains and, if ``inside`` the blocks, of the scales.

    They are zeros, except those of 8-bit scales: these are small numbers that change no stored scale, see
    `slim_jax.method.learnable.undecided`.
    """
    start, leading = {}, 1 if inside else 0  # blocks are stacked
    for name, value in params.items():
        if isinstance(value, MixedTensor):
            if inside:
                scale = value.scales()
                start[name] = jnp.log(undecided(scale, value.scale.dtype) / scale)
        elif name.endswith("norm.scale") and value.ndim == 1 + leading:
            start[name] = jnp.zeros(value.shape)
    return start


@dataclasses.dataclass(frozen=True)
class TuningLoss:
    """Divergence of the packed model's next-token distribution from the full-precision model's; hashable.

    Attributes:
      config: the decoder's config.
    """

    config: DecoderConfig

    def __call__(self, learned: Learned, fixed: Fixed, batch: Batch) -> Float[Array, ""]:
        """Returns the loss of a batch, a mean over its tokens."""
        outer = make_outer(self.config, apply(fixed.outer, learned.outer, self.config.norm_offset))
        positions = sequence_positions(batch.tokens)

        def through(kind: DecoderConfig, h: jax.Array, layer: tuple[Params, dict[str, jax.Array]]):
            return make_block(kind, _applied(*layer, kind.norm_offset))(h, positions)[0], None

        keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        h = outer.embed_tokens(batch.tokens, positions)
        for segment in sorted(fixed.blocks):
            of_kind = partial(through, self.config.block(segment[0]))
            layers = fixed.blocks[segment], learned.blocks[segment]
            h, _ = lax.scan(jax.checkpoint(of_kind, policy=keep, prevent_cse=False), h, layers)
        full = make_outer(self.config, fixed.full)
        return _divergence(outer, full, outer.head_input(h), batch.target) / batch.tokens.size


def _divergence(
    outer: Decoder, full: Decoder, x: Float[Array, "b t e"], target: Float[Array, "b t e"]
) -> Float[Array, ""]:
    """Sum over tokens of ``KL(p || q)``, from the inputs of both LM heads.

    Logits are computed for one sample at a time, together with the gradient with respect to ``x``: to compute
    that gradient in the backward pass, the logits of all samples would have to be kept.
    """

    def of_sample(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, target = pair
        wanted = jax.nn.log_softmax(full.head_output(target))

        def divergence(x: jax.Array) -> jax.Array:
            found = jax.nn.log_softmax(outer.head_output(x.astype(COMPUTE_DTYPE)))
            return jnp.sum(jnp.exp(wanted) * (wanted - found))

        return jax.value_and_grad(divergence)(x)

    values, gradient = lax.map(of_sample, lax.stop_gradient((x, target)))
    return jnp.sum(values) + jnp.sum(gradient * (x - lax.stop_gradient(x)))
