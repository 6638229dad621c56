"""One transformer decoder, driven by a config, for every family that we read.

Families differ in a frozen :class:`DecoderConfig`, not in code. Activations are float32; each
product is taken in the dtype of its weight (float32, bfloat16 or packed) and accumulated in float32.
How checkpoints map to these parameters is `convert`'s business, not this file's.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import MixedTensor, mixed_matmul
from slim_jax.attention import attention

Params = Mapping[str, Any]
"""Parameters of one block, or of what stands outside the blocks, by dotted name."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    ``kind`` "linear" divides all of them by ``factor``; "llama3" divides those whose wavelength is
    longer than ``original_max_positions / low_freq_factor``, keeps those shorter than
    ``original_max_positions / high_freq_factor`` and blends between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that tells one decoder from another. Sizes are counts of features or tokens.

    Raises:
      ValueError: a size is not positive, or heads are no multiple of key-value heads.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    final_norm: bool = True
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    position_offset: int = 0
    gated: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    tied_head: bool = True
    embed_size: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, expected a multiple of num_kv_heads = {self.num_kv_heads}"
            )

    def to_json(self) -> dict[str, Any]:
        """The config as JSON values; :meth:`from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "DecoderConfig":
        """Builds a config from :meth:`to_json`'s dictionary."""
        scaling = fields.get("rope_scaling")
        changes = {
            "rope_scaling": None if scaling is None else RopeScaling(**scaling),
            "eos_token_ids": tuple(fields.get("eos_token_ids", ())),
        }
        return cls(**{**fields, **changes})


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Linear(nnx.Module):
    """``y = x @ weight + bias``, weight ``[K, N]`` dense or a :class:`MixedTensor`; ``y`` is float32."""

    def __init__(self, k: int, n: int, *, bias: bool, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (k, n)) * k**-0.5)
        self.bias = nnx.Param(jnp.zeros(n)) if bias else None

    def __call__(self, x: Float[Array, "... k"]) -> Float[Array, "... n"]:
        weight = self.weight.get_value()
        if isinstance(weight, MixedTensor):
            y = mixed_matmul(x, weight)
        else:
            y = jnp.dot(x.astype(weight.dtype), weight, preferred_element_type=jnp.float32)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))


class Norm(nnx.Module):
    """RMSNorm, or LayerNorm with a bias, over the last axis."""

    def __init__(self, size: int, config: DecoderConfig) -> None:
        self.scale = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size)) if config.norm == "layer" else None
        self.eps = config.norm_eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        along_last = (1,) * (x.ndim - 1) + (-1,)
        if self.bias is not None:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        y = y * self.scale[...].astype(jnp.float32).reshape(along_last)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(jnp.float32).reshape(along_last)


