"""Everything that tells one decoder from another: a frozen record that families fill and checkpoints keep."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from slim_jax.model.rotary import RopeScaling


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that tells one decoder from another. Sizes are counts of features or tokens.

    Attributes that their names do not explain:
      norm_offset: added to the scale of every norm.
      output_norms: what attention and MLP give is normed before it joins the residual stream.
      local_rope_theta: base of the rotary embedding, unscaled, of blocks with a sliding window, where it
        differs from that of ``global_layers``.
      qk_norm: each head's queries and keys are normed before they are rotated.
      query_pre_attn_scalar: attention scores are divided by its root; ``head_dim`` by default.
      attn_softcap: scores ``s`` become ``cap * tanh(s / cap)``; ``logit_softcap`` does that to logits.
      global_layers: blocks that see all positions although there is a sliding window.
      embed_scale: factor of token embeddings, rounded to their dtype.
      num_experts: 0 for one dense MLP; else ``intermediate_size`` is that of one expert.
      norm_topk: the weights of the ``experts_per_token`` experts of a token are made to sum to 1.

    Raises:
      ValueError: a size is not positive, heads are no multiple of key-value heads, ``global_layers``
        are given without a sliding window, or there are fewer experts than a token needs.
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
    output_norms: bool = False
    final_norm: bool = True
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    position_offset: int = 0
    gated: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    query_pre_attn_scalar: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    norm_topk: bool = True
    sliding_window: int | None = None
    global_layers: tuple[int, ...] = ()
    tied_head: bool = True
    embed_size: int | None = None
    embed_scale: float = 1.0
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
        if self.global_layers and self.sliding_window is None:
            raise ValueError("sliding_window is None, expected a number beside global_layers")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, expected 1 to num_experts = "
                f"{self.num_experts}"
            )

    def to_json(self) -> dict[str, Any]:
        """The config as JSON values; :meth:`from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "DecoderConfig":
        """Builds a config from :meth:`to_json`'s dictionary."""
        changes: dict[str, Any] = {
            name: tuple(value) for name, value in fields.items() if isinstance(value, list)
        }
        if (scaling := fields.get("rope_scaling")) is not None:
            tuples = {name: tuple(value) for name, value in scaling.items() if isinstance(value, list)}
            changes["rope_scaling"] = RopeScaling(**{**scaling, **tuples})
        return cls(**{**fields, **changes})
