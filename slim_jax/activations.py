"""The calibration activations, carried through one block after another, stage by stage.

Every stage is a jitted step of its own that compiles once per model. A block that is quantized and
one that a resumed run only passes through go through the same steps, so the activations behind it
are the same to the last bit.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slim_jax.decoder import Block, Params, embed, linear_groups, make_block, make_outer, sequence_positions
from slim_jax.hessian import gram
from slim_jax.source import Source

BATCH_TOKENS = 4096
"""Calibration tokens that pass through a block at once."""

COMPUTE_DTYPE = jnp.dtype(jnp.bfloat16)
"""Of the products with dense weights: on CPUs too the faster one where many tokens pass at once."""


class Observation(NamedTuple):
    """What the calibration inputs ``x[T, K]`` of a group of layers leave behind.

    Attributes:
      gram: ``float32[K, K]``, ``x^T x``.
      sample: ``float32[T / stride, K]``, evenly spaced inputs.
    """

    gram: jax.Array
    sample: jax.Array


@partial(jax.jit, static_argnames="stride")
def _observe(x: Float[Array, "b t k"], *, stride: int) -> Observation:
    tokens = x.reshape(-1, x.shape[-1])
    return Observation(gram(tokens), tokens[::stride].astype(jnp.float32))


def observe(batches: Sequence[jax.Array], stride: int) -> Observation:
    """Sums the Gram matrices of all batches ``[B, T, K]`` and joins every ``stride``-th of their inputs."""
    total, samples = None, []
    for x in batches:
        seen = _observe(x, stride=stride)
        total = seen.gram if total is None else total + seen.gram
        samples.append(seen.sample)
    assert total is not None
    return Observation(total, jnp.concatenate(samples))


@jax.jit
def _attn_input(block: Block, h: jax.Array) -> jax.Array:
    return block.attn_input(h).astype(COMPUTE_DTYPE)


@jax.jit
def _o_input(block: Block, x: jax.Array) -> jax.Array:
    return block.attn.attend(x, sequence_positions(x))[0].astype(COMPUTE_DTYPE)


@jax.jit
def _after_attn(block: Block, h: jax.Array, x: jax.Array) -> jax.Array:
    return block.after_attn(h, x)


@jax.jit
def _mlp_input(block: Block, h: jax.Array) -> jax.Array:
    return block.mlp_input(h).astype(COMPUTE_DTYPE)


@jax.jit
def _down_input(block: Block, x: jax.Array) -> jax.Array:
    return block.mlp.hidden(x).astype(COMPUTE_DTYPE)


@jax.jit
def _after_mlp(block: Block, h: jax.Array, x: jax.Array) -> jax.Array:
    return block.after_mlp(h, x)


class Activations:
    """The residual stream of all calibration samples in front of the next block.

    Attributes:
      batches: ``float32[B, T, D]`` each.
    """

    def __init__(self, source: Source, tokens: np.ndarray) -> None:
        self._config = source.config
        outer = make_outer(source.config, source.outer())
        self.batches = [embed(outer, jnp.asarray(rows, jnp.int32)) for rows in _split(tokens)]

    def stages(self, params: Params) -> Iterator[tuple[tuple[str, ...], list[jax.Array]]]:
        """Passes a block; on the way, yields each group of layers with its inputs ``[B, T, K]``.

        What the caller does to the weights in ``params`` between two stages takes effect from there on.
        """
        attn, o, mlp, down = linear_groups(self._config).values()
        block = self._block(params)
        x = [_attn_input(block, h) for h in self.batches]
        yield attn, x
        block = self._block(params)
        for i, attn_input in enumerate(x):
            x[i] = _o_input(block, attn_input)
        yield o, x
        block = self._block(params)
        self.batches = [_after_attn(block, h, o_input) for h, o_input in zip(self.batches, x)]
        x = [_mlp_input(block, h) for h in self.batches]
        yield mlp, x
        block = self._block(params)
        for i, mlp_input in enumerate(x):
            x[i] = _down_input(block, mlp_input)
        yield down, x
        block = self._block(params)
        self.batches = [_after_mlp(block, h, down_input) for h, down_input in zip(self.batches, x)]

    def _block(self, params: Params) -> Block:
        """The block with matrices dense in the compute dtype, the rest in float32."""
        return make_block(self._config, {name: _dense(value) for name, value in params.items()})


def _dense(value: Any) -> jax.Array:
    return jnp.asarray(value, COMPUTE_DTYPE if value.ndim == 2 else jnp.float32)


def _split(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of ``tokens`` in equal batches, so that one program serves all of them."""
    batch = max(1, BATCH_TOKENS // tokens.shape[1])
    while tokens.shape[0] % batch:
        batch -= 1
    for start in range(0, tokens.shape[0], batch):
        yield tokens[start : start + batch]