def rotary_frequencies(config: DecoderConfig) -> Float[Array, " half"]:
    """Angular frequency of each pair of features, ``[head_dim / 2]`` radians per position."""
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = 1.0 / (config.rope_theta**half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original_max_positions * frequency / (2 * jnp.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return frequency * (keep + (1 - keep) / scaling.factor)


def rotate(
    x: Float[Array, "b t h d"], positions: Int[Array, "b t"], frequency: Float[Array, " half"]
) -> Float[Array, "b t h d"]:
    """Rotary position embedding; feature ``i`` pairs with ``i + d / 2``, as in Hugging Face's checkpoints."""
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


class Attention(nnx.Module):
    """Causal self-attention with grouped key-value heads and an optional sliding window."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        d, heads = config.hidden_size, config.num_heads * config.head_dim
        kv = config.num_kv_heads * config.head_dim
        self.q = Linear(d, heads, bias=config.qkv_bias, rngs=rngs)
        self.k = Linear(d, kv, bias=config.qkv_bias, rngs=rngs)
        self.v = Linear(d, kv, bias=config.qkv_bias, rngs=rngs)
        self.o = Linear(heads, d, bias=config.o_bias, rngs=rngs)
        self.config = config

    def attend(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        cache: tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None = None,
    ) -> tuple[Float[Array, "b t hd"], tuple[jax.Array, jax.Array]]:
        """Attention up to the output projection, and the keys and values to keep.

        ``cache`` holds this layer's keys and values ``[B, num_kv_heads, S, head_dim]``, the
        positions of all slots ``[B, S]`` (this call's tokens included) and the slot to write at.
        """
        config = self.config
        batch, time, _ = x.shape
        q = self.q(x).reshape(batch, time, config.num_heads, config.head_dim)
        k = self.k(x).reshape(batch, time, config.num_kv_heads, config.head_dim)
        v = self.v(x).reshape(batch, time, config.num_kv_heads, config.head_dim)
        if config.positions == "rotary":
            frequency = rotary_frequencies(config)
            q, k = rotate(q, positions, frequency), rotate(k, positions, frequency)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        key_positions = positions
        if cache is not None:
            cached_k, cached_v, key_positions, start = cache
            k = jax.lax.dynamic_update_slice_in_dim(cached_k, k.astype(cached_k.dtype), start, axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(cached_v, v.astype(cached_v.dtype), start, axis=2)
        y = attention(q, k, v, positions, key_positions, window=config.sliding_window)
        return y, (k, v)


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
        return activate(self.up(x)) if self.gate is None else activate(self.gate(x)) * self.up(x)


class Block(nnx.Module):
    """One transformer block. ``taps`` is where calibration reads the inputs of the linear layers."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.attn_norm = Norm(config.hidden_size, config)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = Norm(config.hidden_size, config)
        self.mlp = MLP(config, rngs=rngs)
        self.pre_norm = config.pre_norm

    def __call__(
        self,
        h: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        cache: tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None = None,
        taps: dict[str, jax.Array] | None = None,
    ) -> tuple[Float[Array, "b t d"], tuple[jax.Array, jax.Array]]:
        """Output of the block and its keys and values.

        Args:
          h: the residual stream.
          positions: of each token; -1 for padding.
          cache: see :meth:`Attention.attend`.
          taps: filled, where given, with the input of each group of :func:`linear_groups`.
        """
        taps = {} if taps is None else taps
        taps["attn"] = self.attn_input(h)
        taps["attn.o"], kv = self.attn.attend(taps["attn"], positions, cache)
        h = self.after_attn(h, taps["attn.o"])
        taps["mlp"] = self.mlp_input(h)
        taps["mlp.down"] = self.mlp.hidden(taps["mlp"])
        return self.after_mlp(h, taps["mlp.down"]), kv

    def attn_input(self, h: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The input of q, k and v."""
        return self.attn_norm(h) if self.pre_norm else h

    def after_attn(self, h: Float[Array, "b t d"], x: Float[Array, "b t hd"]) -> Float[Array, "b t d"]:
        """The residual stream after attention; ``x`` is the input of o."""
        h = h + self.attn.o(x)
        return h if self.pre_norm else self.attn_norm(h)

    def mlp_input(self, h: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The input of gate and up."""
        return self.mlp_norm(h) if self.pre_norm else h

    def after_mlp(self, h: Float[Array, "b t d"], x: Float[Array, "b t inner"]) -> Float[Array, "b t d"]:
        """The residual stream after the block; ``x`` is the input of down."""
        h = h + self.mlp.down(x)
        return h if self.pre_norm else self.mlp_norm(h)


def linear_groups(config: DecoderConfig) -> dict[str, tuple[str, ...]]:
    """The linear layers of a block that share one input, in the order in which data flows.

    Returns:
      Name of the tap -> names of the layers, such as ``"attn" -> ("attn.q", "attn.k", "attn.v")``.
    """
    return {
        "attn": ("attn.q", "attn.k", "attn.v"),
        "attn.o": ("attn.o",),
        "mlp": ("mlp.gate", "mlp.up") if config.gated else ("mlp.up",),
        "mlp.down": ("mlp.down",),
    }


class Decoder(nnx.Module):
    """A decoder-only language model: ``model(tokens[B, T])`` gives logits ``[B, T, vocab_size]``."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        d, embed_size = config.hidden_size, config.embed_size or config.hidden_size
        self.config = config
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, embed_size)) * 0.02)
        learned, rows = config.positions == "learned", config.max_positions + config.position_offset
        self.embed_positions = (
            nnx.Param(jax.random.normal(rngs.params(), (rows, d)) * 0.02) if learned else None
        )
        projected = embed_size != d
        self.project_in = Linear(embed_size, d, bias=False, rngs=rngs) if projected else None
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = Norm(d, config) if config.final_norm else None
        self.project_out = Linear(d, embed_size, bias=False, rngs=rngs) if projected else None
        self.head = None if config.tied_head else Linear(embed_size, config.vocab_size, bias=False, rngs=rngs)

    def embed_tokens(self, tokens: Int[Array, "b t"], positions: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """The residual stream that enters the first block."""
        h = self.embed[...][tokens].astype(jnp.float32)
        if self.project_in is not None:
            h = self.project_in(h)
        if self.embed_positions is not None:
            rows = jnp.maximum(positions, 0) + self.config.position_offset
            h = h + self.embed_positions[...][rows].astype(jnp.float32)
        return h

    def logits(self, h: Float[Array, "... d"]) -> Float[Array, "... vocab"]:
        """Logits from the output of the last block."""
        if self.norm is not None:
            h = self.norm(h)
        if self.project_out is not None:
            h = self.project_out(h)
        if self.head is not None:
            return self.head(h)
        embed = self.embed[...]
        return jnp.einsum("...d,vd->...v", h.astype(embed.dtype), embed, preferred_element_type=jnp.float32)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t vocab"]:
        """Logits of every position, ``float32[B, T, vocab_size]``."""
        positions = sequence_positions(tokens)
        h = self.embed_tokens(tokens, positions)
        for block in self.blocks:
            h, _ = block(h, positions)
        return self.logits(h)


def _flat(module: nnx.Module) -> dict[str, Any]:
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


def _abstract(config: DecoderConfig, make: type[Block] | type[Decoder]) -> Any:
    return nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))


def block_params(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name and shape of every parameter of one block."""
    return _flat(_abstract(config, Block))


def outer_params(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name and shape of every parameter outside the blocks: embeddings, last norm, head."""
    flat = _flat(_abstract(dataclasses.replace(config, num_layers=1), Decoder))
    return {name: shape for name, shape in flat.items() if not name.startswith("blocks.")}


def _fill(module: Any, params: Params) -> None:
    expected = _flat(module)
    problems = [f"{name} is missing" for name in expected.keys() - params.keys()]
    problems += [f"{name} is not known" for name in params.keys() - expected.keys()]
    for name in expected.keys() & params.keys():
        if tuple(params[name].shape) != tuple(expected[name].shape):
            problems.append(f"{name} has shape {params[name].shape}, expected {expected[name].shape}")
    if problems:
        raise ValueError("parameters do not fit the config: " + "; ".join(sorted(problems)))
    for name, value in params.items():
        *path, leaf = name.split(".")
        owner = module
        for part in path:
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        getattr(owner, leaf).set_value(value if isinstance(value, MixedTensor) else jnp.asarray(value))


def make_block(config: DecoderConfig, params: Params) -> Block:
    """A block from its parameters, dense or packed.

    Raises:
      ValueError: names or shapes do not fit; the message lists all that do not.
    """
    block = _abstract(config, Block)
    _fill(block, params)
    return block


def make_decoder(config: DecoderConfig, outer: Params, blocks: Sequence[Params]) -> Decoder:
    """A decoder from the parameters outside its blocks and those of each block.

    Raises:
      ValueError: names or shapes do not fit; the message lists all that do not.
    """
    decoder = _abstract(config, Decoder)
    named = {f"blocks.{i}.{name}": value for i, block in enumerate(blocks) for name, value in block.items()}
    _fill(decoder, {**outer, **named})
    return decoder


def make_outer(config: DecoderConfig, outer: Params) -> Decoder:
    """A decoder without blocks: what embeds tokens, and turns the last block's output into logits."""
    return make_decoder(dataclasses.replace(config, num_layers=0), outer, [])


@jax.jit
def embed(outer: Decoder, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """The residual stream of whole sequences, by :func:`make_outer`'s decoder."""
    return outer.embed_tokens(tokens, sequence_positions(tokens))


def sequence_positions(x: Array) -> Int[Array, "b t"]:
    """Positions ``0 ... T - 1`` of every row of ``x[B, T, ...]``."""
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])


def split_params(decoder: Decoder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The inverse of :func:`make_decoder`: parameters outside the blocks, and of each block."""
    flat = _flat(decoder)
    outer = {name: value for name, value in flat.items() if not name.startswith("blocks.")}
    return outer, [_flat(block) for block in decoder.blocks]
