"""A whole decoder on packed weights for ahead-of-time compilers: shapes only, no weights in memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import MixedTensor, use_implementation
from pallas_kernels.layout import abstract_tensor, group_count
from slim_jax.infer.forward import forward, stackable
from slim_jax.infer.fuse import ready
from slim_jax.model.block import linear_groups
from slim_jax.model.cache import Run, State
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Packed
from slim_jax.model.stage import part_of

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

TABLE_BITS = 2
"""Extra bits of embedding and LM head over the blocks' bits, as in `SlimConfig`'s defaults."""


def decode_step(
    implementation: str,
    slots: int = 4096,
    batch: int = 1,
    bits: int = 2,
    group_size: int = 128,
    layers: int | None = None,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Builder: decodes one token of Llama-2-7B in bfloat16, with ``layers`` blocks and a cache of ``slots``.

    The step is the one that `slim_jax.infer.generate.Generator` runs. A quarter of the groups has one bit
    less than ``bits``, a quarter one bit more; embedding and LM head are packed.

    Returns:
      The step ``(outer, runs, state, tokens) -> (logits, state)`` and its abstract arguments.
    """
    config = dataclasses.replace(LLAMA_2_7B, num_layers=layers or LLAMA_2_7B.num_layers)
    model = _packed_model(config, bits, group_size)
    with use_implementation(implementation):
        runs = [Run(run[0].config, len(run), stackable(run)) for run in model.runs()]
        outer, blocks = jax.eval_shape(lambda model: ready(model)[:2], model)
    state = jax.eval_shape(lambda: State.empty(runs, batch, slots, dtype=jnp.bfloat16))

    def step(outer: Decoder, blocks: Any, state: State, tokens: jax.Array) -> tuple[jax.Array, State]:
        positions = jnp.broadcast_to(state.length, tokens.shape)
        with use_implementation(implementation):
            return forward(outer, blocks, state, tokens, positions)

    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    return jax.jit(step, donate_argnums=2), (outer, blocks, state, tokens)  # the cache is written in place


def tpu_products(bits: int = 2, group_size: int = 128) -> dict[str, tuple[int, dict[str, Any]]]:
    """Products of :func:`decode_step` on a TPU: each one's count, and arguments of `bench.aot_tpu.packed`."""
    c = LLAMA_2_7B
    shapes = {
        "qkv": (c.hidden_size, c.hidden_size, 3),
        "o": (c.hidden_size, c.hidden_size, 1),
        "gate, up": (c.hidden_size, c.intermediate_size, 2),
        "down": (c.intermediate_size, c.hidden_size, 1),
    }
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for name, (k, n, weights) in shapes.items():
        mixed = _mixed((k, n), bits, group_size)
        sizes = {"widths": mixed.widths, "segments": _segments(k, group_size), "weights": weights}
        found[name] = c.num_layers, {"k": k, "n": n, "layers": c.num_layers, **sizes}
    head = {"widths": (bits + TABLE_BITS,), "segments": (group_count(c.hidden_size, group_size),)}
    found["head"] = 1, {"k": c.hidden_size, "n": c.vocab_size, **head}
    common = {"m": 1, "group_size": group_size, "constant": True}
    return {name: (count, common | arguments) for name, (count, arguments) in found.items()}


def _packed_model(config: DecoderConfig, bits: int, group_size: int) -> Decoder:
    """Returns the decoder as loaded from a packed checkpoint, with shapes instead of arrays."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model)
    for block in model.blocks:
        for names in linear_groups(block.config):
            for name in names:
                owner = part_of(block, name)
                owner.weight = Packed(_mixed(owner.weight.get_value().shape, bits, group_size))
    table = abstract_tensor(
        (config.hidden_size, config.vocab_size),
        widths=(bits + TABLE_BITS,),
        segments=(group_count(config.hidden_size, group_size),),
        group_size=group_size,
        dtype=jnp.bfloat16,
    )
    model.embed = Packed(table)
    if model.head is not None:
        model.head.weight = Packed(table)
    return model


def _mixed(shape: tuple[int, int], bits: int, group_size: int) -> MixedTensor:
    return abstract_tensor(
        shape,
        widths=(bits - 1, bits, bits + 1),
        segments=_segments(shape[0], group_size),
        group_size=group_size,
        dtype=jnp.bfloat16,
    )


def _segments(k: int, group_size: int) -> tuple[int, int, int]:
    groups = group_count(k, group_size)
    quarter = groups // 4
    return quarter, groups - 2 * quarter, quarter
