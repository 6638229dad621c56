"""One transformer decoder, driven by a config, for every family that we read.

Families differ in a frozen :class:`DecoderConfig`, not in code. Activations are float32; each
product is taken in the dtype of its weight (float32, bfloat16 or packed) and accumulated in float32.
How checkpoints map to these parameters is `convert`'s business, not this file's.

All blocks of a model share one config, so that one compiled step serves them all. What differs from
block to block (whether its attention is local) is data: a :class:`Buffer` among its parameters.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pallas_kernels import MixedTensor, Prepared
from slim_jax.model.attention import attention
from slim_jax.model.cache import KeyValues
from slim_jax.model.config import DecoderConfig
from slim_jax.model.linear import Linear, look_up, outputs, unembed
from slim_jax.model.rotary import frequencies, rotate

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Buffer(nnx.Variable):
    """What a block is given like a parameter, though it follows from the config and its index."""


class Norm(nnx.Module):
    """RMSNorm, or LayerNorm with a bias, over the last axis."""

    def __init__(self, size: int, config: DecoderConfig) -> None:
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size)) if config.norm == "layer" else None
        self.eps, self.offset = config.norm_eps, config.norm_offset

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        along_last = (1,) * (x.ndim - 1) + (-1,)
        if self.bias is not None:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        y = y * (self.scale[...].astype(jnp.float32) + self.offset).reshape(along_last)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(jnp.float32).reshape(along_last)


class Attention(nnx.Module):
    """Causal self-attention with grouped key-value heads and an optional sliding window.

    ``local``, in models where some blocks have a window and others not, is 1 in those that have.
    """

    def __init__(self, config: DecoderConfig, index: int = 0, *, rngs: nnx.Rngs) -> None:
        d, heads = config.hidden_size, config.num_heads * config.head_dim
        kv = config.num_kv_heads * config.head_dim
        self.q = Linear(d, heads, bias=config.qkv_bias, rngs=rngs)
        self.k = Linear(d, kv, bias=config.qkv_bias, rngs=rngs)
        self.v = Linear(d, kv, bias=config.qkv_bias, rngs=rngs)
        self.o = Linear(heads, d, bias=config.o_bias, rngs=rngs)
        self.q_norm = Norm(config.head_dim, config) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, config) if config.qk_norm else None
        self.local = Buffer(is_local(config, index)) if config.global_layers else None
        self.config = config

    def attend(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        cache: KeyValues | None = None,
    ) -> tuple[Float[Array, "b t hd"], KeyValues | None]:
        """Attention up to the output projection, over the tokens of ``x`` and of the cache that they join."""
        config = self.config
        batch, time, _ = x.shape
        q, k, v = (y.reshape(batch, time, -1, config.head_dim) for y in outputs(x, self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.positions == "rotary":
            q, k = self._rotate(q, k, positions)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        key_positions = positions
        if cache is not None:
            cache = cache.write(k, v)
            (k, v), key_positions = cache.read(), cache.positions
        window: int | jax.Array | None = config.sliding_window
        if self.local is not None and window is not None:
            window = jnp.where(self.local[...] > 0, window, jnp.iinfo(jnp.int32).max)
        scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        softcap = config.attn_softcap
        y = attention(q, k, v, positions, key_positions, scale=scale, window=window, softcap=softcap)
        return y, cache

    def _rotate(self, q: jax.Array, k: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        config, scaling = self.config, self.config.rope_scaling
        frequency = frequencies(config.head_dim, config.rope_theta, scaling, jnp.max(positions) + 1)
        if config.sliding_window is not None and config.local_rope_theta is not None:
            local = frequencies(config.head_dim, config.local_rope_theta)
            frequency = local if self.local is None else jnp.where(self.local[...] > 0, local, frequency)
        factor = 1.0 if scaling is None else scaling.attention_factor
        return rotate(q, positions, frequency, factor), rotate(k, positions, frequency, factor)


def is_local(config: DecoderConfig, index: int) -> Float[Array, ""]:
    return jnp.float32(index not in config.global_layers)


class MLP(nnx.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where the family has no gate."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        d, inner = config.hidden_size, config.intermediate_size
        self.gate = Linear(d, inner, bias=config.mlp_bias, rngs=rngs) if config.gated else None
        self.up = Linear(d, inner, bias=config.mlp_bias, rngs=rngs)
        self.down = Linear(inner, d, bias=config.mlp_bias, rngs=rngs)
        self.activation = config.activation

    def hidden(self, x: Float[Array, "... d"]) -> Float[Array, "... inner"]:
        """The input of ``down``."""
        activate = ACTIVATIONS[self.activation]
        if self.gate is None:
            return activate(self.up(x))
        gate, up = outputs(x, self.gate, self.up)
        return activate(gate) * up


class MoE(nnx.Module):
    """A mixture of experts: each token goes through the few MLPs that a router chooses for it.

    Experts take turns, each on all tokens, and one that no token needs is left out: right everywhere
    and quick where few tokens pass at once. For many tokens it costs ``num_experts / experts_per_token``
    times the products of a program that sorts tokens by expert.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.router = Linear(config.hidden_size, config.num_experts, bias=False, rngs=rngs)
        self.experts = nnx.List([MLP(config, rngs=rngs) for _ in range(config.num_experts)])
        self.top_k, self.norm_topk = config.experts_per_token, config.norm_topk

    def route(self, x: Float[Array, "b t d"]) -> Float[Array, "b t e"]:
        """Weight of every expert for every token, 0 for those that do not see it."""
        probabilities = jax.nn.softmax(self.router(x))
        weights, chosen = jax.lax.top_k(probabilities, self.top_k)
        if self.norm_topk:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        one_hot = jax.nn.one_hot(chosen, probabilities.shape[-1])  # [b, t, k, e]
        return jnp.sum(weights[..., None] * one_hot, axis=-2)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        weights, y = self.route(x), jnp.zeros_like(x)
        for i, expert in enumerate(self.experts):
            weight = weights[..., i : i + 1]
            y = jax.lax.cond(
                jnp.any(weight > 0),
                lambda y, expert=expert, weight=weight: y + weight * expert.down(expert.hidden(x)),
                lambda y: y,
                y,
            )
        return y


