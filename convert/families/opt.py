"""OPT, 125M to 66B: LayerNorm, learned positions, plain MLP, biases; 350M is post-norm with projections."""

from collections.abc import Mapping
from typing import Any

from convert.errors import ConvertError
from convert.families.family import (
    Family,
    HFFormat,
    Names,
    activation,
    count,
    field,
    hf_activation,
    one_or_list,
    require,
    token_ids,
)
from slim_jax.model.config import DecoderConfig

POSITION_OFFSET = 2
"""Rows of the position embedding before position 0."""

NAMES = Names(
    outer={
        "embed": "embed_tokens",
        "embed_positions": "embed_positions",
        "project_in": "project_in",
        "project_out": "project_out",
        "norm": "final_layer_norm",
        "head": "lm_head",
    },
    blocks="layers.{}.",
    block={
        "attn_norm": "self_attn_layer_norm",
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.out_proj",
        "mlp_norm": "final_layer_norm",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
    },
)


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    require(hf, "layer_norm_elementwise_affine", True, True)
    heads, hidden = count(hf, "num_attention_heads"), count(hf, "hidden_size")
    embed, biased = field(hf, "word_embed_proj_dim", int, hidden), field(hf, "enable_bias", bool, True)
    pre_norm = field(hf, "do_layer_norm_before", bool)
    return DecoderConfig(
        family="opt",
        vocab_size=field(hf, "vocab_size", int),
        hidden_size=hidden,
        intermediate_size=field(hf, "ffn_dim", int),
        num_layers=count(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=field(hf, "max_position_embeddings", int),
        norm="layer",
        pre_norm=pre_norm,
        final_norm=pre_norm and not field(hf, "_remove_final_layer_norm", bool, False),
        positions="learned",
        position_offset=POSITION_OFFSET,
        gated=False,
        activation=activation(hf, "activation_function"),
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=biased,
        tied_head=field(hf, "tie_word_embeddings", bool),
        embed_size=None if embed == hidden else embed,
        bos_token_id=field(hf, "bos_token_id", int, None),
        eos_token_ids=token_ids(hf.get("eos_token_id")),
    )


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`.

    Raises:
      ConvertError: some linear layers have a bias and others do not.
    """
    if not config.qkv_bias == config.o_bias == config.mlp_bias:
        raise ConvertError("OPT has biases in all linear layers or in none")
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_dim": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "do_layer_norm_before": config.pre_norm,
        "_remove_final_layer_norm": config.pre_norm and not config.final_norm,
        "word_embed_proj_dim": config.embed_size or config.hidden_size,
        "activation_function": hf_activation(config),
        "enable_bias": config.qkv_bias,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": one_or_list(config.eos_token_ids),
    }


FAMILY = Family(
    name="opt",
    hf=HFFormat(
        architectures=("OPTForCausalLM",),
        read_config=read_hf,
        write_config=write_hf,
        names=NAMES,
        prefix="model.decoder.",
        prefixes=("model.decoder.", "decoder.", "model."),
    ),
)
