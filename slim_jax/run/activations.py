"""The calibration activations, carried through one block after another, stage by stage.

Every stage is a jitted step of its own that compiles once per model. A block that is quantized and
one that a resumed run only passes through go through the same steps, so the activations behind it
are the same to the last bit.
"""

from collections.abc import Iterable, Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels import MixedTensor
from pallas_kernels.planes import WORD_BITS
from slim_jax.devices import ONE_DEVICE, Placement
from slim_jax.method.hessian import Observation, gram, spread
from slim_jax.model.decoder import MLP, Block, embed, linear_groups, sequence_positions
from slim_jax.model.linear import COMPUTE_DTYPE
from slim_jax.model.params import Params, as_computed, make_block, make_expert, make_outer
from slim_jax.run.offload import Batches, OnDisk
from slim_jax.run.source import Source

BATCH_TOKENS = 4096
"""Calibration tokens that pass through a block at once, on each device."""


class Inputs(NamedTuple):
    """The inputs of a group of layers.

    Attributes:
      x: ``[B, T, K]`` a batch.
      seen: ``bool[B, T]`` a batch, the tokens that go through these layers; None for all.
      weights: ``float32[samples, length]``, how much each token counts; None where all count alike.
    """

    x: Batches
    seen: list[jax.Array] | None = None
    weights: np.ndarray | None = None


def sample_positions(tokens: int, stride: int) -> np.ndarray:
    """One of every ``stride`` of so many tokens, ``int32``: the first of them here, the last there.

    At a fixed distance that divides the windows' length, it would be the same few positions of every
    window, the very first (where attention piles up) among them.
    """
    size = len(range(0, tokens, stride))
    return ((np.arange(size) + spread(size)) * (tokens / size)).astype(np.int32)


