"""Llama 1, 2 and 3, SmolLM2 and Mistral: RMSNorm, RoPE, gated MLP, grouped-query attention."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert.errors import ConvertError
from convert.families.family import (
    Family,
    GGUFFormat,
    HFFormat,
    Names,
    activation,
    count,
    field,
    hf_activation,
    one_or_list,
    optional,
    require,
    token_ids,
)
from slim_jax.model.config import DecoderConfig
from slim_jax.model.rotary import RopeScaling, frequencies

HF_NAMES = Names(
    outer={"embed": "embed_tokens", "norm": "norm", "head": "lm_head"},
    blocks="layers.{}.",
    block={
        "attn_norm": "input_layernorm",
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.o": "self_attn.o_proj",
        "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    },
)

GGUF_NAMES = Names(
    outer={"embed": "token_embd", "norm": "output_norm", "head": "output"},
    blocks="blk.{}.",
    block={
        "attn_norm": "attn_norm",
        "attn.q": "attn_q",
        "attn.k": "attn_k",
        "attn.v": "attn_v",
        "attn.o": "attn_output",
        "attn.q_norm": "attn_q_norm",
        "attn.k_norm": "attn_k_norm",
        "mlp_norm": "ffn_norm",
        "mlp.gate": "ffn_gate",
        "mlp.up": "ffn_up",
        "mlp.down": "ffn_down",
    },
)


def rope_fields(hf: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Returns config.json's RoPE fields, from old and new keys, and the kind of scaling."""
    rope = {**field(hf, "rope_scaling", dict, {}), **field(hf, "rope_parameters", dict, {})}
    return rope, rope.get("rope_type", rope.get("type", "default"))


def rotary_dim(hf: Mapping[str, Any], head_dim: int, default: float = 1.0) -> int | None:
    """Returns the number of a head's features that RoPE rotates; None for all.

    ``default`` is the fraction of ``head_dim`` if config.json has none.
    """
    rope, _ = rope_fields(hf)
    fraction = field({**hf, **rope}, "partial_rotary_factor", float, default)
    return None if fraction == 1 else int(head_dim * fraction)


