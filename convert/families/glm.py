"""GLM 4 and GLM 4.5 to 4.7: half of each head is rotated, and in GLM 4 the pairs are neighbours.

GLM 4 of April 2025 has norms after attention and MLP too. GLM 4.5 and later are mixtures of experts, with a
shared expert, and dense MLPs in their first blocks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.families import llama, phi, qwen
from convert.families.family import Family, count, field, kinds_of, partial_rotary_factor, rotary_dim
from slim_jax.model.config import DecoderConfig, Kind

NAMES = dataclasses.replace(
    llama.HF_NAMES,
    block={
        **llama.HF_NAMES.block,
        "attn_out_norm": "post_self_attn_layernorm",
        "mlp_out_norm": "post_mlp_layernorm",
        **{f"mlp.{part}": phi.NAMES.block[f"mlp.{part}"] for part in ("gate", "up", "down")},
    },
)
MOE_NAMES = dataclasses.replace(
    qwen.HF_NAMES,
    block={
        **qwen.HF_NAMES.block,
        "moe.score_bias": "mlp.gate.e_score_correction_bias",
        **{f"moe.shared.{part}": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
    },
)
UNUSED = ("partial_rotary_factor",)  # the class has put it into rope_parameters


def _read(hf: Mapping[str, Any], family: str) -> DecoderConfig:
    """Reads the fields that all of them share."""
    base = llama.read_base(hf, family)
    theta, scaling = llama.read_rope(hf, partial=True)
    return dataclasses.replace(
        base,
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=rotary_dim(hf, base.head_dim),
        qkv_bias=field(hf, "attention_bias", bool),
    )


def _write(config: DecoderConfig, architecture: str, model_type: str) -> dict[str, Any]:
    """Inverse of :func:`_read`."""
    return {
        **llama.write_base(config, architecture, model_type),
        **llama.write_rope(config),
        "partial_rotary_factor": partial_rotary_factor(config),
        "attention_bias": config.qkv_bias,
        "pad_token_id": None,  # transformers' default exceeds small vocabularies
    }


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json of a dense model."""
    normed = hf["model_type"] == "glm4"
    return dataclasses.replace(_read(hf, "glm"), output_norms=normed, rotary_interleaved=True)


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`."""
    return _write(
        config, *(("Glm4ForCausalLM", "glm4") if config.output_norms else ("GlmForCausalLM", "glm"))
    )


def read_moe(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json of a mixture of experts."""
    base, inner = _read(hf, "glm_moe"), count(hf, "moe_intermediate_size")
    first = field(hf, "first_k_dense_replace", int)
    dense: Kind = (("num_experts", 0), ("intermediate_size", base.intermediate_size))
    return dataclasses.replace(
        base,
        qk_norm=field(hf, "use_qk_norm", bool),
        intermediate_size=inner,
        num_experts=count(hf, "n_routed_experts"),
        experts_per_token=count(hf, "num_experts_per_tok"),
        norm_topk=field(hf, "norm_topk_prob", bool),
        shared_expert_size=inner * field(hf, "n_shared_experts", int),
        router="sigmoid",
        router_score_bias=True,
        router_groups=count(hf, "n_group"),
        router_top_groups=count(hf, "topk_group"),
        routed_scale=field(hf, "routed_scaling_factor", float),
        **kinds_of([dense if i < first else () for i in range(base.num_layers)]),
    )


def write_moe(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_moe`."""
    dense = [block.intermediate_size for block in config.blocks() if not block.num_experts]
    return {
        **_write(config, "Glm4MoeForCausalLM", "glm4_moe"),
        "use_qk_norm": config.qk_norm,
        "intermediate_size": dense[0] if dense else config.intermediate_size,
        "moe_intermediate_size": config.intermediate_size,
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.norm_topk,
        "n_shared_experts": config.shared_expert_size // config.intermediate_size,
        "n_group": config.router_groups,
        "topk_group": config.router_top_groups,
        "routed_scaling_factor": config.routed_scale,
        "first_k_dense_replace": len(dense),
        "num_nextn_predict_layers": 0,
    }


GLM = Family(
    name="glm",
    hf=llama.hf_format(("GlmForCausalLM", "Glm4ForCausalLM"), read_hf, write_hf, NAMES, unused=UNUSED),
)
GLM_MOE = Family(
    name="glm_moe",
    hf=llama.hf_format(("Glm4MoeForCausalLM",), read_moe, write_moe, MOE_NAMES, unused=UNUSED),
)
