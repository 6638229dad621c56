"""Phi-3, 3.5, 4 and 4-mini: Llama's architecture with q, k, v and gate, up stored as one matrix each."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from convert.errors import ConvertError
from convert.families import llama
from convert.families.family import (
    Family,
    GGUFFormat,
    count,
    field,
    partial_rotary_factor,
    require,
    rotary_dim,
)
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

GGUF_NAMES = dataclasses.replace(
    llama.GGUF_NAMES,
    block={
        "attn_norm": "attn_norm",
        "attn.q": "attn_qkv",
        "attn.k": "attn_qkv",
        "attn.v": "attn_qkv",
        "attn.o": "attn_output",
        "mlp_norm": "ffn_norm",
        "mlp.gate": "ffn_up",
        "mlp.up": "ffn_up",
        "mlp.down": "ffn_down",
    },
)

FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    require(hf, "attention_bias", False, False)
    base = llama.read_base(hf, "phi")
    rotated = rotary_dim(hf, base.head_dim)
    theta, scaling = _read_rope(hf, base, rotated or base.head_dim)
    return dataclasses.replace(
        base,
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=rotated,
        sliding_window=field(hf, "sliding_window", int, None),
    )


def _read_rope(hf: Mapping[str, Any], base: DecoderConfig, rotated: int) -> tuple[float, RopeScaling | None]:
    """Returns RoPE base and scaling; ``rotated`` features of each head are rotated.

    Raises:
      ConvertError: another scaling, or factors whose number does not fit the rotated features.
    """
    rope = field(hf, "rope_parameters", dict)
    original = field(hf, "original_max_position_embeddings", int)
    if rope.get("rope_type") != "longrope":
        return llama.read_rope(hf, partial=True)
    short, long = (_factors(rope, key, rotated // 2) for key in ("short_factor", "long_factor"))
    original = field(rope, "original_max_position_embeddings", int, original)
    factor = field(rope, "factor", float, base.max_positions / original)
    attention_factor = field(rope, "attention_factor", float, None)
    return field(rope, "rope_theta", float), _longrope(short, long, original, factor, attention_factor)


def _longrope(
    short: tuple[float, ...],
    long: tuple[float, ...],
    original: int,
    factor: float,
    attention_factor: float | None,
) -> RopeScaling:
    return RopeScaling(
        "longrope",
        factor,
        original_max_positions=original,
        short_factors=short,
        long_factors=long,
        attention_factor=attention_factor or _attention_factor(factor, original),
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
        "partial_rotary_factor": partial_rotary_factor(config),
        "sliding_window": config.sliding_window,
        "pad_token_id": None,  # transformers' default exceeds small vocabularies
    }


def read_gguf(meta: Mapping[str, Any], tensors: Any) -> DecoderConfig:
    """Reads our config from a GGUF's metadata; the factors of "longrope" are tensors."""
    plain = {key: value for key, value in meta.items() if key != "rope.dimension_count"}
    base = llama.read_gguf({**plain, "rope.scaling.attn_factor": 1.0}, tensors)
    rotated = field(meta, "rope.dimension_count", int, base.head_dim)
    base = dataclasses.replace(base, rotary_dim=None if rotated == base.head_dim else rotated)
    if FACTORS[0] not in tensors.shapes:
        return dataclasses.replace(base, family="phi")
    original = count(meta, "rope.scaling.original_context_length")
    read = tensors.read(FACTORS)
    short, long = (tuple(map(llama.shortest, read[name].tolist())) for name in FACTORS)
    attention_factor = field(meta, "rope.scaling.attn_factor", float, None)
    scaling = _longrope(short, long, original, base.max_positions / original, attention_factor)
    return dataclasses.replace(base, family="phi", rope_scaling=scaling)


FAMILY = Family(
    name="phi",
    hf=llama.hf_format(
        architectures=("Phi3ForCausalLM",),
        read_config=read_hf,
        write_config=write_hf,
        names=NAMES,
        unused=("partial_rotary_factor",),  # the class has put it into rope_parameters
    ),
    gguf=GGUFFormat(
        architectures=("phi3",),
        read_config=read_gguf,
        names=GGUF_NAMES,
        ignored=(r"rope_factors_(short|long)\.weight",),
    ),
)
