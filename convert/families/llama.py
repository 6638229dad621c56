"""Llama 1, 2 and 3, SmolLM2, Mistral and Ministral: RMSNorm, RoPE, gated MLP, grouped-query attention."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert.errors import ConvertError
from convert.families.family import (
    REQUIRED,
    Family,
    GGUFFormat,
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
        "moe.router": "ffn_gate_inp",
        "moe.experts.{}.gate": "ffn_gate_exps",
        "moe.experts.{}.up": "ffn_up_exps",
        "moe.experts.{}.down": "ffn_down_exps",
    },
)

GGUF_SEPARATE_EXPERTS = dataclasses.replace(
    GGUF_NAMES,
    block={
        **GGUF_NAMES.block,
        **{f"moe.experts.{{}}.{part}": f"ffn_{part}.{{}}" for part in ("gate", "up", "down")},
    },
)
"""Names in files of before April 2024."""


def uninterleave(rows: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """Reorders rows ``[heads * head_dim, ...]``: feature pairs (2i, 2i + 1) -> (i, i + head_dim / 2)."""
    paired = rows.reshape(-1, config.head_dim // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


YARN = ("beta_fast", "beta_slow", "truncate")
"""Fields of YaRN's scaling that we call as transformers does."""


def read_rope(
    hf: Mapping[str, Any], layers: str | None = None, *, partial: bool = False
) -> tuple[float, RopeScaling | None]:
    """Returns base and scaling of RoPE from ``rope_parameters``.

    Args:
      hf: the resolved config.
      layers: the kind of layers, where ``rope_parameters`` has one entry for each.
      partial: if True, RoPE may rotate a part of each head, see :func:`convert.families.family.rotary_dim`.

    Raises:
      ConvertError: the kind of scaling is not supported.
    """
    rope = field(hf, "rope_parameters", dict)
    rope = rope if layers is None else field(rope, layers, dict)
    theta, kind = field(rope, "rope_theta", float), field(rope, "rope_type", str, "default")
    if not partial:
        require(rope, "partial_rotary_factor", 1.0, 1.0)
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
    if kind == "yarn":
        return theta, read_yarn(rope, field(hf, "max_position_embeddings", int))
    raise ConvertError(f"rope_type of rope_parameters is {kind!r}, expected default, linear, llama3 or yarn")


def read_yarn(rope: Mapping[str, Any], positions: int) -> RopeScaling:
    """Reads YaRN's scaling from transformers' keys; ``positions`` are the model's."""
    original = field(rope, "original_max_position_embeddings", int, positions)
    factor = field(rope, "factor", float, positions / original)
    scales = [field(rope, key, float, 0.0) for key in ("mscale", "mscale_all_dim")]
    scale, over = scales if all(scales) else (1.0, 0.0)
    growth = 0.1 * math.log(max(factor, 1.0))
    return RopeScaling(
        "yarn",
        factor,
        original_max_positions=original,
        attention_factor=field(rope, "attention_factor", float, (growth * scale + 1) / (growth * over + 1)),
        beta_fast=field(rope, "beta_fast", float, 32.0),
        beta_slow=field(rope, "beta_slow", float, 1.0),
        truncate=field(rope, "truncate", bool, True),
    )


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
    if scaling.kind == "yarn":
        rope["original_max_position_embeddings"] = scaling.original_max_positions
        rope |= {key: getattr(scaling, key) for key in ("attention_factor", *YARN)}
    return {"rope_theta": config.rope_theta, "rope_scaling": rope}


