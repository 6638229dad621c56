"""A batch's keys and values, and one pass of a decoder against them.

Blocks that are packed alike are stacked and scanned over, which compiles one body; dense blocks run
unrolled, because XLA copies each slice of a weight that it scans over.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import MixedTensor
from slim_jax.decoder import Block, Decoder, DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a batch has seen. Slots ``>= length`` are empty.

    Attributes:
      kv: keys and values, each ``[L, B, num_kv_heads, S, head_dim]`` where blocks are scanned over,
        else one such pair without ``L`` a block: each is then updated where it lies.
      positions: ``int32[B, S]``, position of the token in each slot, -1 where a slot holds none.
      length: ``int32[]``, slots in use.
    """

    kv: Any
    positions: jax.Array
    length: jax.Array

    @classmethod
    def empty(
        cls,
        config: DecoderConfig,
        batch: int,
        size: int,
        *,
        stacked: bool,
        dtype: jax.typing.DTypeLike = jnp.float32,
        mesh: Mesh | None = None,
    ) -> "State":
        """No tokens, and room for ``size``; heads are cut over a mesh if its devices divide them."""
        shape = (batch, config.num_kv_heads, size, config.head_dim)
        layers = config.num_layers
        device = None
        if mesh is not None:
            cut = mesh.axis_names if config.num_kv_heads % mesh.size == 0 else None
            device = NamedSharding(mesh, P(*[None] * (2 if stacked else 1), cut))
        zeros = partial(jnp.zeros, dtype=dtype, device=device)
        # Every buffer is its own: all of them are donated.
        kv: Any = [(zeros(shape), zeros(shape)) for _ in range(0 if stacked else layers)]
        if stacked:
            kv = (zeros((layers, *shape)), zeros((layers, *shape)))
        return cls(kv, jnp.full((batch, size), -1, jnp.int32), jnp.zeros((), jnp.int32))

    def grown(self, size: int) -> "State":
        """The same with room for ``size`` tokens; whether blocks are scanned over or not."""
        more = size - self.positions.shape[1]

        def pad(x: jax.Array) -> jax.Array:
            return jnp.pad(x, [(0, more if axis == x.ndim - 2 else 0) for axis in range(x.ndim)])

        positions = jnp.pad(self.positions, ((0, 0), (0, more)), constant_values=-1)
        return State(jax.tree.map(pad, self.kv), positions, self.length)


def stackable(blocks: Sequence[Block]) -> bool:
    """Whether blocks are packed, and alike in everything but the values of their leaves."""
    leaves = jax.tree.leaves(blocks[0], is_leaf=lambda x: isinstance(x, MixedTensor))
    if not any(isinstance(leaf, MixedTensor) for leaf in leaves):
        return False
    kinds = [
        (jax.tree.structure(block), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(block)])
        for block in blocks
    ]
    return all(kind == kinds[0] for kind in kinds)


def forward(
    outer: Decoder, blocks: Any, state: State, tokens: jax.Array, positions: jax.Array
) -> tuple[jax.Array, State]:
    """Logits ``float32[B, vocab]`` after the last of ``tokens[B, T]``, and the state that has seen them."""
    start = state.length
    slots = lax.dynamic_update_slice_in_dim(state.positions, positions, start, axis=1)
    h = outer.embed_tokens(tokens, positions)
    kv: Any
    if isinstance(blocks, list):
        kv = []
        for block, (k, v) in zip(blocks, state.kv):
            h, layer_kv = block(h, positions, (k, v, slots, start))
            kv.append(layer_kv)
    else:

        def layer(carry: tuple, x: tuple[Block, jax.Array]) -> tuple[tuple, None]:
            h, *all_kv = carry
            block, i = x
            k, v = (lax.dynamic_index_in_dim(a, i, keepdims=False) for a in all_kv)
            h, layer_kv = block(h, positions, (k, v, slots, start))
            # Only the new slots go back, so that the cache is written where it lies.
            new = [lax.dynamic_slice_in_dim(a, start, tokens.shape[1], axis=2)[None] for a in layer_kv]
            all_kv = [lax.dynamic_update_slice(a, b, (i, 0, 0, start, 0)) for a, b in zip(all_kv, new)]
            return (h, *all_kv), None

        indices = jnp.arange(state.kv[0].shape[0], dtype=jnp.int32)
        (h, *all_kv), _ = lax.scan(layer, (h, *state.kv), (blocks, indices))
        kv = tuple(all_kv)
    return outer.logits(h[:, -1]), State(kv, slots, start + tokens.shape[1])
