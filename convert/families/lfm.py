"""LFM2: short convolutions in place of attention in most blocks; queries and keys are normalized."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.families import llama
from convert.families.family import Family, Names, count, field, kinds_of, read_mixers, require
from slim_jax.model.config import DecoderConfig, Kind

MIXERS: dict[str, Kind] = {"conv": (("mixer", "short_conv"),), "full_attention": ()}
"""transformers' names of kinds of blocks -> what they change in our config."""

UNUSED = (
    *("full_attn_idxs", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "block_dim"),
    *("block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_xavier_init"),
)
"""Fields of published files that say the same as others, or how weights were initialized."""

NAMES = Names(
    outer={"embed": "embed_tokens", "norm": "embedding_norm", "head": "lm_head"},
    blocks="layers.{}.",
    block={
        "attn_norm": "operator_norm",
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.out_proj",
        "attn.q_norm": "self_attn.q_layernorm",
        "attn.k_norm": "self_attn.k_layernorm",
        "short_conv.into": "conv.in_proj",
        "short_conv.outof": "conv.in_proj",
        "short_conv.value": "conv.in_proj",
        "short_conv.conv": "conv.conv",
        "short_conv.o": "conv.out_proj",
        "mlp_norm": "ffn_norm",
        "mlp.gate": "feed_forward.w1",
        "mlp.up": "feed_forward.w3",
        "mlp.down": "feed_forward.w2",
    },
)


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json.

    Raises:
      ConvertError: ``layer_types`` names another kind of block, or not one per block.
    """
    require(hf, "conv_bias", False, False)
    require(hf, "block_use_swiglu", True, True)
    require(hf, "use_pos_enc", True, True)
    theta, scaling = llama.read_rope(hf)
    base = llama.read_base(hf, "lfm", activation_key=None, eps_key="norm_eps")
    return dataclasses.replace(
        base,
        intermediate_size=_inner(hf, base.intermediate_size),
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=True,
        conv_size=count(hf, "conv_L_cache"),
        **kinds_of(read_mixers(hf, MIXERS, base.num_layers)),
    )


def _inner(hf: Mapping[str, Any], size: int) -> int:
    """Returns the MLP's size, which the class derives from the field."""
    factor = field(hf, "block_ffn_dim_multiplier", float, 1.0)
    multiple = count(hf, "block_multiple_of")
    if not field(hf, "block_auto_adjust_ff_dim", bool):
        return size
    return -(-int(factor * int(2 * size / 3)) // multiple) * multiple


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`."""
    fields = llama.write_base(config, "Lfm2ForCausalLM", "lfm2")
    eps = fields.pop("rms_norm_eps")
    del fields["head_dim"], fields["hidden_act"]  # transformers lacks these fields
    return {
        **fields,
        **llama.write_rope(config),
        "norm_eps": eps,
        "conv_L_cache": config.conv_size,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["full_attention" if b.mixer == "attention" else "conv" for b in config.blocks()],
    }


FAMILY = Family(
    name="lfm",
    hf=llama.hf_format(
        architectures=("Lfm2ForCausalLM",),
        read_config=read_hf,
        write_config=write_hf,
        names=NAMES,
        unused=UNUSED,
    ),
)
