"""Qwen 2, 2.5 and 3: Llama's architecture with q/k/v biases (2, 2.5) or q/k norms (3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.errors import ConvertError
from convert.families import llama
from convert.families.family import Family, GGUFFormat, HFFormat, field, layer_types, read_windows
from slim_jax.decoder import DecoderConfig


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Our config from config.json, with transformers' defaults for the keys that may be left out."""
    third = "Qwen3ForCausalLM" in hf["architectures"]
    base = llama.read_base(hf, "qwen", kv_heads=32, head_dim=128 if third else None, max_positions=32768)
    theta, scaling = llama.read_rope(hf)
    window = hf.get("sliding_window", 4096) if field(hf, "use_sliding_window", bool, False) else None
    full = field(hf, "max_window_layers", int, 28)
    window, global_layers = read_windows(hf, window, [i >= full for i in range(base.num_layers)])
    biased = third and field(hf, "attention_bias", bool, False)
    return dataclasses.replace(
        base,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=biased or not third,
        o_bias=biased,
        qk_norm=third,
        sliding_window=window,
        global_layers=global_layers,
    )


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of :func:`read_hf`: a Qwen3 where there are q/k norms, a Qwen2 otherwise.

    Raises:
      ConvertError: neither class of transformers has these biases.
    """
    third = config.qk_norm
    if config.o_bias != (config.qkv_bias and third) or not (config.qkv_bias or third):
        raise ConvertError("this combination of biases and q/k norms exists in no class of transformers")
    fields = llama.write_base(
        config, "Qwen3ForCausalLM" if third else "Qwen2ForCausalLM", "qwen3" if third else "qwen2"
    )
    windowed = config.sliding_window is not None
    return {
        **fields,
        **llama.write_rope(config),
        **({"attention_bias": config.qkv_bias} if third else {}),
        "use_sliding_window": windowed,
        "sliding_window": config.sliding_window,
        "max_window_layers": len(config.global_layers) if windowed else config.num_layers,
        "layer_types": layer_types(config),
    }


def read_gguf(meta: Mapping[str, Any], tensors: Any) -> DecoderConfig:
    """Our config from a GGUF's metadata."""
    return dataclasses.replace(llama.read_gguf(meta, tensors), family="qwen")


FAMILY = Family(
    name="qwen",
    hf=HFFormat(
        architectures=("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        read_config=read_hf,
        write_config=write_hf,
        names=llama.HF_NAMES,
        prefix="model.",
        prefixes=("model.",),
        ignored=(r".*rotary_emb\.inv_freq",),
    ),
    gguf=GGUFFormat(
        architectures=("qwen2", "qwen3"),
        read_config=read_gguf,
        names=llama.GGUF_NAMES,
        ignored=(r"rope_freqs\.weight",),
    ),
)
