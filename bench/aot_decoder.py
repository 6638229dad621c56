"""A whole decoder on packed weights as an ahead-of-time compiler sees it: abstract, no weights in memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import use_implementation
from pallas_kernels.layout import abstract_tensor, group_count
from slim_jax.model.block import Block, linear_groups
from slim_jax.model.cache import State
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Packed
from slim_jax.model.stage import part_of
from slim_jax.model.step import forward

LLAMA_2_7B = DecoderConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_positions=4096,
    tied_head=False,
)


def decode_step(
    implementation: str,
    slots: int = 4096,
    batch: int = 1,
    bits: int = 2,
    group_size: int = 128,
    layers: int | None = None,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Builder: one token of Llama-2-7B, or of so many ``layers``, with a cache of ``slots``, in bfloat16.

    A quarter of the groups has a bit less than ``bits``, a quarter a bit more.

    Returns:
      The step ``(outer, run, state, tokens) -> (logits, state)`` and its abstract arguments.
    """
    config = dataclasses.replace(LLAMA_2_7B, num_layers=layers or LLAMA_2_7B.num_layers)
    outer = _bfloat16(
        nnx.eval_shape(lambda: Decoder(dataclasses.replace(config, num_layers=0), rngs=nnx.Rngs(0)))
    )
    block = _bfloat16(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))
    for names in linear_groups(config):
        for name in names:
            owner = part_of(block, name)
            owner.weight = Packed(_packed(owner.weight.get_value().shape, bits, group_size))
    scanned = implementation != "mosaic_gpu"  # as `slim_jax.model.step.stackable` has it
    stacked = (config.num_layers,) if scanned else ()
    blocks = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*stacked, *leaf.shape), leaf.dtype), block)
    seen = jax.ShapeDtypeStruct((*stacked, batch, config.num_kv_heads, slots, config.head_dim), jnp.bfloat16)
    state = State(
        [(seen, seen) if scanned else [(seen, seen)] * config.num_layers],
        jax.ShapeDtypeStruct((batch, slots), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
    )

    def step(outer: Decoder, run: Any, state: State, tokens: jax.Array) -> tuple[jax.Array, State]:
        positions = jnp.broadcast_to(state.length, tokens.shape)
        with use_implementation(implementation):
            return forward(outer, [run], state, tokens, positions)

    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    run = blocks if scanned else [blocks] * config.num_layers
    return jax.jit(step, donate_argnums=2), (outer, run, state, tokens)  # the cache is written in place


def _packed(shape: tuple[int, int], bits: int, group_size: int) -> Any:
    groups = group_count(shape[0], group_size)
    quarter = groups // 4
    return abstract_tensor(
        shape,
        widths=(bits - 1, bits, bits + 1),
        segments=(quarter, groups - 2 * quarter, quarter),
        group_size=group_size,
        dtype=jnp.bfloat16,
    )


def _bfloat16(module: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), module)
