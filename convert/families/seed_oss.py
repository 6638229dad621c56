"""Seed-OSS: Llama's architecture in which the layers around attention have their own biases."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.families import llama
from convert.families.family import Family, field
from slim_jax.model.config import DecoderConfig

BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_out_bias", "mlp_bias": "mlp_bias"}
"""Our names -> transformers'."""


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    theta, scaling = llama.read_rope(hf)
    biases = {ours: field(hf, theirs, bool) for ours, theirs in BIASES.items()}
    base = llama.read_base(hf, "seed_oss")
    return dataclasses.replace(base, rope_theta=theta, rope_scaling=scaling, **biases)


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`."""
    biases = {theirs: getattr(config, ours) for ours, theirs in BIASES.items()}
    base = llama.write_base(config, "SeedOssForCausalLM", "seed_oss")
    return {**base, **llama.write_rope(config), **biases}


FAMILY = Family(
    name="seed_oss",
    hf=llama.hf_format(
        ("SeedOssForCausalLM",), read_hf, write_hf, llama.HF_NAMES, unused=("residual_dropout",)
    ),
)
