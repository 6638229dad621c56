"""Phi-3 and Phi-3.5: Llama's architecture with q, k, v and gate, up stored as one matrix each."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from convert.errors import ConvertError
from convert.families import llama
from convert.families.family import Family, field, require
from slim_jax.model.config import DecoderConfig
from slim_jax.model.rotary import RopeScaling

NAMES = dataclasses.replace(
    llama.HF_NAMES,
    block={
        "attn_norm": "input_layernorm",
        "attn.q": "self_attn.qkv_proj",
        "attn.k": "self_attn.qkv_proj",
        "attn.v": "self_attn.qkv_proj",
        "attn.o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_up_proj",
        "mlp.up": "mlp.gate_up_proj",
        "mlp.down": "mlp.down_proj",
    },
)


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from config.json, with transformers' defaults for missing keys."""
    require(hf, "attention_bias", False, False)
    base = llama.read_base(
        {"bos_token_id": 1, "eos_token_id": 32000, **hf}, "phi", max_positions=4096, norm_eps=1e-5
    )
    theta, scaling = _read_rope(hf, base)
    return dataclasses.replace(
        base, rope_theta=theta, rope_scaling=scaling, sliding_window=field(hf, "sliding_window", int, None)
    )


def _read_rope(hf: Mapping[str, Any], base: DecoderConfig) -> tuple[float, RopeScaling | None]:
    """Returns RoPE base and scaling; "su" is the older name of "longrope".

    Raises:
      ConvertError: another scaling, or factors whose number does not fit the head size.
    """
    rope, kind = llama.rope_fields(hf)
    if kind not in ("longrope", "su"):
        if kind != "default":
            raise ConvertError(f"rope_scaling type is {kind!r}, expected default or longrope")
        return llama.read_rope(hf)
    theta, _ = llama.read_rope(
        {**hf, "rope_scaling": None, "rope_parameters": {**rope, "rope_type": "default"}}
    )
    short, long = (_factors(rope, key, base.head_dim // 2) for key in ("short_factor", "long_factor"))
    original = field({**hf, **rope}, "original_max_position_embeddings", int, base.max_positions)
    factor = field(rope, "factor", float, base.max_positions / original)
    attention_factor = field(rope, "attention_factor", float, _attention_factor(factor, original))
    return theta, RopeScaling(
        "longrope",
        factor,
        original_max_positions=original,
        short_factors=short,
        long_factors=long,
        attention_factor=attention_factor,
    )


def _factors(rope: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    factors = field(rope, key, list)
    if len(factors) != count:
        raise ConvertError(f"{key} of rope_scaling has {len(factors)} numbers, expected {count}")
    return tuple(float(factor) for factor in factors)


def _attention_factor(factor: float, original: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`."""
    fields = llama.write_base(config, "Phi3ForCausalLM", "phi3")
    del fields["head_dim"]  # transformers lacks this field and derives the value
    scaling = config.rope_scaling
    rope: dict[str, Any] | None = None
    if scaling is not None:
        rope = {
            "type": "longrope",
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
        }
        original = scaling.original_max_positions
        if scaling.factor != config.max_positions / original:
            rope["factor"] = scaling.factor
        if scaling.attention_factor != _attention_factor(scaling.factor, original):
            rope["attention_factor"] = scaling.attention_factor
        fields["original_max_position_embeddings"] = original
    return {
        **fields,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "sliding_window": config.sliding_window,
        "pad_token_id": None,  # transformers' default exceeds small vocabularies
    }


FAMILY = Family(
    name="phi",
    hf=llama.hf_format(
        architectures=("Phi3ForCausalLM",),
        read_config=read_hf,
        write_config=write_hf,
        names=NAMES,
    ),
)
