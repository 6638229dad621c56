"""EXAONE 4: norms only after attention and MLP, and no positions in the blocks that see all tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from convert.families import llama, olmo
from convert.families.family import Family, field, layer_types, read_global_without_positions
from slim_jax.model.config import DecoderConfig


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from the resolved config.json."""
    theta, scaling = llama.read_rope(hf)
    return dataclasses.replace(
        llama.read_base(hf, "exaone"),
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=True,
        input_norms=False,
        output_norms=True,
        **read_global_without_positions(hf, field(hf, "sliding_window", int, None)),
    )


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`."""
    return {
        **llama.write_base(config, "Exaone4ForCausalLM", "exaone4"),
        **llama.write_rope(config),
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
    }


FAMILY = Family(
    name="exaone",
    hf=llama.hf_format(
        ("Exaone4ForCausalLM",), read_hf, write_hf, olmo.NAMES, unused=("sliding_window_pattern",)
    ),
)
