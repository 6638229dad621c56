"""Qwen3-Next and Qwen 3.5 to 3.8: blocks of linear attention, and of gated attention every fourth block.

llama.cpp stores the value heads of Qwen 3.5's linear attention in another order: first those that come first
at their key heads, then those that come second. Its decay is the rate itself, not the logarithm.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.families import llama, qwen
from convert.families.family import (
    Family,
    GGUFFormat,
    Names,
    Restore,
    count,
    field,
    kinds_of,
    partial_rotary_factor,
    read_mixers,
    require,
    rotary_dim,
    with_fused_experts,
)
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
FIXED: dict[str, Any] = {"norm_offset": 1.0, "qk_norm": True, "output_gate": True}
"""What all models of the families have, and no file states."""

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
    changes = read_mixers(hf, MIXERS, base.num_layers)
    sizes: dict[str, Any] = {ours: count(hf, theirs) for ours, theirs in LINEAR.items()}
    mixture: dict[str, Any] = {}
    if experts:
        mixture = _read_experts(hf)
        step, plain = field(hf, "decoder_sparse_step", int, 1), field(hf, "mlp_only_layers", list, [])
        dense: Kind = (("num_experts", 0), ("intermediate_size", base.intermediate_size))
        changes = [c + dense * (i in plain or (i + 1) % step != 0) for i, c in enumerate(changes)]
    return dataclasses.replace(
        base,
        **FIXED,
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=rotary_dim(hf, base.head_dim),
        qkv_bias=biased,
        o_bias=biased,
        **kinds_of(changes),
        **mixture,
        **sizes,
    )


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
        "partial_rotary_factor": partial_rotary_factor(config),
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


GGUF_LINEAR = {
    **{f"linear_attn.{name}": "attn_qkv" for name in "qkv"},
    "linear_attn.z": "attn_gate",
    "linear_attn.o": "ssm_out",
    "linear_attn.conv": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.log_decay": "ssm_a",
    "linear_attn.decay.bias": "ssm_dt.bias",
}
GGUF_NAMES = dataclasses.replace(
    llama.GGUF_NAMES,
    block={
        **llama.GGUF_NAMES.block,
        **GGUF_LINEAR,
        **{f"moe.shared.{part}": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
        "moe.shared_gate": "ffn_gate_inp_shexp",
        "mlp_norm": "post_attention_norm",
        "linear_attn.beta": "ssm_beta",
        "linear_attn.decay": "ssm_alpha",
    },
)
GGUF_NEXT = dataclasses.replace(
    GGUF_NAMES,
    block={**GGUF_NAMES.block, "linear_attn.beta": "ssm_ba", "linear_attn.decay": "ssm_ba"},
    grouped={"ssm_ba": "linear_key_heads"},
)


def read_gguf(meta: Mapping[str, Any], tensors: Any) -> DecoderConfig:
    """Reads our config from a GGUF's metadata."""
    width = field(meta, "rope.dimension_count", int)
    dense = field(meta, "feed_forward_length", int, 1)  # absent where all blocks have experts
    plain = {k: v for k, v in meta.items() if k not in ("rope.dimension_count", "rope.dimension_sections")}
    base = llama.read_gguf({**plain, "feed_forward_length": dense}, tensors)
    heads, inner = count(meta, "ssm.time_step_rank"), count(meta, "ssm.inner_size")
    every: list[Kind] = []
    for i in range(base.num_layers):
        mixer = MIXERS["linear_attention" if f"blk.{i}.ssm_a" in tensors.shapes else "full_attention"]
        plain_mlp = base.num_experts > 0 and f"blk.{i}.ffn_gate_inp.weight" not in tensors.shapes
        every.append(mixer + (("num_experts", 0), ("intermediate_size", dense)) * plain_mlp)
    return dataclasses.replace(
        base,
        family="qwen3_next" if "blk.0.ssm_ba.weight" in tensors.shapes else "qwen3_5",
        rotary_dim=None if width == base.head_dim else width,
        **FIXED,
        **kinds_of(every),
        shared_expert_size=field(meta, "expert_shared_feed_forward_length", int, 0),
        shared_expert_gate=base.num_experts > 0,
        linear_key_heads=count(meta, "ssm.group_count"),
        linear_value_heads=heads,
        linear_key_dim=count(meta, "ssm.state_size"),
        linear_value_dim=inner // heads,
        conv_size=count(meta, "ssm.conv_kernel"),
    )


def _by_key_head(rows: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """Returns rows of value heads in the order of their key heads."""
    each = rows.reshape(-1, config.linear_key_heads, rows.size // config.linear_value_heads)
    return each.swapaxes(0, 1).reshape(rows.shape)


def _conv_by_key_head(rows: np.ndarray, config: DecoderConfig) -> np.ndarray:
    keys = 2 * config.linear_key_heads * config.linear_key_dim
    return np.concatenate([rows[:keys], _by_key_head(rows[keys:], config)])


def _log(rates: np.ndarray, config: DecoderConfig) -> np.ndarray:
    return np.log(-rates)


BY_KEY_HEAD: dict[str, Restore] = {
    **{f"linear_attn.{name}": _by_key_head for name in ("v", "z", "beta", "decay")},
    "linear_attn.conv": _conv_by_key_head,
    "linear_attn.o": lambda rows, config: _by_key_head(rows.T, config).T,
    "linear_attn.log_decay": lambda rates, config: _log(_by_key_head(rates, config), config),
}


def _family(name: str, architectures: tuple[str, ...], names: Names, gguf: GGUFFormat) -> Family:
    unused = (
        *("full_attention_interval", "attn_output_gate", "mamba_ssm_dtype", "use_sliding_window"),
        *("mrope_section", "mrope_interleaved"),  # of pictures; a text has one position a token
    )
    others = (with_fused_experts(names),)
    return Family(
        name, llama.hf_format(architectures, read_hf, write_hf, names, others=others, unused=unused), gguf
    )


QWEN3_NEXT = _family(
    "qwen3_next",
    (CLASSES["qwen3_next"],),
    dataclasses.replace(
        llama.HF_NAMES,
        block={**BLOCK, **NEXT},
        grouped={QKVZ: "linear_key_heads", BA: "linear_key_heads"},
    ),
    GGUFFormat(("qwen3next",), read_gguf, GGUF_NEXT, {"linear_attn.log_decay": _log}),
)
QWEN3_5 = _family(
    "qwen3_5",
    tuple(
        f"Qwen3_5{size}For{kind}" for size in ("", "Moe") for kind in ("CausalLM", "ConditionalGeneration")
    ),
    dataclasses.replace(llama.HF_NAMES, block={**BLOCK, **LATER}),
    GGUFFormat(("qwen35", "qwen35moe"), read_gguf, GGUF_NAMES, BY_KEY_HEAD),
)
