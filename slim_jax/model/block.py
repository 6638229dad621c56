"""One transformer block, driven by a config, for every supported family: its parts and its stages.

Activations are float32; each product is computed in the dtype of its weight (float32, bfloat16 or packed) and
accumulated in float32. A block is a list of :func:`stages`, and everything that passes through a block folds
over them: the model itself here, calibration in `slim_jax.calibrate.activations`. What differs between blocks
of one kind (whether attention is local) is data: a :class:`Buffer` among the parameters.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import attention
from slim_jax.model.cache import Cache, KeyValues
from slim_jax.model.config import DecoderConfig
from slim_jax.model.linear import Linear
from slim_jax.model.linear_attention import GatedDelta
from slim_jax.model.mlp import MLP, MoE
from slim_jax.model.norm import Factor, Norm, Scaled, input_norm, output_norm, rms_normed
from slim_jax.model.rotary import Rotation, frequencies
from slim_jax.model.short_conv import ShortConv
from slim_jax.model.stage import Stage, Stream, part_of, passed


class Buffer(nnx.Variable):
    """A value that a block gets like a parameter, although it follows from the config and the index."""


class Attention(nnx.Module):
    """Causal self-attention with grouped key-value heads and an optional sliding window.

    ``local`` exists in models where only some blocks have a window, and is 1 in those that have one.
    """

    def __init__(self, config: DecoderConfig, index: int = 0, *, rngs: nnx.Rngs) -> None:
        d, heads = config.hidden_size, config.num_heads * config.head_dim
        kv = config.num_kv_heads * config.head_dim
        queries = 2 * heads if config.output_gate else heads
        self.q = Linear(d, queries, bias=config.qkv_bias, rngs=rngs)
        self.k = Linear(d, kv, bias=config.qkv_bias, rngs=rngs)
        own_values = not config.values_from_keys
        self.v = Linear(d, kv, bias=config.qkv_bias, rngs=rngs) if own_values else None
        self.o = Linear(heads, d, bias=config.o_bias, rngs=rngs)
        sizes = (heads, kv) if config.qk_norm_width == "all" else (config.head_dim, config.head_dim)
        self.q_norm, self.k_norm = (Norm(size, config) if config.qk_norm else None for size in sizes)
        self.sinks = nnx.Param(jnp.zeros(config.num_heads)) if config.attn_sinks else None
        self.local = Buffer(is_local(config, index)) if config.global_layers else None
        self.config = config

    def attend(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"] | None = None,
        cache: KeyValues | None = None,
    ) -> tuple[Float[Array, "b t hd"], KeyValues | None]:
        """Computes attention up to the output projection.

        Each token of ``x`` sees itself, the tokens before it, and those of the cache, which all of them join.
        Without ``positions``, rows are whole sequences.
        """
        config, gate = self.config, None
        positions = sequence_positions(x) if positions is None else positions
        batch, time, _ = x.shape
        q, k = self.q(x), self.k(x)
        v = k if self.v is None else self.v(x)
        if config.qk_norm_width == "all":
            q, k = self._normed(q, k)
        q, k, v = (y.reshape(batch, time, -1, config.head_dim) for y in (q, k, v))
        if config.output_gate:
            q, gate = q[:, :, ::2], q[:, :, 1::2].reshape(batch, time, -1)
        rotation = self._rotation(positions) if config.positions == "rotary" else None
        if config.value_norm:
            v = rms_normed(v, config.norm_eps)
        if config.qk_norm_width == "head" and not config.qk_norm_last:
            q, k = self._normed(q, k)
        if config.attn_scale:
            q = q * growing_scale(positions, config.attn_scale, config.floor_scale)
        plain = config.rotary_dim is None and not config.rotary_interleaved
        whole = cache is not None and self.q_norm is None and plain
        if rotation is not None and not whole:  # else the cache rotates
            q, k, rotation = rotation(q, positions), rotation(k, positions), None
        if config.qk_norm_last:
            q, k = self._normed(q, k)
        window: int | jax.Array | None = config.sliding_window
        if self.local is not None and window is not None:
            window = jnp.where(self.local[...] > 0, window, jnp.iinfo(jnp.int32).max)
        scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)
        how: Any = {"scale": scale, "window": window, "softcap": config.attn_softcap, "sinks": sinks}
        if cache is None:
            y = attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), positions, positions, **how)
        else:
            y, cache = cache.attend(q, k, v, positions, rotation=rotation, **how)
        return (y if gate is None else y * jax.nn.sigmoid(gate)), cache

    def _normed(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns queries and keys after their norms, if there are any."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)

    def _rotation(self, positions: jax.Array) -> Rotation:
        config, scaling = self.config, self.config.rope_scaling
        size = config.rotary_dim or config.head_dim
        frequency = frequencies(size, config.rope_theta, scaling, jnp.max(positions) + 1)
        factor: Any = 1.0 if scaling is None else scaling.attention_factor
        if config.sliding_window is not None and config.local_rope_theta is not None:
            local = frequencies(size, config.local_rope_theta)
            frequency = local if self.local is None else jnp.where(self.local[...] > 0, local, frequency)
            if factor != 1:
                factor = 1.0 if self.local is None else jnp.where(self.local[...] > 0, 1.0, factor)
        return Rotation(frequency, factor, config.rotary_interleaved)


def growing_scale(positions: Int[Array, "b t"], scale: float, step: int) -> Float[Array, "b t 1 1"]:
    """Returns the factor of queries by position; see ``attn_scale`` of `DecoderConfig`."""
    steps = (jnp.maximum(positions, 0) // step).astype(jnp.float32)
    return (1 + scale * jnp.log1p(steps))[..., None, None]


def is_local(config: DecoderConfig, index: int) -> Float[Array, ""]:
    return jnp.float32(index not in config.global_layers)


class Block(nnx.Module):
    """One transformer block: ``attn``, ``linear_attn`` or ``short_conv``, then ``mlp`` or ``moe``."""

    def __init__(self, config: DecoderConfig, index: int = 0, *, rngs: nnx.Rngs) -> None:
        self.attn_norm = input_norm(config)
        mixer = config.mixer
        self.attn = Attention(config, index, rngs=rngs) if mixer == "attention" else None
        self.linear_attn = GatedDelta(config, rngs=rngs) if mixer == "gated_delta" else None
        self.short_conv = ShortConv(config, rngs=rngs) if mixer == "short_conv" else None
        self.attn_out_norm = output_norm(config)
        self.mlp_norm = input_norm(config)
        self.mlp = None if config.num_experts else MLP(config, rngs=rngs)
        self.moe = MoE(config, rngs=rngs) if config.num_experts else None
        self.mlp_out_norm = output_norm(config)
        self.out_scale = Factor() if config.block_scale else None
        self.pre_norm = config.pre_norm
        self.config = config

    def __call__(
        self,
        h: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        """Returns the output of the block, and the cache extended by the tokens of ``h``.

        Args:
          h: the residual stream.
          positions: position of each token; -1 for padding.
          cache: state of the tokens before; None where these are the first.
        """
        stream: Stream = {"h": h, "positions": positions, "cache": cache}
        for stage in stages(self.config):
            stream = passed(stage, part_of(self, stage.part), stream)
        return stream["h"], stream["cache"]

    @property
    def mixer(self) -> Attention | GatedDelta | ShortConv:
        """The part through which tokens see each other."""
        mixer = self.attn or self.linear_attn or self.short_conv
        assert mixer is not None
        return mixer

    def into_mlp(self, h: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
        """Returns the residual stream after attention and the MLP's input; ``h`` is attention's sum."""
        if self.pre_norm:
            return h, self.mlp_norm(h)
        h = self.attn_norm(h)
        return h, h

    def after_mlp(self, h: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"]]:
        """Returns the residual stream after the block; ``h`` is the MLP's sum."""
        h = h if self.pre_norm else self.mlp_norm(h)
        return (h if self.out_scale is None else self.out_scale(h),)


