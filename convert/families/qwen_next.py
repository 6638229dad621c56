"""Qwen3-Next and Qwen 3.5 to 3.8: blocks of linear attention, and of gated attention every fourth block."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.errors import ConvertError
from convert.families import llama, qwen
from convert.families.family import Family, Names, count, field, require, with_fused_experts
from slim_jax.model.config import DecoderConfig, Kind

MIXERS: dict[str, Kind] = {"linear_attention": (("mixer", "gated_delta"),), "full_attention": ()}
"""transformers' names of kinds of blocks -> what they change in our config."""

LINEAR = {
    "linear_key_heads": "linear_num_key_heads",
    "linear_value_heads": "linear_num_value_heads",
    "linear_key_dim": "linear_key_head_dim",
    "linear_value_dim": "linear_value_head_dim",
    "conv_size": "linear_conv_kernel_dim",
}
CLASSES = {
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    kind, experts = hf["model_type"], hf["model_type"] != "qwen3_5_text"
    base = llama.read_base(hf, "qwen3_next" if kind == "qwen3_next" else "qwen3_5")
    require(hf, "hidden_act", "silu", "silu")
    theta, scaling = llama.read_rope(hf, partial=True)
    biased = field(hf, "attention_bias", bool)
    changes = _read_mixers(hf, base.num_layers)
    mixture: dict[str, Any] = {}
    if experts:
        mixture = _read_experts(hf)
        step, plain = field(hf, "decoder_sparse_step", int, 1), field(hf, "mlp_only_layers", list, [])
        dense: Kind = (("num_experts", 0), ("intermediate_size", base.intermediate_size))
        changes = [c + dense * (i in plain or (i + 1) % step != 0) for i, c in enumerate(changes)]
    kinds = tuple(dict.fromkeys(changes))
    return dataclasses.replace(
        base,
        norm_offset=1.0,
        qk_norm=True,
        output_gate=True,
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=llama.rotary_dim(hf, base.head_dim),
        qkv_bias=biased,
        o_bias=biased,
        kinds=kinds,
        block_kinds=tuple(map(kinds.index, changes)),
        **mixture,
        **{ours: count(hf, theirs) for ours, theirs in LINEAR.items()},
    )


def _read_mixers(hf: Mapping[str, Any], layers: int) -> list[Kind]:
    types = field(hf, "layer_types", list)
    unknown = [kind for kind in types if kind not in MIXERS]
    if unknown or len(types) != layers:
        found = repr(unknown[0]) if unknown else f"{len(types)} entries"
        raise ConvertError(f"layer_types has {found}, expected {layers} of {' or '.join(MIXERS)}")
    return [MIXERS[kind] for kind in types]


def _read_experts(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "intermediate_size": count(hf, "moe_intermediate_size"),
        "num_experts": count(hf, "num_experts"),
        "experts_per_token": count(hf, "num_experts_per_tok"),
        "norm_topk": field(hf, "norm_topk_prob", bool, True),
        "shared_expert_size": count(hf, "shared_expert_intermediate_size"),
        "shared_expert_gate": True,
    }


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`; the text alone of a model with a tower."""
    kind = "qwen3_5_moe_text" if config.num_experts else "qwen3_5_text"
    kind = "qwen3_next" if config.family == "qwen3_next" else kind
    blocks = config.blocks()
    linear = [block.mixer == "gated_delta" for block in blocks]
    fields = {
        **llama.write_base(config, CLASSES[kind], kind),
        **llama.write_rope(config),
        "partial_rotary_factor": (config.rotary_dim or config.head_dim) / config.head_dim,
        "attention_bias": config.qkv_bias,
        "layer_types": ["linear_attention" if is_linear else "full_attention" for is_linear in linear],
        **{theirs: getattr(config, ours) for ours, theirs in LINEAR.items()},
    }
    if not config.num_experts:
        return fields
    dense = {i: block.intermediate_size for i, block in enumerate(blocks) if not block.num_experts}
    return {
        **fields,
        "intermediate_size": max(dense.values(), default=config.intermediate_size),
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.norm_topk,
        "shared_expert_intermediate_size": config.shared_expert_size,
        "mlp_only_layers": list(dense),
    }


BLOCK = {
    **qwen.HF_NAMES.block,
    **{f"moe.shared.{part}": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
    "moe.shared_gate": "mlp.shared_expert_gate",
    "linear_attn.conv": "linear_attn.conv1d",
    "linear_attn.norm": "linear_attn.norm",
    "linear_attn.o": "linear_attn.out_proj",
    "linear_attn.log_decay": "linear_attn.A_log",
    "linear_attn.decay.bias": "linear_attn.dt_bias",
}
QKVZ, BA = "linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"
NEXT = {**{f"linear_attn.{name}": QKVZ for name in "qkvz"}, "linear_attn.beta": BA, "linear_attn.decay": BA}
LATER = {
    **{f"linear_attn.{name}": "linear_attn.in_proj_qkv" for name in "qkv"},
    "linear_attn.z": "linear_attn.in_proj_z",
    "linear_attn.beta": "linear_attn.in_proj_b",
    "linear_attn.decay": "linear_attn.in_proj_a",
}


def _family(name: str, architectures: tuple[str, ...], names: Names) -> Family:
    unused = ("full_attention_interval", "attn_output_gate", "mamba_ssm_dtype", "use_sliding_window")
    multimodal = ("mrope_section", "mrope_interleaved")  # of pictures; all of a text's positions are equal
    others, unused = (with_fused_experts(names),), (*unused, *multimodal)
    return Family(
        name, llama.hf_format(architectures, read_hf, write_hf, names, others=others, unused=unused)
    )


QWEN3_NEXT = _family(
    "qwen3_next",
    (CLASSES["qwen3_next"],),
    dataclasses.replace(
        llama.HF_NAMES,
        block={**BLOCK, **NEXT},
        grouped={QKVZ: "linear_key_heads", BA: "linear_key_heads"},
    ),
)
QWEN3_5 = _family(
    "qwen3_5",
    tuple(
        f"Qwen3_5{size}For{kind}" for size in ("", "Moe") for kind in ("CausalLM", "ConditionalGeneration")
    ),
    dataclasses.replace(llama.HF_NAMES, block={**BLOCK, **LATER}),
)