@partial(jax.jit, static_argnames=("stride", "placement"))
def _observe(
    x: Float[Array, "b t k"],
    seen: Bool[Array, "b t"] | None,
    weights: Float[Array, "b t"] | None,
    *,
    stride: int,
    placement: Placement,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of every device's tokens that are ``seen``: Gram matrix ``[devices, K, K]``, sample, number, weight.

    The sample has its usual size: few tokens are in it several times, and zeros where there are none.
    """

    def own(_: Any, inputs: tuple[jax.Array, jax.Array | None, jax.Array | None]):
        x, seen, weights = inputs
        tokens = x.reshape(-1, x.shape[-1])
        positions: Any = sample_positions(len(tokens), stride)
        count = jnp.int32(len(tokens))
        if seen is not None:
            mask = seen.reshape(-1)
            tokens = jnp.where(mask[:, None], tokens, 0)
            count = jnp.sum(mask, dtype=jnp.int32)
            ordered = jnp.argsort(~mask, stable=True)  # the seen tokens, in order, then the others
            evenly = positions / np.float32(len(mask)) * count
            positions = ordered[jnp.minimum(evenly.astype(jnp.int32), jnp.maximum(count - 1, 0))]
        sample, weight = tokens[positions].astype(jnp.float32), count.astype(jnp.float32)
        if weights is not None:
            flat = weights.reshape(-1) if seen is None else jnp.where(mask, weights.reshape(-1), 0)
            tokens, weight = tokens * jnp.sqrt(flat)[:, None].astype(tokens.dtype), jnp.sum(flat)
        return gram(tokens)[None], sample, count[None], weight[None]

    return placement.over_samples(own)((), (x, seen, weights))


@jax.jit
def _add_in_order(total: jax.Array | None, parts: Float[Array, "devices k k"]) -> Float[Array, "k k"]:
    return reduce(jnp.add, list(parts) if total is None else [total, *parts])


def observe(inputs: Inputs, stride: int, placement: Placement = ONE_DEVICE) -> Observation:
    """Sums the Gram matrices of all batches and joins one of every ``stride`` of their inputs.

    A device's batch is as large as it would be if there were no others, and the sums are taken in the
    order of samples: GPTQ would turn a difference in their last bits into other codes.

    Weights are normalized: the Gram matrix is that of as many tokens as there were.
    """
    total, samples, tokens, weight, row = None, [], 0, 0.0, 0
    for i, x in enumerate(inputs.x):
        rows = None if inputs.weights is None else placement.samples(inputs.weights[row : row + len(x)])
        seen = None if inputs.seen is None else inputs.seen[i]
        parts, sample, counts, weights = _observe(x, seen, rows, stride=stride, placement=placement)
        tokens += int(np.sum(placement.fetch(counts)))
        weight += float(np.sum(placement.fetch(weights), dtype=np.float64))
        row += len(x)
        total = _add_in_order(total, placement.rows(parts))
        samples.append(placement.whole(sample))
    assert total is not None
    if inputs.weights is not None and weight > 0:
        total = total * np.float32(tokens / weight)
    return Observation(placement.whole(total), jnp.concatenate(samples), tokens)


@jax.jit
def _attn_input(block: Block, h: jax.Array) -> jax.Array:
    return block.attn_input(h).astype(COMPUTE_DTYPE)


@partial(jax.jit, static_argnames="placement")
def _o_input(block: Block, x: jax.Array, *, placement: Placement) -> jax.Array:
    def attend(block: Block, x: jax.Array) -> jax.Array:
        return block.attn.attend(x, sequence_positions(x))[0].astype(COMPUTE_DTYPE)

    # On CPUs attention loops over samples: each device must have a loop over its own.
    return placement.over_samples(attend)(block, x)


@jax.jit
def _after_attn(block: Block, h: jax.Array, x: jax.Array) -> jax.Array:
    return block.after_attn(h, x)


@jax.jit
def _mlp_input(block: Block, h: jax.Array) -> jax.Array:
    return block.mlp_input(h).astype(COMPUTE_DTYPE)


@jax.jit
def _down_input(mlp: MLP, x: jax.Array) -> jax.Array:
    return mlp.hidden(x).astype(COMPUTE_DTYPE)


@jax.jit
def _after_mlp(block: Block, h: jax.Array, x: jax.Array) -> jax.Array:
    assert block.mlp is not None
    return block.after_mlp(h, block.mlp.down(x))


@jax.jit
def _route(block: Block, x: jax.Array) -> jax.Array:
    assert block.moe is not None
    return block.moe.route(x)


@partial(jax.jit, donate_argnums=1)
def _add_expert(expert: MLP, y: jax.Array, x: jax.Array, weight: jax.Array) -> jax.Array:
    return y + weight[..., None] * expert.down(x)


@jax.jit
def _after_experts(block: Block, h: jax.Array, y: jax.Array) -> jax.Array:
    return block.after_mlp(h, y)


class Activations:
    """The residual stream of all calibration samples in front of the next block.

    Attributes:
      batches: ``float32[B, T, D]`` each.

    Args:
      source: whose embeddings they start from.
      tokens: ``int[samples, length]``.
      offload: a folder for the activations of all but one batch; None keeps them in memory.
      placement: the devices that share the samples; they divide their number.
    """

    def __init__(
        self,
        source: Source,
        tokens: np.ndarray,
        offload: Path | None = None,
        placement: Placement = ONE_DEVICE,
    ) -> None:
        self._config, self._offload, self._placement = source.config, offload, placement
        outer = make_outer(source.config, placement.tree(dict(source.outer())))
        batches = sample_batches(tokens.astype(np.int32), placement.devices)
        self.batches = self.keep(embed(outer, placement.samples(rows)) for rows in batches)

    def stages(self, params: Params) -> Iterator[tuple[tuple[str, ...], Inputs]]:
        """Passes a block; on the way, yields each group of layers with its inputs.

        What the caller does to the weights in ``params`` between two stages takes effect from there on.
        """
        groups = linear_groups(self._config)
        block = self.block(params)
        x = self.keep(_attn_input(block, h) for h in self.batches)
        yield groups["attn"], Inputs(x)
        block = self.block(params)
        for i, attn_input in enumerate(x):
            x[i] = _o_input(block, attn_input, placement=self._placement)
        yield groups["attn.o"], Inputs(x)
        block = self.block(params)
        self.batches = self.keep(_after_attn(block, h, o_input) for h, o_input in zip(self.batches, x))
        x = self.keep(_mlp_input(block, h) for h in self.batches)
        if self._config.num_experts:
            yield from self._experts(params, block, x)
            return
        yield groups["mlp"], Inputs(x)
        block = self.block(params)
        for i, mlp_input in enumerate(x):
            x[i] = _down_input(block.mlp, mlp_input)
        yield groups["mlp.down"], Inputs(x)
        block = self.block(params)
        self.batches = self.keep(_after_mlp(block, h, down_input) for h, down_input in zip(self.batches, x))

    def carry(self, params: Params) -> None:
        """Passes a block, dense or packed."""
        for _ in self.stages({name: dense_weight(value) for name, value in params.items()}):
            pass

    def _experts(self, params: Params, block: Block, x: Batches) -> Iterator[tuple[tuple[str, ...], Inputs]]:
        """The rest of a block with experts; each sees the tokens that are routed to it."""
        groups = linear_groups(self._config)
        weights = [_route(block, mlp_input) for mlp_input in x]
        y = self.keep(jnp.zeros_like(h) for h in self.batches)
        for index in range(self._config.num_experts):
            name, of_expert = f"moe.experts.{index}", [w[..., index] for w in weights]
            seen = [w > 0 for w in of_expert]
            yield groups[name], Inputs(x, seen)
            expert = self._expert(params, index)
            hidden = self.keep(_down_input(expert, mlp_input) for mlp_input in x)
            yield groups[f"{name}.down"], Inputs(hidden, seen)
            expert = self._expert(params, index)
            y = self.keep(_add_expert(expert, *parts) for parts in zip(y, hidden, of_expert))
        self.batches = self.keep(_after_experts(block, h, part) for h, part in zip(self.batches, y))

    def keep(self, arrays: Iterable[jax.Array]) -> Batches:
        """The arrays, in memory or offloaded."""
        return list(arrays) if self._offload is None else OnDisk(arrays, self._offload)

    def block(self, params: Params) -> Block:
        """The block with matrices dense in the compute dtype, the rest in float32."""
        return make_block(self._config, self._computed(params))

    def _expert(self, params: Params, index: int) -> MLP:
        own = {n: v for n, v in params.items() if n.startswith(f"moe.experts.{index}.")}
        return make_expert(self._config, self._computed(own), index)

    def _computed(self, params: Params) -> dict[str, jax.Array]:
        return {name: self._placement.whole(as_computed(name, value)) for name, value in params.items()}


def dense_weight(value: Any) -> Any:
    """A packed weight as calibration computes with it; anything else as it is."""
    if not isinstance(value, MixedTensor):
        return value
    rows = value.groups * value.group_size * max(value.widths) // WORD_BITS
    return value.with_rows(rows).dequantize(COMPUTE_DTYPE)  # one program for every mean width


def sample_batches(tokens: np.ndarray, devices: int) -> Iterator[np.ndarray]:
    """Rows of ``tokens [samples, length]`` in equal batches, so that one program serves all of them."""
    batch = max(1, BATCH_TOKENS // tokens.shape[1])
    while tokens.shape[0] % (devices * batch):
        batch -= 1
    for start in range(0, tokens.shape[0], devices * batch):
        yield tokens[start : start + devices * batch]
