"""Mixtral: Mistral's architecture with a mixture of experts in every block."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.families import llama
from convert.families.family import Family, field
from slim_jax.model.config import DecoderConfig

NAMES = dataclasses.replace(
    llama.HF_NAMES,
    block={
        **llama.HF_NAMES.block,
        "moe.router": "block_sparse_moe.gate",
        "moe.experts.{}.gate": "block_sparse_moe.experts.{}.w1",
        "moe.experts.{}.up": "block_sparse_moe.experts.{}.w3",
        "moe.experts.{}.down": "block_sparse_moe.experts.{}.w2",
    },
)


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    theta, scaling = llama.read_rope(hf)
    return dataclasses.replace(
        llama.read_base(hf, "mixtral"),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=field(hf, "sliding_window", int, None),
        num_experts=field(hf, "num_local_experts", int),
        experts_per_token=field(hf, "num_experts_per_tok", int),
    )


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`."""
    return {
        **llama.write_base(config, "MixtralForCausalLM", "mixtral"),
        **llama.write_rope(config),
        "sliding_window": config.sliding_window,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
    }


FAMILY = Family(
    name="mixtral",
    hf=llama.hf_format(
        architectures=("MixtralForCausalLM",),
        read_config=read_hf,
        write_config=write_hf,
        names=NAMES,
    ),
)