class Block(nnx.Module):
    """One transformer block, with an ``mlp`` or, in its place, a ``moe``.

    Calibration goes through it in the steps of which ``__call__`` is made.
    """

    def __init__(self, config: DecoderConfig, index: int = 0, *, rngs: nnx.Rngs) -> None:
        self.attn_norm = Norm(config.hidden_size, config)
        self.attn = Attention(config, index, rngs=rngs)
        self.attn_out_norm = Norm(config.hidden_size, config) if config.output_norms else None
        self.mlp_norm = Norm(config.hidden_size, config)
        self.mlp = None if config.num_experts else MLP(config, rngs=rngs)
        self.moe = MoE(config, rngs=rngs) if config.num_experts else None
        self.mlp_out_norm = Norm(config.hidden_size, config) if config.output_norms else None
        self.pre_norm = config.pre_norm

    def __call__(
        self,
        h: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        cache: KeyValues | None = None,
    ) -> tuple[Float[Array, "b t d"], KeyValues | None]:
        """Output of the block, and the cache with the tokens of ``h``.

        Args:
          h: the residual stream.
          positions: of each token; -1 for padding.
          cache: keys and values of the tokens before; None where these are the first.
        """
        x, cache = self.attn.attend(self.attn_input(h), positions, cache)
        h = self.after_attn(h, x)
        x = self.mlp_input(h)
        if self.moe is not None:
            return self.after_mlp(h, self.moe(x)), cache
        assert self.mlp is not None
        return self.after_mlp(h, self.mlp.down(self.mlp.hidden(x))), cache

    def attn_input(self, h: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The input of q, k and v."""
        return self.attn_norm(h) if self.pre_norm else h

    def after_attn(self, h: Float[Array, "b t d"], x: Float[Array, "b t hd"]) -> Float[Array, "b t d"]:
        """The residual stream after attention; ``x`` is the input of o."""
        y = self.attn.o(x)
        h = h + (y if self.attn_out_norm is None else self.attn_out_norm(y))
        return h if self.pre_norm else self.attn_norm(h)

    def mlp_input(self, h: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The input of gate and up, and of a router."""
        return self.mlp_norm(h) if self.pre_norm else h

    def after_mlp(self, h: Float[Array, "b t d"], y: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The residual stream after the block; ``y`` is what down, or all experts together, gave."""
        h = h + (y if self.mlp_out_norm is None else self.mlp_out_norm(y))
        return h if self.pre_norm else self.mlp_norm(h)


def linear_groups(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """The linear layers of a block that share one input, in the order in which data flows.

    A router is none of them: it stays as it is.

    Returns:
      Name of the input -> names of the layers, such as ``"attn" -> ("attn.q", "attn.k", "attn.v")``.
    """
    experts = [f"moe.experts.{i}" for i in range(config.num_experts)]
    groups: dict[str, tuple[str, ...]] = {"attn": ("attn.q", "attn.k", "attn.v"), "attn.o": ("attn.o",)}
    for mlp in experts or ["mlp"]:
        groups[mlp] = (f"{mlp}.gate", f"{mlp}.up") if config.gated else (f"{mlp}.up",)
        groups[f"{mlp}.down"] = (f"{mlp}.down",)
    return groups


def linear_names(config: DecoderConfig) -> list[str]:
    """The names of all linear layers of the blocks, such as ``"blocks.3.attn.q"``, in order."""
    names = [name for group in linear_groups(config).values() for name in group]
    return [f"blocks.{index}.{name}" for index in range(config.num_layers) for name in names]


def linear_layer(block: Block, name: str) -> Any:
    """The layer that :func:`linear_groups` names: a `Linear`, or what a caller has put in its place. The
    beginning of a name gives what holds the layer."""
    found: Any = block
    for part in name.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


class Decoder(nnx.Module):
    """A decoder-only language model: ``model(tokens[B, T])`` gives logits ``[B, T, vocab_size]``.

    Attributes:
      embed: the token table, an `nnx.Param` ``[vocab, d]`` where it is dense; packed it is ``[d, vocab]``, so
        that one weight serves the look-up and, where the head is tied, the product.
      mesh: over which a packed table's tokens are cut; None on one device.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        d, embed_size = config.hidden_size, config.embed_size or config.hidden_size
        self.config = config
        self.embed: nnx.Variable[Any] = nnx.Param(
            jax.random.normal(rngs.params(), (config.vocab_size, embed_size)) * 0.02
        )
        self.mesh: Mesh | None = None
        learned, rows = config.positions == "learned", config.max_positions + config.position_offset
        self.embed_positions = (
            nnx.Param(jax.random.normal(rngs.params(), (rows, d)) * 0.02) if learned else None
        )
        projected = embed_size != d
        self.project_in = Linear(embed_size, d, bias=False, rngs=rngs) if projected else None
        self.blocks = nnx.List([Block(config, i, rngs=rngs) for i in range(config.num_layers)])
        self.norm = Norm(d, config) if config.final_norm else None
        self.project_out = Linear(d, embed_size, bias=False, rngs=rngs) if projected else None
        self.head = None if config.tied_head else Linear(embed_size, config.vocab_size, bias=False, rngs=rngs)

    def embed_tokens(self, tokens: Int[Array, "b t"], positions: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The residual stream that enters the first block."""
        table = self.embed.get_value()
        h = look_up(table, tokens)
        if self.config.embed_scale != 1:
            # Of what dtype a packed table was, its scales tell: models that round the factor have bfloat16.
            dtype = jnp.bfloat16 if isinstance(table, MixedTensor | Prepared) else table.dtype
            h = h * jnp.asarray(self.config.embed_scale, dtype).astype(jnp.float32)
        if self.project_in is not None:
            h = self.project_in(h)
        if self.embed_positions is not None:
            rows = jnp.maximum(positions, 0) + self.config.position_offset
            h = h + self.embed_positions[...][rows].astype(jnp.float32)
        return h

    def head_input(self, h: Float[Array, "... d"]) -> Float[Array, "... e"]:
        """The input of the head, from the output of the last block."""
        if self.norm is not None:
            h = self.norm(h)
        return h if self.project_out is None else self.project_out(h)

    def logits(self, h: Float[Array, "... d"]) -> Float[Array, "... vocab"]:
        """Logits from the output of the last block."""
        return self.head_output(self.head_input(h))

    def head_output(self, x: Float[Array, "... e"]) -> Float[Array, "... vocab"]:
        """Logits from the input of the head."""
        logits = unembed(x, self.embed.get_value(), self.mesh) if self.head is None else self.head(x)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t vocab"]:
        """Logits of every position, ``float32[B, T, vocab_size]``."""
        positions = sequence_positions(tokens)
        h = self.embed_tokens(tokens, positions)
        for block in self.blocks:
            h, _ = block(h, positions)
        return self.logits(h)


@jax.jit
def embed(outer: Decoder, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """The residual stream of whole sequences, by :func:`make_outer`'s decoder."""
    return outer.embed_tokens(tokens, sequence_positions(tokens))


def sequence_positions(x: Array) -> Int[Array, "b t"]:
    """Positions ``0 ... T - 1`` of every row of ``x[B, T, ...]``."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
