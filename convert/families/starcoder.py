"""StarCoder 2: LayerNorm, an MLP without a gate, and biases everywhere."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.families import llama
from convert.families.family import Family, field
from slim_jax.model.config import DecoderConfig

NAMES = dataclasses.replace(
    llama.HF_NAMES, block={**llama.HF_NAMES.block, "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
)


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    theta, scaling = llama.read_rope(hf)
    biased = field(hf, "use_bias", bool)
    return dataclasses.replace(
        llama.read_base(hf, "starcoder", eps_key="norm_epsilon"),
        norm="layer",
        gated=False,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=biased,
        sliding_window=field(hf, "sliding_window", int, None),
    )


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`."""
    fields = llama.write_base(config, "Starcoder2ForCausalLM", "starcoder2")
    eps = fields.pop("rms_norm_eps")
    del fields["head_dim"]  # transformers lacks this field and derives the value
    return {
        **fields,
        **llama.write_rope(config),
        "norm_epsilon": eps,
        "use_bias": config.mlp_bias,
        "sliding_window": config.sliding_window,
    }


UNUSED = ("residual_dropout", "embedding_dropout", "mlp_type", "norm_type")

FAMILY = Family(
    name="starcoder",
    hf=llama.hf_format(("Starcoder2ForCausalLM",), read_hf, write_hf, NAMES, unused=UNUSED),
)
