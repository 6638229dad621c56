"""Gemma 2 and 3 (text): norms before and after attention and MLP; local and global blocks.

Gemma 2 caps attention scores and logits. Gemma 3 normalizes queries and keys instead, and its local blocks
use another RoPE base.
"""

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
)
from slim_jax.model.config import DecoderConfig
from slim_jax.model.rotary import RopeScaling

PERIOD_2, PERIOD_3 = 2, 6
"""Distance between global blocks, in Gemma 2 and in Gemma 3."""

HF_NAMES = dataclasses.replace(
    llama.HF_NAMES,
    block={
        **llama.HF_NAMES.block,
        "attn_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
)

GGUF_NAMES = dataclasses.replace(
    llama.GGUF_NAMES,
    block={
        **llama.GGUF_NAMES.block,
        "attn_out_norm": "post_attention_norm",
        "mlp_out_norm": "post_ffw_norm",
    },
)


def _gemma(config: DecoderConfig, **changes: Any) -> DecoderConfig:
    """Adds the fields that all Gemmas share and that no file states."""
    return dataclasses.replace(
        config,
        family="gemma",
        norm_offset=1.0,
        output_norms=True,
        embed_scale=config.hidden_size**0.5,
        **changes,
    )


def _periodic(period: int, layers: int) -> list[bool]:
    """True for each local block, where every ``period``-th block is global."""
    return [(i + 1) % period != 0 for i in range(layers)]


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    third = hf["model_type"] != "gemma2"
    if hf.get("use_bidirectional_attention"):
        raise ConvertError("use_bidirectional_attention is true, only causal attention is supported")
    base = llama.read_base(hf, "gemma", "hidden_activation")
    window, global_layers = read_windows(hf, field(hf, "sliding_window", int, None))
    theta, scaling, local = _read_ropes(hf) if third else (*llama.read_rope(hf), None)
    biased = field(hf, "attention_bias", bool, False)
    return _gemma(
        base,
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local,
        qkv_bias=biased,
        o_bias=biased,
        qk_norm=third,
        query_pre_attn_scalar=field(hf, "query_pre_attn_scalar", float),
        attn_softcap=field(hf, "attn_logit_softcapping", float, None),
        logit_softcap=field(hf, "final_logit_softcapping", float, None),
        sliding_window=window,
        global_layers=global_layers,
    )


def _read_ropes(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None, float]:
    """Returns RoPE base and scaling of Gemma 3's global blocks, and the base of its local blocks.

    Raises:
      ConvertError: the local blocks have a scaling too.
    """
    theta, scaling = llama.read_rope(hf, "full_attention")
    local, other = llama.read_rope(hf, "sliding_attention")
    if other is not None:
        raise ConvertError(
            f"rope_parameters of sliding_attention is {other.kind!r}, only 'default' is supported"
        )
    return theta, scaling, local


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`: a Gemma 3 if the config has q/k norms, else a Gemma 2."""
    third = config.qk_norm
    fields = llama.write_base(
        config, "Gemma3ForCausalLM" if third else "Gemma2ForCausalLM", "gemma3_text" if third else "gemma2"
    )
    scalar = config.query_pre_attn_scalar or config.head_dim
    return {
        **fields,
        **llama.write_rope(config),
        **({"rope_local_base_freq": config.local_rope_theta} if third else {}),
        "hidden_activation": fields.pop("hidden_act"),
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
    }


def read_gguf(meta: Mapping[str, Any], tensors: Any) -> DecoderConfig:
    """Reads our config from a GGUF's metadata, with llama.cpp's defaults for missing keys.

    Raises:
      ConvertError: see :func:`convert.families.llama.read_gguf`.
    """
    third = meta["general.architecture"] == "gemma3"
    base = llama.read_gguf(meta, tensors)
    period = count(meta, "attention.sliding_window_pattern", PERIOD_3 if third else PERIOD_2)
    local = _periodic(period, base.num_layers)
    # No key holds the scale of the scores; like llama.cpp, recognize the 27B models by their block count.
    largest = base.num_layers == (62 if third else 46)
    return _gemma(
        base,
        activation="gelu_tanh",
        local_rope_theta=field(meta, "rope.freq_base_swa", float, 10000.0) if third else None,
        query_pre_attn_scalar=float(base.hidden_size // base.num_heads if largest else base.head_dim),
        attn_softcap=None if third else field(meta, "attn_logit_softcapping", float, 50.0),
        logit_softcap=field(meta, "final_logit_softcapping", float, None if third else 30.0),
        sliding_window=base.sliding_window or 4096,  # early files of Gemma 2 lack the key
        global_layers=tuple(i for i in range(base.num_layers) if not local[i]),
    )


FAMILY = Family(
    name="gemma",
    hf=llama.hf_format(
        architectures=("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        read_config=read_hf,
        write_config=write_hf,
        names=HF_NAMES,
        unused=("sliding_window_pattern", "_sliding_window_pattern", "sliding_window_size", "hidden_act"),
    ),
    gguf=GGUFFormat(
        architectures=("gemma2", "gemma3"),
        read_config=read_gguf,
        names=GGUF_NAMES,
        ignored=(r"rope_freqs\.weight",),
    ),
)
