"""gpt-oss: attention with sinks, in a window in every other block; experts with biases and a clamped gate."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.errors import ConvertError
from convert.families import llama
from convert.families.family import (
    Family,
    GGUFFormat,
    count,
    field,
    layer_types,
    read_windows,
    require,
)
from slim_jax.model.config import DecoderConfig

EXPERTS = {
    f"moe.experts.{{}}.{part}.{leaf}": f"mlp.experts.{theirs}{suffix}"
    for part, theirs in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj"))
    for leaf, suffix in (("weight", ""), ("bias", "_bias"))
}
NAMES = dataclasses.replace(
    llama.HF_NAMES,
    block={
        **llama.HF_NAMES.block,
        **EXPERTS,
        "attn.sinks": "self_attn.sinks",
        "moe.router": "mlp.router",
    },
    transposed=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    grouped=dict.fromkeys(
        ("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"), "intermediate_size"
    ),  # rows of gate and up alternate
)


GGUF_NAMES = dataclasses.replace(
    llama.GGUF_NAMES,
    block={**llama.GGUF_NAMES.block, "attn.sinks": "attn_sinks.weight", "mlp_norm": "post_attention_norm"},
)
FIXED: dict[str, Any] = {
    "activation": "gelu_quick",
    "attn_sinks": True,
    "mlp_bias": True,
    "router_bias": True,
}
"""What all models of the family have, and no file states."""


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    require(hf, "hidden_act", "silu", "silu")
    require(hf, "swiglu_alpha", 1.702, 1.702)
    theta, scaling = llama.read_rope(hf)
    window, global_layers = read_windows(hf, field(hf, "sliding_window", int, None))
    biased = field(hf, "attention_bias", bool)
    return dataclasses.replace(
        llama.read_base(hf, "gpt_oss"),
        rope_theta=theta,
        rope_scaling=scaling,
        glu_limit=field(hf, "swiglu_limit", float),
        qkv_bias=biased,
        o_bias=biased,
        num_experts=count(hf, "num_local_experts"),
        experts_per_token=count(hf, "num_experts_per_tok"),
        sliding_window=window,
        global_layers=global_layers,
        **FIXED,
    )


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`.

    Raises:
      ConvertError: gpt-oss does not have this combination of biases.
    """
    if config.qkv_bias != config.o_bias:
        raise ConvertError("this combination of biases exists in no class of transformers")
    return {
        **llama.write_base(dataclasses.replace(config, activation="silu"), "GptOssForCausalLM", "gpt_oss"),
        **llama.write_rope(config),
        "attention_bias": config.qkv_bias,
        "swiglu_limit": config.glu_limit,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
    }


def read_gguf(meta: Mapping[str, Any], tensors: Any) -> DecoderConfig:
    """Reads our config from a GGUF's metadata, in which transformers' defaults are not repeated."""
    require(meta, "rope.scaling.type", "yarn", "yarn")
    base = llama.read_gguf({k: v for k, v in meta.items() if not k.startswith("rope.scaling")}, tensors)
    yarn = {
        "factor": meta.get("rope.scaling.factor"),
        "original_max_position_embeddings": meta.get("rope.scaling.original_context_length"),
        "beta_fast": meta.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": meta.get("rope.scaling.yarn_beta_slow"),
        "truncate": False,
    }
    return dataclasses.replace(
        base,
        family="gpt_oss",
        rope_scaling=llama.read_yarn(yarn, base.max_positions),
        glu_limit=7.0,
        norm_topk=True,
        global_layers=tuple(range(1, base.num_layers, 2)),
        **FIXED,
    )


FAMILY = Family(
    name="gpt_oss",
    hf=llama.hf_format(
        architectures=("GptOssForCausalLM",),
        read_config=read_hf,
        write_config=write_hf,
        names=NAMES,
        unused=("initial_context_length", "swiglu_alpha", "experts_per_token"),
    ),
    gguf=GGUFFormat(architectures=("gpt-oss",), read_config=read_gguf, names=GGUF_NAMES),
)
