"""ERNIE 4.5 (dense): Llama's architecture in which RoPE rotates neighbouring features."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.families import llama
from convert.families.family import Family, field
from slim_jax.model.config import DecoderConfig


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    theta, scaling = llama.read_rope(hf)
    biased = field(hf, "use_bias", bool)
    return dataclasses.replace(
        llama.read_base(hf, "ernie"),
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_interleaved=True,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=biased,
    )


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`."""
    base = llama.write_base(config, "Ernie4_5ForCausalLM", "ernie4_5")
    return {**base, **llama.write_rope(config), "use_bias": config.mlp_bias}


FAMILY = Family(
    name="ernie",
    hf=llama.hf_format(("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"), read_hf, write_hf, llama.HF_NAMES),
)
