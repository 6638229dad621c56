"""SmolLM3: Llama's architecture, in which some blocks have no positions (NoPE)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from convert.errors import ConvertError
from convert.families import llama
from convert.families.family import Family, GGUFFormat, field, layer_types, read_windows
from slim_jax.model.config import DecoderConfig

WITHOUT, WITH = 0, 1
"""Kinds of blocks, without and with RoPE; the same values as in ``no_rope_layers``."""


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json.

    Raises:
      ConvertError: ``no_rope_layers`` does not have one entry per block.
    """
    base = llama.read_base(hf, "smollm")
    theta, scaling = llama.read_rope(hf)
    rotary = field(hf, "no_rope_layers", list)
    if len(rotary) != base.num_layers:
        raise ConvertError(
            f"no_rope_layers has {len(rotary)} entries, expected num_hidden_layers = {base.num_layers}"
        )
    window = field(hf, "sliding_window", int, None) if field(hf, "use_sliding_window", bool, False) else None
    window, global_layers = read_windows(hf, window)
    biased = field(hf, "attention_bias", bool, False)
    return dataclasses.replace(
        base,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=field(hf, "mlp_bias", bool, False),
        sliding_window=window,
        global_layers=global_layers,
        **kinds_of(rotary),
    )


def kinds_of(rotary: Sequence[Any]) -> dict[str, Any]:
    """Returns the kinds of blocks, of which each has RoPE or has not."""
    if all(rotary):
        return {}
    kinds = ((("positions", "none"),), ())
    return {"kinds": kinds, "block_kinds": tuple(WITH if has else WITHOUT for has in rotary)}


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`.

    Raises:
      ConvertError: no class of transformers has this combination of biases.
    """
    if config.qkv_bias != config.o_bias:
        raise ConvertError("this combination of biases exists in no class of transformers")
    return {
        **llama.write_base(config, "SmolLM3ForCausalLM", "smollm3"),
        **llama.write_rope(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(block.positions == "rotary") for block in config.blocks()],
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
    }


def read_gguf(meta: Mapping[str, Any], tensors: Any) -> DecoderConfig:
    """Reads our config from a GGUF's metadata; as in llama.cpp, every fourth block has no positions."""
    base = llama.read_gguf(meta, tensors)
    rotary = [(i + 1) % 4 != 0 for i in range(base.num_layers)]
    return dataclasses.replace(base, family="smollm", **kinds_of(rotary))


FAMILY = Family(
    name="smollm",
    hf=llama.hf_format(
        architectures=("SmolLM3ForCausalLM",),
        read_config=read_hf,
        write_config=write_hf,
        names=llama.HF_NAMES,
        unused=("no_rope_layer_interval", "max_window_layers"),
    ),
    gguf=GGUFFormat(
        architectures=("smollm3",),
        read_config=read_gguf,
        names=llama.GGUF_NAMES,
        restore={"attn.q": llama.uninterleave, "attn.k": llama.uninterleave},
        ignored=(r"rope_freqs\.weight",),
    ),
)
