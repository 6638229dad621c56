"""Qwen3-Next and Qwen 3.5 to 3.8: blocks of linear attention, and of gated attention every fourth block.

What the checkpoints hold besides the language model, a vision tower and layers that predict several tokens at
once (MTP), is not read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.errors import ConvertError
from convert.families import llama, qwen
from convert.families.family import Family, HFFormat, Names, count, field, require
from slim_jax.model.config import DecoderConfig, Kind

LINEAR: Kind = (("mixer", "gated_delta"),)
MIXERS = {"linear_attention": LINEAR, "full_attention": ()}
"""transformers' names of kinds of blocks -> what they change in our config."""

LINEAR_FIELDS = {
    "linear_key_heads": ("linear_num_key_heads", 16),
    "linear_value_heads": ("linear_num_value_heads", 32),
    "linear_key_dim": ("linear_key_head_dim", 128),
    "linear_value_dim": ("linear_value_head_dim", 128),
    "conv_size": ("linear_conv_kernel_dim", 4),
}
"""Our fields -> transformers', and its default."""


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from config.json, with transformers' defaults for missing keys."""
    hf = {**hf, **field(hf, "text_config", dict, {}), "architectures": hf["architectures"]}
    architecture = hf["architectures"][0]
    next_, experts = "Next" in architecture, "Next" in architecture or "Moe" in architecture
    if experts:
        hf = {"intermediate_size": 5632, "num_key_value_heads": 2, **hf}
    family = "qwen3_next" if next_ else "qwen3_5"
    base = llama.read_base(hf, family, kv_heads=4, head_dim=256, max_positions=32768)
    require(hf, "hidden_act", "silu", "silu")
    theta, scaling = llama.read_rope(hf, partial=True)
    biased = field(hf, "attention_bias", bool, False)
    changes = _read_mixers(hf, base.num_layers)
    mixture: dict[str, Any] = {}
    if experts:
        mixture = _read_experts(hf, next_)
        dense = (("intermediate_size", base.intermediate_size), ("num_experts", 0), ("shared_expert_size", 0))
        step, plain = field(hf, "decoder_sparse_step", int, 1), field(hf, "mlp_only_layers", list, [])
        changes = [c + dense * (i in plain or (i + 1) % step != 0) for i, c in enumerate(changes)]
    kinds = tuple(dict.fromkeys(changes))
    return dataclasses.replace(
        base,
        norm_offset=1.0,
        qk_norm=True,
        output_gate=True,
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=llama.rotary_dim(hf, base.head_dim, 0.25),
        qkv_bias=biased,
        o_bias=biased,
        kinds=kinds,
        block_kinds=tuple(map(kinds.index, changes)),
        **mixture,
        **{ours: count(hf, key, default) for ours, (key, default) in LINEAR_FIELDS.items()},
    )


def _read_mixers(hf: Mapping[str, Any], layers: int) -> list[Kind]:
    interval = count(hf, "full_attention_interval", 4)
    default = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)]
    types = field(hf, "layer_types", list, default)
    unknown = [kind for kind in types if kind not in MIXERS]
    if unknown or len(types) != layers:
        found = repr(unknown[0]) if unknown else f"{len(types)} entries"
        raise ConvertError(f"layer_types has {found}, expected {layers} of {' or '.join(MIXERS)}")
    return [MIXERS[kind] for kind in types]


def _read_experts(hf: Mapping[str, Any], next_: bool) -> dict[str, Any]:
    return {
        "intermediate_size": count(hf, "moe_intermediate_size", 512),
        "num_experts": count(hf, "num_experts", 512 if next_ else 256),
        "experts_per_token": count(hf, "num_experts_per_tok", 10 if next_ else 8),
        "norm_topk": field(hf, "norm_topk_prob", bool, True),
        "shared_expert_size": count(hf, "shared_expert_intermediate_size", 512),
        "shared_expert_gate": True,
    }


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`, without a tower."""
    experts, next_ = config.num_experts > 0, config.family == "qwen3_next"
    architecture, kind = (
        ("Qwen3NextForCausalLM", "qwen3_next") if next_ else ("Qwen3_5ForCausalLM", "qwen3_5_text")
    )
    if experts and not next_:
        architecture, kind = "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"
    blocks = config.blocks()
    fields = {
        **llama.write_base(config, architecture, kind),
        **llama.write_rope(config),
        "partial_rotary_factor": (config.rotary_dim or config.head_dim) / config.head_dim,
        "attention_bias": config.qkv_bias,
        "layer_types": [{change: name for name, change in MIXERS.items()}[_mixer(b)] for b in blocks],
        **{key: getattr(config, ours) for ours, (key, _) in LINEAR_FIELDS.items()},
    }
    if not experts:
        return fields
    dense = [i for i, block in enumerate(blocks) if not block.num_experts]
    return {
        **fields,
        "intermediate_size": blocks[dense[0]].intermediate_size if dense else 5632,
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.norm_topk,
        "shared_expert_intermediate_size": config.shared_expert_size,
        "mlp_only_layers": dense,
    }


def _mixer(block: DecoderConfig) -> Kind:
    return LINEAR if block.mixer == "gated_delta" else ()


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
NEXT = {
    **{f"linear_attn.{name}": "linear_attn.in_proj_qkvz" for name in "qkvz"},
    "linear_attn.beta": "linear_attn.in_proj_ba",
    "linear_attn.decay": "linear_attn.in_proj_ba",
}
LATER = {
    **{f"linear_attn.{name}": "linear_attn.in_proj_qkv" for name in "qkv"},
    "linear_attn.z": "linear_attn.in_proj_z",
    "linear_attn.beta": "linear_attn.in_proj_b",
    "linear_attn.decay": "linear_attn.in_proj_a",
}


def _family(name: str, architectures: tuple[str, ...], names: Names) -> Family:
    form = HFFormat(
        architectures,
        read_hf,
        write_hf,
        names,
        prefix="model.",
        prefixes=("model.language_model.", "language_model.model.", "model."),
        ignored=(r"mtp\..*", r"visual\..*"),
    )
    return Family(name, form)


FAMILIES = (
    _family(
        "qwen3_next",
        ("Qwen3NextForCausalLM",),
        dataclasses.replace(
            llama.HF_NAMES, block={**BLOCK, **NEXT}, alternating=dict.fromkeys(NEXT, "linear_key_heads")
        ),
    ),
    _family(
        "qwen3_5",
        tuple(
            f"Qwen3_5{kind}"
            for kind in (
                *("ForCausalLM", "MoeForCausalLM"),
                *("ForConditionalGeneration", "MoeForConditionalGeneration"),
            )
        ),
        dataclasses.replace(llama.HF_NAMES, block={**BLOCK, **LATER}),
    ),
)
