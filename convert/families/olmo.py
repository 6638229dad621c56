"""OLMo 2 and 3: norms only after attention and MLP, queries and keys normalized over all heads together.

Three of four blocks of OLMo 3 have a sliding window, and RoPE without the scaling of the others.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.errors import ConvertError
from convert.families import llama
from convert.families.family import Family, field, layer_types, read_windows
from slim_jax.model.config import DecoderConfig

NAMES = dataclasses.replace(
    llama.HF_NAMES,
    block={
        **{ours: name for ours, name in llama.HF_NAMES.block.items() if "norm" not in ours},
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
        "attn_out_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
)


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json.

    Raises:
      ConvertError: RoPE has a scaling in blocks with a window.
    """
    third = hf["model_type"] == "olmo3"
    theta, scaling = llama.read_rope(hf, "full_attention" if third else None)
    local, other = llama.read_rope(hf, "sliding_attention") if third else (None, None)
    if other is not None:
        raise ConvertError(f"rope_type of sliding_attention is {other.kind!r}, expected default")
    window, global_layers = read_windows(hf, field(hf, "sliding_window", int, None) if third else None)
    biased = field(hf, "attention_bias", bool)
    return dataclasses.replace(
        llama.read_base(hf, "olmo"),
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local,
        qkv_bias=biased,
        o_bias=biased,
        qk_norm=True,
        qk_norm_width="all",
        input_norms=False,
        output_norms=True,
        sliding_window=window,
        global_layers=global_layers,
    )


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`: an OLMo 3 if the config has another RoPE for blocks with a window."""
    third = config.local_rope_theta is not None
    names = ("Olmo3ForCausalLM", "olmo3") if third else ("Olmo2ForCausalLM", "olmo2")
    fields = {**llama.write_base(config, *names), "attention_bias": config.qkv_bias, "pad_token_id": None}
    del fields["head_dim"]  # transformers lacks this field and derives the value
    rope = llama.write_rope(config)
    if not third:
        return {**fields, **rope}
    scaling = rope["rope_scaling"] or {"rope_type": "default"}
    return {
        **fields,
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": config.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.local_rope_theta},
        },
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
    }


FAMILY = Family(
    name="olmo",
    hf=llama.hf_format(
        architectures=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        read_config=read_hf,
        write_config=write_hf,
        names=NAMES,
        unused=("clip_qkv",),  # OLMo's, which its successors lack
    ),
)
