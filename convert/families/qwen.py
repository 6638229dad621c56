"""Qwen 2, 2.5 and 3: Llama's architecture with q/k/v biases (2, 2.5) or q/k norms (3); Qwen3-MoE too."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.errors import ConvertError
from convert.families import llama
from convert.families.family import (
    Family,
    GGUFFormat,
    field,
    layer_types,
    read_windows,
    with_fused_experts,
)
from slim_jax.model.config import DecoderConfig

HF_NAMES = dataclasses.replace(
    llama.HF_NAMES,
    block={
        **llama.HF_NAMES.block,
        "moe.router": "mlp.gate",
        "moe.experts.{}.gate": "mlp.experts.{}.gate_proj",
        "moe.experts.{}.up": "mlp.experts.{}.up_proj",
        "moe.experts.{}.down": "mlp.experts.{}.down_proj",
    },
)


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    second, experts = hf["model_type"] == "qwen2", hf["model_type"] == "qwen3_moe"
    base = llama.read_base(hf, "qwen")
    theta, scaling = llama.read_rope(hf)
    windowed = field(hf, "use_sliding_window", bool, False)
    window, global_layers = read_windows(hf, field(hf, "sliding_window", int, None) if windowed else None)
    biased = not second and field(hf, "attention_bias", bool, False)
    return dataclasses.replace(
        base,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=biased or second,
        o_bias=biased,
        qk_norm=not second,
        sliding_window=window,
        global_layers=global_layers,
        **(_read_experts(hf, base) if experts else {}),
    )


def _read_experts(hf: Mapping[str, Any], base: DecoderConfig) -> dict[str, Any]:
    """Reads the fields of a mixture of experts, in which some blocks may have a dense MLP instead."""
    step = field(hf, "decoder_sparse_step", int)
    plain = field(hf, "mlp_only_layers", list, [])
    sparse = [i not in plain and step > 0 and (i + 1) % step == 0 for i in range(base.num_layers)]
    dense = (("num_experts", 0), ("intermediate_size", base.intermediate_size))
    kinds = {} if all(sparse) else {"kinds": (dense, ()), "block_kinds": tuple(map(int, sparse))}
    return {
        **kinds,
        "intermediate_size": field(hf, "moe_intermediate_size", int),
        "num_experts": field(hf, "num_experts", int),
        "experts_per_token": field(hf, "num_experts_per_tok", int),
        "norm_topk": field(hf, "norm_topk_prob", bool),
    }


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`: a Qwen3 if the config has q/k norms, else a Qwen2.

    Raises:
      ConvertError: no class of transformers has this combination of biases, norms and windows.
    """
    third, experts = config.qk_norm, config.num_experts > 0
    if config.o_bias != (config.qkv_bias and third) or not (config.qkv_bias or third):
        raise ConvertError("this combination of biases and q/k norms exists in no class of transformers")
    if experts and (not third or config.global_layers):
        raise ConvertError("experts without q/k norms, or beside global layers, exist in no Qwen")
    architecture, model_type = (
        ("Qwen3MoeForCausalLM", "qwen3_moe") if experts else ("Qwen2ForCausalLM", "qwen2")
    )
    if third and not experts:
        architecture, model_type = "Qwen3ForCausalLM", "qwen3"
    windowed = config.sliding_window is not None
    fields = {
        **llama.write_base(config, architecture, model_type),
        **llama.write_rope(config),
        **({"attention_bias": config.qkv_bias} if third else {}),
        "use_sliding_window": windowed,
        "sliding_window": config.sliding_window,
    }
    dense = [i for i, block in enumerate(config.blocks()) if not block.num_experts]
    if not experts:
        fields["max_window_layers"] = len(config.global_layers) if windowed else config.num_layers
        return {**fields, "layer_types": layer_types(config)}
    if dense:
        fields["intermediate_size"] = config.block(dense[0]).intermediate_size
    return {
        **fields,
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.norm_topk,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


def read_gguf(meta: Mapping[str, Any], tensors: Any) -> DecoderConfig:
    """Reads our config from a GGUF's metadata."""
    return dataclasses.replace(llama.read_gguf(meta, tensors), family="qwen")


FAMILY = Family(
    name="qwen",
    hf=llama.hf_format(
        architectures=("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        read_config=read_hf,
        write_config=write_hf,
        names=HF_NAMES,
        others=(with_fused_experts(HF_NAMES),),
        unused=("max_window_layers",),  # follow from layer_types
    ),
    gguf=GGUFFormat(
        architectures=("qwen2", "qwen3", "qwen3moe"),
        read_config=read_gguf,
        names=llama.GGUF_NAMES,
        ignored=(r"rope_freqs\.weight",),
    ),
)
