"""All properties in which decoders differ: a frozen record that families fill in and checkpoints store."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from slim_jax.model.rotary import RopeScaling

Kind = tuple[tuple[str, Any], ...]
"""Changes that a kind of block makes to its decoder's config: names of fields, and their values."""

OF_BLOCKS = (
    *("intermediate_size", "num_heads", "num_kv_heads", "head_dim", "gated", "activation", "qk_norm"),
    *("qkv_bias", "o_bias", "mlp_bias", "query_pre_attn_scalar", "attn_softcap", "output_norms"),
    *("positions", "rope_theta", "rope_scaling", "local_rope_theta", "sliding_window"),
    *("num_experts", "experts_per_token", "norm_topk", "shared_expert_size", "shared_expert_gate"),
    *("router_bias", "glu_limit", "attn_sinks", "output_gate", "rotary_dim", "mixer"),
    *("input_norms", "residual_scale", "qk_norm_width", "qk_norm_last", "rotary_interleaved"),
    *("attn_scale", "floor_scale", "router", "router_score_bias", "router_groups", "router_top_groups"),
    *("routed_scale", "values_from_keys"),
)
"""Fields that may differ between kinds of blocks."""

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "head_dim", "max_positions")
LINEAR_SIZES = (
    *("linear_key_heads", "linear_value_heads", "linear_key_dim", "linear_value_dim", "conv_size"),
)
"""Sizes of linear attention and of short convolutions, which count only in blocks whose mixer they are."""
MOST, MOST_EXPERTS = 1 << 28, 1 << 18
"""Limits that no real model reaches: a damaged config is refused before arrays of such sizes are made."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """All properties in which decoders differ. Sizes are counts of features or tokens.

    Attributes whose names do not explain them:
      norm_offset: added to the scale of every norm.
      output_norms: if True, the outputs of attention and MLP are normalized before they are added to the
        residual stream.
      local_rope_theta: base of the rotary embedding, unscaled, in blocks with a sliding window, where it
        differs from the base in ``global_layers``.
      input_norms: if False, attention and MLP read the residual stream as it is, without a norm.
      residual_scale: factor of the outputs of attention and MLP where they are added to the residual stream.
      qk_norm: if True, each head's queries and keys are normalized before the rotation.
      qk_norm_width: whether those norms are over each head, or over all heads together.
      qk_norm_last: if True, queries and keys are normalized after the rotation.
      query_pre_attn_scalar: attention scores are divided by its square root; by default ``head_dim``.
      values_from_keys: if True, values are the output of the layer of the keys, before their norm.
      value_norm: if True, each head's values are normalized, without a scale.
      block_scale: if True, the residual stream after a block is multiplied by a parameter.
      attn_scale: queries at position ``p`` are multiplied by ``1 + attn_scale * log(1 + p // floor_scale)``.
      attn_softcap: scores ``s`` become ``cap * tanh(s / cap)``; ``logit_softcap`` does the same to logits.
      attn_sinks: if True, the softmax of each head's scores counts one more, which is a parameter, and whose
        value is 0.
      global_layers: indices of blocks that see all positions in a model with a sliding window.
      embed_scale: factor of the token embeddings, rounded to their dtype.
      num_experts: 0 for one dense MLP; else ``intermediate_size`` is that of one expert.
      router: function that turns the router's outputs into the experts' weights.
      router_score_bias: if True, a parameter is added to those weights for the choice of experts alone.
      router_groups: number of groups of experts. A token's experts are from ``router_top_groups`` of them,
        those whose two largest weights have the largest sums.
      routed_scale: factor of the weights of a token's experts.
      norm_topk: if True, the weights of the ``experts_per_token`` experts of a token are normalized to sum to
        1.
      shared_expert_size: ``intermediate_size`` of an expert that all tokens pass through; 0 for none.
      shared_expert_gate: if True, that expert's output is multiplied by the sigmoid of a gate.
      router_bias: if True, the router's outputs have a bias.
      glu_limit: if given, an MLP's gate is limited to at most this before the activation, and up to this and
        its negative before 1 is added.
      output_gate: if True, attention's output is multiplied by the sigmoid of a gate, which the layer of the
        queries gives too: for each head its query, then its gate.
      rotary_dim: number of a head's features, the first ones, that rotary positions rotate; by default all.
      rotary_interleaved: if True, the pairs that are rotated are features ``2 i`` and ``2 i + 1``.
      mixer: how a block's tokens see each other: by attention, by linear attention with the gated delta
        rule (`slim_jax.model.linear_attention`), whose sizes are the ``linear_*`` fields, or by a short
        convolution (`slim_jax.model.short_conv`). ``conv_size`` is the number of tokens that the
        convolution of either sees.
      kinds: kinds of blocks, where not all blocks have this config; see :meth:`block`.
      block_kinds: every block's kind, an index into ``kinds``.

    Raises:
      ValueError: a size is not positive or beyond all models, ``head_dim`` is odd with rotary positions, the
        number of heads is not a multiple of that of key-value heads (or of linear attention's key heads),
        ``rotary_dim`` is odd or larger than ``head_dim``, ``global_layers`` are given without a
        sliding window, there are fewer experts than a token needs, experts do not fall into equal groups, or
        kinds of blocks do not match the number
        of blocks or change a field that belongs to the whole decoder.
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
    norm_offset: float = 0.0
    pre_norm: bool = True
    input_norms: bool = True
    output_norms: bool = False
    residual_scale: float = 1.0
    final_norm: bool = True
    positions: Literal["rotary", "learned", "none"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    position_offset: int = 0
    gated: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "gelu_quick", "relu"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_width: Literal["head", "all"] = "head"
    qk_norm_last: bool = False
    values_from_keys: bool = False
    value_norm: bool = False
    block_scale: bool = False
    attn_scale: float = 0.0
    floor_scale: int = 8192
    query_pre_attn_scalar: float | None = None
    attn_softcap: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    norm_topk: bool = True
    shared_expert_size: int = 0
    shared_expert_gate: bool = False
    router: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False
    router_score_bias: bool = False
    router_groups: int = 1
    router_top_groups: int = 1
    routed_scale: float = 1.0
    glu_limit: float | None = None
    attn_sinks: bool = False
    output_gate: bool = False
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    mixer: Literal["attention", "gated_delta", "short_conv"] = "attention"
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_key_dim: int = 0
    linear_value_dim: int = 0
    conv_size: int = 0
    sliding_window: int | None = None
    global_layers: tuple[int, ...] = ()
    tied_head: bool = True
    embed_size: int | None = None
    embed_scale: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    kinds: tuple[Kind, ...] = ()
    block_kinds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number for rotary positions")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise ValueError(
                f"rotary_dim is {self.rotary_dim}, expected an even number up to head_dim = {self.head_dim}"
            )
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}, expected a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.global_layers and self.sliding_window is None:
            raise ValueError("sliding_window is None, expected a number beside global_layers")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, expected 1 to num_experts = "
                f"{self.num_experts}"
            )
        self._check_groups()
        self._check_linear()
        self._check_kinds()

    def _check_groups(self) -> None:
        if not 1 <= self.router_top_groups <= self.router_groups or self.num_experts % self.router_groups:
            raise ValueError(
                f"router_top_groups is {self.router_top_groups} and router_groups {self.router_groups},"
                f" expected 1 up to router_groups, and a divisor of num_experts = {self.num_experts}"
            )

    def _check_linear(self) -> None:
        if self.mixer == "attention":
            return
        for name in LINEAR_SIZES if self.mixer == "gated_delta" else ("conv_size",):
            if not 0 < getattr(self, name) < MOST:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number below {MOST}")
        if self.mixer == "gated_delta" and self.linear_value_heads % self.linear_key_heads:
            raise ValueError(
                f"linear_value_heads is {self.linear_value_heads}, expected a multiple of linear_key_heads = "
                f"{self.linear_key_heads}"
            )

    def _check_sizes(self) -> None:
        for name in SIZES:
            if not 0 < getattr(self, name) < MOST:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number below {MOST}")
        if self.num_layers * max(1, self.num_experts) > MOST_EXPERTS:
            raise ValueError(
                f"num_layers is {self.num_layers} and num_experts {self.num_experts}, expected {MOST_EXPERTS}"
                " experts in all at most"
            )
        for name in ("sliding_window", "embed_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < MOST:
                raise ValueError(f"{name} is {value}, expected None or a positive number below {MOST}")

    def _check_kinds(self) -> None:
        if not self.kinds and not self.block_kinds:
            return
        if len(self.block_kinds) != self.num_layers:
            raise ValueError(
                f"block_kinds has {len(self.block_kinds)} blocks, expected num_layers = {self.num_layers}"
            )
        if not all(0 <= kind < len(self.kinds) for kind in self.block_kinds):
            raise ValueError(f"block_kinds is {self.block_kinds}, expected numbers below {len(self.kinds)}")
        for name, _ in (change for kind in self.kinds for change in kind):
            if name not in OF_BLOCKS:
                raise ValueError(f"a kind of blocks changes {name}, expected one of {', '.join(OF_BLOCKS)}")
        for kind in range(len(self.kinds)):
            _of_kind(self, kind)  # making the config checks it

    def block(self, index: int) -> "DecoderConfig":
        """Returns the config of block ``index``.

        Blocks with equal configs are of one kind: they are compiled once, and scanned over where they are
        adjacent.
        """
        return _of_kind(self, self.block_kinds[index]) if self.kinds else self

    def blocks(self) -> "list[DecoderConfig]":
        """Returns the config of every block, see :meth:`block`."""
        return [self.block(index) for index in range(self.num_layers)]

    def to_json(self) -> dict[str, Any]:
        """Returns the config as JSON values; :meth:`from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "DecoderConfig":
        """Builds a config from :meth:`to_json`'s dictionary."""
        known = {name: _known(name, value) for name, value in fields.items()}
        known["kinds"] = tuple(
            tuple((name, _known(name, value)) for name, value in kind) for kind in fields.get("kinds", ())
        )
        return cls(**known)


def _known(name: str, value: Any) -> Any:
    """Converts a field's value from JSON."""
    if name == "rope_scaling" and value is not None:
        return RopeScaling(**{field: _known(field, part) for field, part in value.items()})
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def _of_kind(config: DecoderConfig, kind: int) -> DecoderConfig:
    return dataclasses.replace(config, kinds=(), block_kinds=(), **dict(config.kinds[kind]))
