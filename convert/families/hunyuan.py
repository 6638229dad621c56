"""Hunyuan (dense): Llama's architecture in which queries and keys are normalized after the rotation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.families import llama
from convert.families.family import Family, field, require
from slim_jax.model.config import DecoderConfig
from slim_jax.model.rotary import RopeScaling

NAMES = dataclasses.replace(
    llama.HF_NAMES,
    block={
        **llama.HF_NAMES.block,
        "attn.q_norm": "self_attn.query_layernorm",
        "attn.k_norm": "self_attn.key_layernorm",
    },
)
IGNORED = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
"""Fields of published files' scaling that do nothing where there is an ``alpha``."""


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    require(hf, "use_qk_norm", True, True)
    require(hf, "use_cla", False, False)
    base = llama.read_base(hf, "hunyuan")
    theta, scaling = _read_rope(hf, base.head_dim)
    biased = field(hf, "attention_bias", bool)
    return dataclasses.replace(
        base,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=biased,
        o_bias=biased,
        qk_norm=True,
        qk_norm_last=True,
    )


def _read_rope(hf: Mapping[str, Any], head_dim: int) -> tuple[float, RopeScaling | None]:
    """Returns RoPE base and scaling; a fixed ``alpha`` changes the base."""
    rope = field(hf, "rope_parameters", dict)
    alpha = field(rope, "alpha", float, None)
    if rope.get("rope_type") != "dynamic" or not alpha:
        return llama.read_rope(hf)
    return field(rope, "rope_theta", float) * alpha ** (head_dim / (head_dim - 2)), None


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`."""
    base = llama.write_base(config, "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense")
    return {**base, **llama.write_rope(config), "attention_bias": config.qkv_bias}


UNUSED = (
    *(f"rope_parameters.{key}" for key in IGNORED),
    *("eod_token_id", "cla_share_factor", "attention_head_dim", "org_vocab_size", "norm_type"),
)

FAMILY = Family(
    name="hunyuan",
    hf=llama.hf_format(("HunYuanDenseV1ForCausalLM",), read_hf, write_hf, NAMES, unused=UNUSED),
)
