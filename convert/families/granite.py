"""Granite 3: Llama's architecture with constant factors of embeddings, scores, residual stream and logits.

Small ones are mixtures of experts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.families import llama
from convert.families.family import Family, count, field
from slim_jax.model.config import DecoderConfig

MOE = "block_sparse_moe"
NAMES = dataclasses.replace(
    llama.HF_NAMES,
    block={
        **llama.HF_NAMES.block,
        "moe.router": f"{MOE}.router.layer",
        "moe.experts.{}.gate": f"{MOE}.input_linear",
        "moe.experts.{}.up": f"{MOE}.input_linear",
        "moe.experts.{}.down": f"{MOE}.output_linear",
        "moe.shared.gate": "shared_mlp.input_linear",
        "moe.shared.up": "shared_mlp.input_linear",
        "moe.shared.down": "shared_mlp.output_linear",
    },
)


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    theta, scaling = llama.read_rope(hf)
    biased, experts = field(hf, "attention_bias", bool), hf["model_type"] != "granite"
    config = dataclasses.replace(
        llama.read_base(hf, "granite"),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=not experts and field(hf, "mlp_bias", bool),
        embed_scale=field(hf, "embedding_multiplier", float),
        query_pre_attn_scalar=field(hf, "attention_multiplier", float) ** -2,
        residual_scale=field(hf, "residual_multiplier", float),
        logit_scale=1 / field(hf, "logits_scaling", float),
    )
    if not experts:
        return config
    return dataclasses.replace(
        config,
        num_experts=count(hf, "num_local_experts"),
        experts_per_token=count(hf, "num_experts_per_tok"),
        shared_expert_size=field(hf, "shared_intermediate_size", int, 0),
    )


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`."""
    architecture, kind = "GraniteForCausalLM", "granite"
    special: dict[str, Any] = {"mlp_bias": config.mlp_bias}
    if config.num_experts:
        architecture, kind = "GraniteMoeForCausalLM", "granitemoe"
        special = {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
        }
    if config.shared_expert_size:
        architecture, kind = "GraniteMoeSharedForCausalLM", "granitemoeshared"
        special["shared_intermediate_size"] = config.shared_expert_size
    fields = llama.write_base(config, architecture, kind)
    del fields["head_dim"]  # transformers lacks this field and derives the value
    return {
        **fields,
        **llama.write_rope(config),
        **special,
        "attention_bias": config.qkv_bias,
        "embedding_multiplier": config.embed_scale,
        "attention_multiplier": (config.query_pre_attn_scalar or config.head_dim) ** -0.5,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": 1 / config.logit_scale,
    }


FAMILY = Family(
    name="granite",
    hf=llama.hf_format(
        architectures=("GraniteForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        read_config=read_hf,
        write_config=write_hf,
        names=NAMES,
    ),
)