def read_base(
    hf: Mapping[str, Any],
    family: str,
    activation_key: str | None = "hidden_act",
    eps_key: str = "rms_norm_eps",
) -> DecoderConfig:
    """Reads the fields that all descendants of Llama share; the other fields keep their defaults.

    Args:
      hf: the resolved config.
      family: the family's name.
      activation_key: the key that names the activation function; None for SiLU.
      eps_key: the key of what is added to a variance in norms.

    Raises:
      ConvertError: a value is missing or of another type.
    """
    heads, hidden = count(hf, "num_attention_heads"), count(hf, "hidden_size")
    return DecoderConfig(
        family=family,
        vocab_size=field(hf, "vocab_size", int),
        hidden_size=hidden,
        intermediate_size=field(hf, "intermediate_size", int, hf.get("moe_intermediate_size") or REQUIRED),
        num_layers=count(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=field(hf, "num_key_value_heads", int, heads),
        head_dim=field(hf, "head_dim", int, hidden // heads),
        max_positions=field(hf, "max_position_embeddings", int),
        norm_eps=field(hf, eps_key, float),
        activation="silu" if activation_key is None else activation(hf, activation_key),
        tied_head=field(hf, "tie_word_embeddings", bool),
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
    """Reads our config from the resolved config.json.

    Raises:
      ConvertError: the text tower is of another kind.
    """
    kind = hf["model_type"]
    if kind not in ("llama", "mistral", "ministral3"):
        raise ConvertError(f"model_type is {kind!r}, expected llama, mistral or ministral3")
    mistral = kind != "llama"
    theta, scaling = read_rope(hf)
    biased = not mistral and field(hf, "attention_bias", bool)
    return dataclasses.replace(
        read_base(hf, "llama"),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=not mistral and field(hf, "mlp_bias", bool),
        sliding_window=field(hf, "sliding_window", int, None) if mistral else None,
        **(_read_query_scale(hf["rope_parameters"]) if kind == "ministral3" else {}),
    )


def _read_query_scale(rope: Mapping[str, Any]) -> dict[str, Any]:
    step = count(rope, "original_max_position_embeddings")
    return {"attn_scale": field(rope, "llama_4_scaling_beta", float), "floor_scale": step}


def write_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of :func:`read_hf`: a Ministral 3 if queries are scaled, a Mistral if there is a window.

    Raises:
      ConvertError: no class of transformers has this combination of biases and window.
    """
    scaled = config.attn_scale > 0
    mistral = scaled or config.sliding_window is not None
    if config.qkv_bias != config.o_bias or (mistral and (config.qkv_bias or config.mlp_bias)):
        raise ConvertError("this combination of biases and sliding window exists in no class of transformers")
    if scaled:
        base = write_base(config, "Ministral3ForCausalLM", "ministral3")
        own = {"original_max_position_embeddings": config.floor_scale, "rope_theta": config.rope_theta}
        rope = {"rope_type": "default", **(write_rope(config)["rope_scaling"] or {}), **own}
        rope["llama_4_scaling_beta"] = config.attn_scale
        return {**base, "rope_parameters": rope, "sliding_window": config.sliding_window}
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


def shortest(value: float) -> float:
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
    layers = count(meta, "block_count") - field(meta, "nextn_predict_layers", int, 0)
    if layers < 1:
        raise ConvertError(f"nextn_predict_layers leaves {layers} of block_count, expected some blocks")
    experts = field(meta, "expert_count", int, 0)
    heads, hidden = count(meta, "attention.head_count"), count(meta, "embedding_length")
    head_dim = field(meta, "attention.key_length", int, hidden // heads)
    require(meta, "attention.value_length", head_dim, head_dim)
    require(meta, "rope.dimension_count", head_dim, head_dim)
    theta = field(meta, "rope.freq_base", float, 10000.0)
    dense = field(meta, "feed_forward_length", int)
    inner = field(meta, "expert_feed_forward_length", int, dense) if experts else dense
    eos = token_ids(meta.get("tokenizer.ggml.eos_token_id"))
    eot = token_ids(meta.get("tokenizer.ggml.eot_token_id"))
    return DecoderConfig(
        family="mixtral" if experts else "llama",
        vocab_size=tensors.shapes.get("token_embd.weight", (0,))[0],
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=field(meta, "attention.head_count_kv", int, heads),
        head_dim=head_dim,
        max_positions=field(meta, "context_length", int),
        norm_eps=shortest(field(meta, "attention.layer_norm_rms_epsilon", float)),
        rope_theta=theta,
        rope_scaling=read_gguf_rope(meta, tensors, head_dim, theta),
        qkv_bias="blk.0.attn_q.bias" in tensors.shapes,
        o_bias="blk.0.attn_output.bias" in tensors.shapes,
        mlp_bias="blk.0.ffn_up.bias" in tensors.shapes,
        qk_norm="blk.0.attn_q_norm.weight" in tensors.shapes,
        num_experts=experts,
        experts_per_token=field(meta, "expert_used_count", int) if experts else 0,
        norm_topk=field(meta, "expert_weights_norm", bool, True),
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
    *,
    others: tuple[Names, ...] = (),
    unused: tuple[str, ...] = (),
) -> HFFormat:
    """Hugging Face format of the decoders that descend from Llama, alone or as the text tower of a model."""
    return HFFormat(
        architectures,
        read_config,
        write_config,
        names,
        prefix="model.",
        prefixes=("model.language_model.", "language_model.model.", "language_model.", "model."),
        ignored=(r".*rotary_emb\.inv_freq",),
        others=others,
        unused=unused,
    )


CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Ministral3ForCausalLM")

FAMILY = Family(
    name="llama",
    hf=hf_format(
        architectures=(*CLASSES, "Mistral3ForConditionalGeneration"),
        read_config=read_hf,
        write_config=write_hf,
        names=HF_NAMES,
        unused=("rope_parameters.max_position_embeddings",),
    ),
    gguf=GGUFFormat(
        architectures=("llama",),
        read_config=read_gguf,
        names=GGUF_NAMES,
        restore={"attn.q": uninterleave, "attn.k": uninterleave},
        others=(GGUF_SEPARATE_EXPERTS,),
        ignored=(r"rope_freqs\.weight",),
    ),
)
