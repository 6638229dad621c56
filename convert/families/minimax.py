"""MiniMax M2: experts in every block, half of each head rotated, q/k norms over all heads together."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.families import llama, mixtral
from convert.families.family import Family, count, partial_rotary_factor, require, rotary_dim
from slim_jax.model.config import DecoderConfig

NAMES = dataclasses.replace(
    mixtral.NAMES,
    block={**mixtral.NAMES.block, "moe.score_bias": "block_sparse_moe.e_score_correction_bias"},
)
FIXED: dict[str, Any] = {
    "qk_norm": True,
    "qk_norm_width": "all",
    "router": "sigmoid",
    "router_score_bias": True,
}
"""What all models of the family have."""

REQUIRED = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "shared_intermediate_size": 0,
}
"""Fields of published files, which transformers' class does not know, and their only values here."""

UNUSED = (
    *("rotary_dim", "partial_rotary_factor", "attn_type_list", "mlp_intermediate_size", "shared_moe_mode"),
    *("layernorm_full_attention_beta", "layernorm_linear_attention_beta", "layernorm_mlp_beta"),
    *("use_mtp", "num_mtp_modules", "mtp_transformer_layers"),
)


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    for key, value in REQUIRED.items():
        require(hf, key, value, value)
    base = llama.read_base(hf, "minimax")
    theta, scaling = llama.read_rope(hf, partial=True)
    return dataclasses.replace(
        base,
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=rotary_dim(hf, base.head_dim),
        num_experts=count(hf, "num_local_experts"),
        experts_per_token=count(hf, "num_experts_per_tok"),
        **FIXED,
    )


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`."""
    return {
        **llama.write_base(config, "MiniMaxM2ForCausalLM", "minimax_m2"),
        **llama.write_rope(config),
        "partial_rotary_factor": partial_rotary_factor(config),
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
    }


FAMILY = Family(
    name="minimax",
    hf=llama.hf_format(("MiniMaxM2ForCausalLM",), read_hf, write_hf, NAMES, unused=UNUSED),
)
