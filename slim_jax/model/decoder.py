"""The decoder, for every supported family. Families differ in a frozen `DecoderConfig`, not in code.

The mapping from checkpoints to these parameters is in `convert`, not in this file.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from slim_jax.model.block import Block, sequence_positions
from slim_jax.model.config import DecoderConfig
from slim_jax.model.linear import Linear, look_up, unembed
from slim_jax.model.norm import Norm


class Decoder(nnx.Module):
    """A decoder-only language model: ``model(tokens[B, T])`` gives logits ``[B, T, vocab_size]``.

    Attributes:
      embed: the embedding table: dense, an `nnx.Param` ``[vocab, d]``; packed, ``[d, vocab]``, so that one
        weight serves the look-up and, where the head is tied, the product.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        d, embed_size = config.hidden_size, config.embed_size or config.hidden_size
        self.config = config
        self.embed: nnx.Variable[Any] = nnx.Param(
            jax.random.normal(rngs.params(), (config.vocab_size, embed_size)) * 0.02
        )
        learned, rows = config.positions == "learned", config.max_positions + config.position_offset
        self.embed_positions = (
            nnx.Param(jax.random.normal(rngs.params(), (rows, d)) * 0.02) if learned else None
        )
        projected = embed_size != d
        self.project_in = Linear(embed_size, d, bias=False, rngs=rngs) if projected else None
        self.blocks = nnx.List([Block(config.block(i), i, rngs=rngs) for i in range(config.num_layers)])
        self.norm = Norm(d, config) if config.final_norm else None
        self.project_out = Linear(d, embed_size, bias=False, rngs=rngs) if projected else None
        self.head = None if config.tied_head else Linear(embed_size, config.vocab_size, bias=False, rngs=rngs)

    def runs(self) -> list[list[Block]]:
        """Returns the scan segments: lists of adjacent blocks of one kind that are packed alike.

        Their packed weights may differ in the values of leaves and in the number of rows of words.
        """
        return [list(run) for _, run in itertools.groupby(self.blocks, jax.tree.structure)]

    def rows(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t e"]:
        """Returns the tokens' rows of the embedding table."""
        return look_up(self.embed.get_value(), tokens)

    def embed_tokens(self, tokens: Int[Array, "b t"], positions: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Returns the residual stream that enters the first block."""
        table = self.embed.get_value()
        h = self.rows(tokens)
        if self.config.embed_scale != 1:
            # The dtype before packing is unknown; models that round the factor have bfloat16.
            dtype = table.dtype if isinstance(table, jax.Array) else jnp.bfloat16
            h = h * jnp.asarray(self.config.embed_scale, dtype).astype(jnp.float32)
        if self.project_in is not None:
            h = self.project_in(h)
        if self.embed_positions is not None:
            rows = jnp.maximum(positions, 0) + self.config.position_offset
            h = h + self.embed_positions[...][rows].astype(jnp.float32)
        return h

    def head_input(self, h: Float[Array, "... d"]) -> Float[Array, "... e"]:
        """Returns the input of the LM head, from the output of the last block."""
        if self.norm is not None:
            h = self.norm(h)
        return h if self.project_out is None else self.project_out(h)

    def logits(self, h: Float[Array, "... d"]) -> Float[Array, "... vocab"]:
        """Returns logits, from the output of the last block."""
        return self.head_output(self.head_input(h))

    def head_output(self, x: Float[Array, "... e"]) -> Float[Array, "... vocab"]:
        """Returns logits, from the input of the LM head."""
        logits = unembed(x, self.embed.get_value()) if self.head is None else self.head(x)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t vocab"]:
        """Returns the logits of every position, ``float32[B, T, vocab_size]``."""
        positions = sequence_positions(tokens)
        h = self.embed_tokens(tokens, positions)
        for block in self.blocks:
            h, _ = block(h, positions)
        return self.logits(h)


@jax.jit
def embed(outer: Decoder, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Returns the residual stream of whole sequences; ``outer`` is :func:`make_outer`'s decoder."""
    return outer.embed_tokens(tokens, sequence_positions(tokens))