def read_rope(
    hf: Mapping[str, Any], theta: float = 10000.0, *, partial: bool = False
) -> tuple[float, RopeScaling | None]:
    """Returns base and scaling of RoPE, from ``rope_parameters`` or the two older keys.

    Args:
      hf: config.json.
      theta: the base if config.json has none.
      partial: if True, RoPE may rotate a part of each head, see :func:`rotary_dim`.

    Raises:
      ConvertError: the kind of scaling is not supported.
    """
    rope, kind = rope_fields(hf)
    theta = field(rope, "rope_theta", float, field(hf, "rope_theta", float, theta))
    if not partial:
        require({**hf, **rope}, "partial_rotary_factor", 1.0, 1.0)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", field(rope, "factor", float))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            field(rope, "factor", float),
            field(rope, "low_freq_factor", float),
            field(rope, "high_freq_factor", float),
            field(rope, "original_max_position_embeddings", int),
        )
    raise ConvertError(f"rope_scaling type is {kind!r}, expected default, linear or llama3")


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_rope`, with the keys that transformers 4 and 5 both read."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope["original_max_position_embeddings"] = scaling.original_max_positions
    return {"rope_theta": config.rope_theta, "rope_scaling": rope}


def read_base(
    hf: Mapping[str, Any],
    family: str,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    max_positions: int,
    norm_eps: float = 1e-6,
    tied: bool = False,
    activation_key: str = "hidden_act",
    default_activation: str = "silu",
) -> DecoderConfig:
    """Reads the fields that all descendants of Llama share; the other fields keep their defaults.

    Args:
      hf: config.json.
      family: the family's name.
      kv_heads: default of ``num_key_value_heads``; None for the number of heads.
      head_dim: default of ``head_dim``; None for ``hidden_size / num_attention_heads``.
      max_positions: default of ``max_position_embeddings``.
      norm_eps: default of ``rms_norm_eps``.
      tied: default of ``tie_word_embeddings``.
      activation_key: the key that names the activation function.
      default_activation: the activation function if that key is missing.

    Raises:
      ConvertError: a value is missing or of another type.
    """
    heads, hidden = count(hf, "num_attention_heads"), count(hf, "hidden_size")
    return DecoderConfig(
        family=family,
        vocab_size=field(hf, "vocab_size", int),
        hidden_size=hidden,
        intermediate_size=field(hf, "intermediate_size", int),
        num_layers=count(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=field(hf, "num_key_value_heads", int, kv_heads or heads),
        head_dim=field(hf, "head_dim", int, head_dim or hidden // heads),
        max_positions=field(hf, "max_position_embeddings", int, max_positions),
        norm_eps=field(hf, "rms_norm_eps", float, norm_eps),
        activation=activation(hf, activation_key, default_activation),
        tied_head=field(hf, "tie_word_embeddings", bool, tied),
        bos_token_id=field(hf, "bos_token_id", int, None),
        eos_token_ids=token_ids(hf.get("eos_token_id")),
    )


def write_base(config: DecoderConfig, architecture: str, model_type: str) -> dict[str, Any]:
    """Inverse of :func:`read_base`."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": hf_activation(config),
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": one_or_list(config.eos_token_ids),
    }


def read_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads our config from config.json, with transformers' defaults for missing keys."""
    mistral = "MistralForCausalLM" in hf["architectures"]
    kv_heads, max_positions = (8, 131072) if mistral else (None, 2048)
    theta, scaling = read_rope(hf)
    biased = not mistral and field(hf, "attention_bias", bool, False)
    return dataclasses.replace(
        read_base(hf, "llama", kv_heads=kv_heads, max_positions=max_positions),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=not mistral and field(hf, "mlp_bias", bool, False),
        sliding_window=optional(hf, "sliding_window", int, 4096) if mistral else None,
    )


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`: a Mistral if the config has a window, else a Llama.

    Raises:
      ConvertError: no class of transformers has this combination of biases and window.
    """
    mistral = config.sliding_window is not None
    if config.qkv_bias != config.o_bias or (mistral and (config.qkv_bias or config.mlp_bias)):
        raise ConvertError("this combination of biases and sliding window exists in no class of transformers")
    if mistral:
        base = write_base(config, "MistralForCausalLM", "mistral")
        return {**base, **write_rope(config), "sliding_window": config.sliding_window}
    base = write_base(config, "LlamaForCausalLM", "llama")
    return {
        **base,
        **write_rope(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def _shortest(value: float) -> float:
    """Shortest decimal that rounds to this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def read_gguf_rope(meta: Mapping[str, Any], tensors: Any, head_dim: int, theta: float) -> RopeScaling | None:
    """Returns a GGUF's RoPE scaling. As in llama.cpp, the default type is linear, and factor 0 means none.

    Llama 3's scaling is stored as factors in ``rope_freqs`` instead.

    Raises:
      ConvertError: another kind of scaling, or factors that do not follow Llama 3's formula.
    """
    kind = field(meta, "rope.scaling.type", str, "linear")
    if kind not in ("none", "linear"):
        raise ConvertError(f"rope.scaling.type is {kind!r}, expected none or linear")
    require(meta, "rope.scaling.attn_factor", 1.0, 1.0)
    factor = field(meta, "rope.scaling.factor", float, field(meta, "rope.scale_linear", float, 0.0))
    if factor < 0:
        raise ConvertError(f"rope.scaling.factor is {factor}, expected a positive number")
    linear = None if kind == "none" or factor in (0.0, 1.0) else RopeScaling("linear", factor)
    if "rope_freqs.weight" not in tensors.shapes:
        return linear
    if linear is not None:
        raise ConvertError(f"rope.scaling.factor is {factor} beside rope_freqs.weight, expected one of them")
    if tensors.shapes["rope_freqs.weight"] == (head_dim // 2,):
        divisors = np.asarray(tensors.read(["rope_freqs.weight"])["rope_freqs.weight"], np.float32)
        original = field(meta, "rope.scaling.original_context_length", int, 8192)
        scaling = RopeScaling("llama3", float(divisors.max()), original_max_positions=original)
        formula = np.asarray(frequencies(head_dim, theta)) / np.asarray(frequencies(head_dim, theta, scaling))
        if np.allclose(divisors, formula, rtol=1e-3):
            return scaling
    raise ConvertError("rope_freqs.weight holds other factors than Llama 3's, which are not supported")


def read_gguf(meta: Mapping[str, Any], tensors: Any) -> DecoderConfig:
    """Reads our config from a GGUF's metadata; biases, q/k norms and a tied head follow from the tensors.

    Raises:
      ConvertError: the decoder lacks a feature, such as partly rotated heads.
    """
    require(meta, "expert_count", 0, 0)
    heads, hidden = count(meta, "attention.head_count"), count(meta, "embedding_length")
    head_dim = field(meta, "attention.key_length", int, hidden // heads)
    require(meta, "attention.value_length", head_dim, head_dim)
    require(meta, "rope.dimension_count", head_dim, head_dim)
    theta = field(meta, "rope.freq_base", float, 10000.0)
    eos = token_ids(meta.get("tokenizer.ggml.eos_token_id"))
    eot = token_ids(meta.get("tokenizer.ggml.eot_token_id"))
    return DecoderConfig(
        family="llama",
        vocab_size=tensors.shapes.get("token_embd.weight", (0,))[0],
        hidden_size=hidden,
        intermediate_size=field(meta, "feed_forward_length", int),
        num_layers=count(meta, "block_count"),
        num_heads=heads,
        num_kv_heads=field(meta, "attention.head_count_kv", int, heads),
        head_dim=head_dim,
        max_positions=field(meta, "context_length", int),
        norm_eps=_shortest(field(meta, "attention.layer_norm_rms_epsilon", float)),
        rope_theta=theta,
        rope_scaling=read_gguf_rope(meta, tensors, head_dim, theta),
        qkv_bias="blk.0.attn_q.bias" in tensors.shapes,
        o_bias="blk.0.attn_output.bias" in tensors.shapes,
        mlp_bias="blk.0.ffn_up.bias" in tensors.shapes,
        qk_norm="blk.0.attn_q_norm.weight" in tensors.shapes,
        sliding_window=field(meta, "attention.sliding_window", int, None) or None,  # 0 means none
        tied_head="output.weight" not in tensors.shapes,
        bos_token_id=field(meta, "tokenizer.ggml.bos_token_id", int, None),
        eos_token_ids=tuple(dict.fromkeys(eos + eot)),
    )


def hf_format(
    architectures: tuple[str, ...],
    read_config: Callable[[Mapping[str, Any]], DecoderConfig],
    write_config: Callable[[DecoderConfig], dict[str, Any]],
    names: Names,
) -> HFFormat:
    """Hugging Face format of the decoders that descend from Llama."""
    return HFFormat(
        architectures,
        read_config,
        write_config,
        names,
        prefix="model.",
        prefixes=("model.",),
        ignored=(r".*rotary_emb\.inv_freq",),
    )


FAMILY = Family(
    name="llama",
    hf=hf_format(
        architectures=("LlamaForCausalLM", "MistralForCausalLM"),
        read_config=read_hf,
        write_config=write_hf,
        names=HF_NAMES,
    ),
    gguf=GGUFFormat(
        architectures=("llama",),
        read_config=read_gguf,
        names=GGUF_NAMES,
        interleaved=("attn.q", "attn.k"),
        ignored=(r"rope_freqs\.weight",),
    ),
)