def plus(h: jax.Array, y: jax.Array, norm: Norm | Scaled | None) -> jax.Array:
    """Adds ``y``, after a norm if there is one, to the residual stream."""
    return h + (y if norm is None else norm(y))


def _attn_input(block: Block, h: jax.Array) -> tuple[jax.Array]:
    return (block.attn_norm(h) if block.pre_norm else h,)


def _attend(attn: Attention | GatedDelta | ShortConv, x: jax.Array, positions: jax.Array | None, cache: Any):
    return attn.attend(x, positions, cache)


def _mlp_input(block: Block, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return block.into_mlp(plus(h, block.mixer.o(x), block.attn_out_norm))


def _hidden(mlp: MLP, x: jax.Array) -> tuple[jax.Array]:
    return (mlp.hidden(x),)


def _output(block: Block, h: jax.Array, hidden: jax.Array) -> tuple[jax.Array]:
    assert block.mlp is not None
    return block.after_mlp(plus(h, block.mlp.down(hidden), block.mlp_out_norm))


def _route(moe: MoE, x: jax.Array) -> tuple[jax.Array]:
    return (moe.route(x),)


def _mix(moe: MoE, x: jax.Array, routes: jax.Array, y: jax.Array | None) -> tuple[jax.Array]:
    mixed = moe.mix(x, routes)
    return (mixed if y is None else y + mixed,)


def _shared_output(moe: MoE, x: jax.Array, hidden: jax.Array) -> tuple[jax.Array]:
    return (moe.shared_output(x, hidden),)


def _plus_expert(expert: MLP, hidden: jax.Array, route: jax.Array, y: jax.Array | None) -> tuple[jax.Array]:
    part = route[..., None] * expert.down(hidden)
    return (part if y is None else y + part,)


def _mixed_output(block: Block, h: jax.Array, y: jax.Array) -> tuple[jax.Array]:
    return block.after_mlp(plus(h, y, block.mlp_out_norm))


MIXERS = {
    "attention": ("attn", "qkv"),
    "gated_delta": ("linear_attn", "qkvz"),
    "short_conv": ("short_conv", ("into", "outof", "value")),
}
"""Names of a block's mixer, and of its layers that read the block's input."""


StagesOf = Callable[[DecoderConfig], tuple[Stage, ...]]
"""Function of a block's config to the stages of such a block."""


@cache
def stages(config: DecoderConfig) -> tuple[Stage, ...]:
    """Returns the stages of a block, in order of data flow. To add a kind of block, write its stages here.

    In the stream, ``h`` is the residual stream, and ``x`` and ``hidden`` are inputs of linear layers. In a
    mixture, ``routes`` are the experts' weights and ``y`` is the sum of the experts' outputs, to which an
    expert that all tokens pass through comes first.
    """
    adds = not config.output_norms and config.residual_scale == 1
    reads, gives = ("x", "positions", "cache"), ("x", "cache")
    attn, entry = MIXERS[config.mixer]
    entry = "qk" if config.values_from_keys else entry
    attention = (
        Stage(_attn_input, ("h",), ("x",), layers=tuple(f"{attn}.{name}" for name in entry)),
        Stage(_attend, reads, gives, part=attn, layers=(f"{attn}.o",), adds=adds),
    )
    into_mlp = Stage(_mlp_input, ("h", "x"), ("h", "x"))
    if not config.num_experts:
        return (
            *attention,
            dataclasses.replace(into_mlp, layers=_entry("mlp", config)),
            Stage(_hidden, ("x",), ("hidden",), layers=("mlp.down",), input="hidden", adds=adds, part="mlp"),
            Stage(_output, ("h", "hidden"), ("h",)),
        )
    experts = tuple(stage for i in range(config.num_experts) for stage in _expert(i, config))
    shared: tuple[Stage, ...] = ()
    part = "moe.shared"
    if config.shared_expert_size:
        into_mlp = dataclasses.replace(into_mlp, layers=_entry(part, config))
        down, hidden = (f"{part}.down",), "hidden"
        shared = (
            Stage(_hidden, ("x",), (hidden,), part=part, layers=down, input=hidden),
            Stage(_shared_output, ("x", hidden), ("y",), part="moe"),
        )
    return (
        *attention,
        into_mlp,
        *shared,
        Stage(_route, ("x",), ("routes",), part="moe"),
        Stage(_mix, ("x", "routes", "y"), ("y",), part="moe", inside=experts),
        Stage(_mixed_output, ("h", "y"), ("h",)),
    )


def _entry(mlp: str, config: DecoderConfig) -> tuple[str, ...]:
    return (f"{mlp}.gate", f"{mlp}.up") if config.gated else (f"{mlp}.up",)


def _expert(index: int, config: DecoderConfig) -> tuple[Stage, ...]:
    """Returns the stages of one expert, whose layers see the tokens that are routed to it."""
    name = f"moe.experts.{index}"
    down, hidden = (f"{name}.down",), "hidden"
    return (
        Stage(None, (), (), layers=_entry(name, config), expert=index),
        Stage(_hidden, ("x",), (hidden,), part=name, layers=down, input=hidden, expert=index),
        Stage(_plus_expert, (hidden, "route", "y"), ("y",), part=name, expert=index),
    )


def linear_groups(config: DecoderConfig) -> tuple[tuple[str, ...], ...]:
    """Returns a block's linear layers, grouped by the input that they share, in order of data flow.

    A group is such as ``("attn.q", "attn.k", "attn.v")``. A router is in none of them: it is not quantized.
    """
    every = (inner for stage in stages(config) for inner in stage.inside or (stage,))
    return tuple(stage.layers for stage in every if stage.layers)


def linear_names(config: DecoderConfig) -> list[str]:
    """Returns the names of all linear layers of the blocks, such as ``"blocks.3.attn.q"``, in order."""
    blocks = enumerate(config.blocks())
    return [f"blocks.{i}.{name}" for i, kind in blocks for names in linear_groups(kind) for name in names]


def sequence_positions(x: Array) -> Int[Array, "b t"]:
    """Returns positions ``0 ... T - 1`` for every row of ``x[B, T, ...]``."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
