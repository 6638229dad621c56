"""One forward pass of a decoder over new tokens, against the cache of a batch.

The blocks of a scan segment, adjacent blocks of one kind that are packed alike, are stacked and scanned over,
which compiles one body; their products read a layer's part of a prepared weight in place. Dense blocks run
unrolled, because XLA copies each slice of a weight that it scans over. On NVIDIA GPUs packed blocks run
unrolled too, because XLA would copy each layer's words.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import MixedTensor, chips
from slim_jax.infer.fused import FusedBlock, is_prepared
from slim_jax.model.block import Block
from slim_jax.model.cache import KeyValues, Recurrent, State, of_layer
from slim_jax.model.decoder import Decoder

Through = Callable[..., tuple[Any, ...]]
"""Function of a block, the residual stream, keys and values (or a `Recurrent`), and the layer's index if they
are of all layers."""


def stackable(blocks: Sequence[Block]) -> bool:
    """True if blocks are packed :func:`alike`, and the target gains by a scan over them."""
    return chips.of_target().platform != "cuda" and alike(blocks)


def alike(parts: Sequence[Any]) -> bool:
    """True if parts of models are packed, and differ only in the values of leaves and the rows of words."""
    rows = most_rows(parts)
    if not rows[0]:
        return False
    filled = [jax.eval_shape(lambda one, own=own: with_rows(one, own), p) for p, own in zip(parts, rows)]
    kinds: list[Any] = [
        (jax.tree.structure(one), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(one)])
        for one in filled
    ]
    return all(kind == kinds[0] for kind in kinds)


def with_scales_alike[T](blocks: Sequence[T]) -> list[T]:
    """Returns the blocks, or parts of them, with a weight's scales in one dtype so that they can be stacked.

    Where a weight's scales are bytes in some blocks and bfloat16 in others, and nothing else differs, they
    become bfloat16 in all, which holds the value of every byte.
    """
    weights = map(_packed_weights, blocks)
    kinds: list[Any] = [jax.tree.structure(block) for block in blocks]
    if any(kind != kinds[0] for kind in kinds):
        return list(blocks)
    mixed = [len({w.scale.dtype for w in same}) > 1 for same in zip(*weights)]
    if not any(mixed):
        return list(blocks)

    def in_one_dtype(block: T) -> T:
        differs = iter(mixed)
        return jax.tree.map(
            lambda leaf: leaf.with_bfloat16_scales() if is_packed(leaf) and next(differs) else leaf,
            block,
            is_leaf=is_packed,
        )

    return [in_one_dtype(block) for block in blocks]


def most_rows(blocks: Sequence[Any]) -> list[list[int]]:
    """Returns, for each packed weight of each block in order, the number of rows to pad its words to.

    That is the most rows among the blocks that are packed alike.
    """
    rows = [[w.words.shape[-2] for w in _packed_weights(block)] for block in blocks]
    kinds: list[Any] = [jax.tree.structure(block) for block in blocks]
    alike = [[own for kind, own in zip(kinds, rows) if kind == wanted] for wanted in kinds]
    return [[max(same) for same in zip(*own)] for own in alike]


def with_rows[T](block: T, rows: Sequence[int]) -> T:
    """Returns the block with its packed weights' words padded to ``rows``: one program serves all blocks."""
    wanted = iter(rows)
    return jax.tree.map(
        lambda leaf: leaf.with_rows(next(wanted)) if is_packed(leaf) else leaf, block, is_leaf=is_packed
    )


def _packed_weights(block: Any) -> list[MixedTensor]:
    """Returns the packed weights in order."""
    return [leaf for leaf in jax.tree.leaves(block, is_leaf=is_packed) if is_packed(leaf)]


def is_packed(value: Any) -> bool:
    """True if the value is a packed weight; used to stop at whole weights in a tree."""
    return isinstance(value, MixedTensor)


def forward(
    outer: Decoder, runs: Sequence[Any], state: State, tokens: jax.Array, positions: jax.Array
) -> tuple[jax.Array, State]:
    """Returns logits ``float32[B, vocab]`` after the last of ``tokens[B, T]``, and the state with the tokens.

    Args:
      outer: the decoder without blocks.
      runs: the blocks of every scan segment, a list or stacked.
      state: state of the batch before the tokens.
      tokens: tokens to read.
      positions: positions of the tokens, ``[B, T]``; -1 for padding.
    """
    start = state.length
    slots = lax.dynamic_update_slice_in_dim(state.positions, positions, start, axis=1)

    def through(block: Block | FusedBlock, h: jax.Array, seen: Any, layer: jax.Array | None = None):
        cache: Any
        if isinstance(seen, Recurrent):
            h, cache = block(h, positions, dataclasses.replace(seen, layer=layer))
            return h, dataclasses.replace(cache, layer=None)
        keys, values = seen
        h, cache = block(h, positions, KeyValues(keys, values, slots, start, layer))
        return h, (cache.keys, cache.values)

    h, kv = outer.embed_tokens(tokens, positions), []
    for blocks, seen in zip(runs, state.kv, strict=True):
        h, seen = (_one_by_one if isinstance(blocks, list) else _scanned)(through, blocks, h, seen)
        kv.append(seen)
    return outer.logits(h[:, -1]), State(kv, slots, start + tokens.shape[1])


def _one_by_one(through: Through, blocks: list[Any], h: jax.Array, kv: Any) -> tuple[jax.Array, Any]:
    after = []
    for block, seen in zip(blocks, kv, strict=True):
        h, seen = through(block, h, seen)
        after.append(seen)
    return h, after


def _scanned(through: Through, blocks: Any, h: jax.Array, kv: Any) -> tuple[jax.Array, Any]:
    def layer(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, h, seen = carry

        def own(leaf: Any) -> Any:
            if is_prepared(leaf):  # stays whole: products read the layer's part in place
                return leaf.at(i)
            return of_layer(leaf, i)

        block = jax.tree.map(own, blocks, is_leaf=is_prepared)
        return i + 1, *through(block, h, seen, i)

    # Not a scan, which would need an array of layer indices besides its own counter.
    count = jax.tree.leaves(kv)[0].shape[0]
    _, h, kv = lax.while_loop(lambda carry: carry[0] < count, layer, (jnp.int32(0), h, kv))
    return h, kv
