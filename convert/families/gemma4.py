"""Gemma 4 (dense, no embeddings for each block): blocks that see all tokens have wider heads, fewer of keys.

In these blocks values may be the keys, and RoPE rotates the fastest pairs alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.errors import ConvertError
from convert.families import gemma, llama
from convert.families.family import Family, field, kinds_of, layer_types, read_windows, require
from slim_jax.model.config import DecoderConfig, Kind
from slim_jax.model.rotary import RopeScaling

NAMES = dataclasses.replace(
    gemma.HF_NAMES, block={**gemma.HF_NAMES.block, "out_scale.factor": "layer_scalar"}
)
FIXED: dict[str, Any] = {
    "output_norms": True,
    "qk_norm": True,
    "value_norm": True,
    "block_scale": True,
    "query_pre_attn_scalar": 1.0,
}
"""What all models of the family have, and no file states."""


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json.

    Raises:
      ConvertError: the model is one that needs more than this decoder has.
    """
    require(hf, "hidden_size_per_layer_input", 0, 0)
    require(hf, "num_kv_shared_layers", 0, 0)
    require(hf, "enable_moe_block", False, False)
    if hf.get("use_bidirectional_attention") == "all":
        raise ConvertError("use_bidirectional_attention is 'all', only causal attention is supported")
    base = llama.read_base(hf, "gemma4", "hidden_activation")
    theta, scaling = llama.read_rope(hf, "sliding_attention")
    window, everywhere = read_windows(hf, field(hf, "sliding_window", int))
    biased = field(hf, "attention_bias", bool)
    seeing_all = [_seeing_all(hf, base, i) if i in everywhere else () for i in range(base.num_layers)]
    return dataclasses.replace(
        base,
        **FIXED,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=biased,
        o_bias=biased,
        embed_scale=base.hidden_size**0.5,
        logit_softcap=field(hf, "final_logit_softcapping", float, None),
        sliding_window=window,
        **kinds_of(seeing_all),
    )


def _seeing_all(hf: Mapping[str, Any], base: DecoderConfig, index: int) -> Kind:
    """Returns what a block that sees all tokens changes; transformers' class has sizes for each block."""
    own = getattr(hf.get("_heterogeneity_spec"), "per_layer_overrides", {}).get(index, {})
    rope = field(field(hf, "rope_parameters", dict), "full_attention", dict)
    require(rope, "rope_type", "proportional", "default")
    portion = field(rope, "partial_rotary_factor", float, 1.0)
    return (
        ("head_dim", field(own, "head_dim", int, base.head_dim)),
        ("num_kv_heads", field(own, "num_key_value_heads", int, base.num_kv_heads)),
        ("rope_theta", field(rope, "rope_theta", float)),
        ("rope_scaling", RopeScaling("proportional", field(rope, "factor", float, 1.0), proportion=portion)),
        ("sliding_window", None),
        ("values_from_keys", field(hf, "attention_k_eq_v", bool)),
    )


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`; the text alone of a model with a tower.

    Raises:
      ConvertError: no block sees all tokens.
    """
    blocks = [block for block in config.blocks() if block.sliding_window is None]
    if not blocks or blocks[0].rope_scaling is None:
        raise ConvertError("no block sees all tokens, which is no Gemma 4")
    one, scaling = blocks[0], blocks[0].rope_scaling
    fields = llama.write_base(config, "Gemma4ForCausalLM", "gemma4_text")
    activation = fields.pop("hidden_act")
    return {
        **fields,
        "hidden_activation": activation,
        "attention_bias": config.qkv_bias,
        "attention_k_eq_v": one.values_from_keys,
        "global_head_dim": one.head_dim,
        "num_global_key_value_heads": one.num_kv_heads,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_theta},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": one.rope_theta,
                "partial_rotary_factor": scaling.proportion,
                "factor": scaling.factor,
            },
        },
    }


FAMILY = Family(
    name="gemma4",
    hf=llama.hf_format(
        architectures=("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
        read_config=read_hf,
        write_config=write_hf,
        names=NAMES,
        unused=("vocab_size_per_layer_input", "use_double_wide_mlp", "use_bidirectional_attention"),
    ),
)
