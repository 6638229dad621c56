"""Creates the golden models: tiny, random, run by PyTorch's transformers, one `.npz` each.

    /path/to/python-with-torch-and-transformers tests/goldens/make_goldens.py [NAME ...]

NAMEs select cases; the default is all. Each file holds ``config`` (config.json as bytes), ``tokens [B, T]``,
``logits [B, T, vocab]``, ``hidden [layers + 1, B, T, hidden]`` (the input of the first block, then each
block's output) and ``weight:NAME`` for every tensor of a saved checkpoint. All values are float32. Created
with torch 2.13.0, transformers 5.23.0 and (those from Qwen3-Next on) 5.24.0.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import (
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Exaone4Config,
    Exaone4ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

HERE = Path(__file__).parent
SEED, BATCH, TIME = 0, 2, 24

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 32,
    "dropout": 0.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
GQA = {**LLAMA, "num_key_value_heads": 2}
# Scores and logits are several times as large as these caps, and the sequences are longer than the window.
GEMMA = {**GQA, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7}
PADDED = {"pad_token_id": 0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 2.5, 4.0],
    "original_max_position_embeddings": 16,
}

DELTA = {
    **{key: value for key, value in GQA.items() if key != "rope_theta"},
    "num_hidden_layers": 3,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25},
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "max_position_embeddings": 128,
}
EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
# Of the eight pairs of features, the first is kept, the last three are divided, the others blended.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "beta_fast": 3.0,
    "beta_slow": 0.5,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
TIMES = {"qwen3_5": 80}  # more than a chunk of linear attention

NO_ROPE = {key: value for key, value in GQA.items() if key != "rope_theta"}
NO_EPS = {key: value for key, value in GQA.items() if key != "rms_norm_eps"}
WINDOWED = {
    "num_hidden_layers": 3,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

# With head_dim 8 and theta 100, wavelengths lie below, between and above the two limits of LLAMA3.
CASES = {
    "llama_gqa_tied": (
        LlamaForCausalLM,
        LlamaConfig,
        {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "llama_untied": (LlamaForCausalLM, LlamaConfig, {**LLAMA, "num_hidden_layers": 3}),
    "llama_rope_llama3": (
        LlamaForCausalLM,
        LlamaConfig,
        {**LLAMA, "rope_theta": 100.0, "rope_scaling": LLAMA3, "num_key_value_heads": 1},
    ),
    "llama_rope_linear": (
        LlamaForCausalLM,
        LlamaConfig,
        {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    ),
    "llama_head_dim": (LlamaForCausalLM, LlamaConfig, {**LLAMA, "head_dim": 12, "num_key_value_heads": 2}),
    "llama_biases": (LlamaForCausalLM, LlamaConfig, {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral_window": (
        MistralForCausalLM,
        MistralConfig,
        {**LLAMA, "num_key_value_heads": 2, "sliding_window": 7, "head_dim": 16},
    ),
    "opt_pre_norm": (OPTForCausalLM, OPTConfig, OPT),
    "opt_post_norm_projected": (
        OPTForCausalLM,
        OPTConfig,
        {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    "opt_no_bias": (OPTForCausalLM, OPTConfig, {**OPT, "enable_bias": False, "activation_function": "gelu"}),
    "qwen2_bias": (Qwen2ForCausalLM, Qwen2Config, GQA),
    "qwen2_window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            **GQA,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**GQA, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 15.0},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            **{k: v for k, v in GEMMA.items() if k != "rope_theta"},
            "num_hidden_layers": 3,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "phi3_window": (Phi3ForCausalLM, Phi3Config, {**GQA, **PADDED, "sliding_window": 7}),
    "phi3_longrope": (
        Phi3ForCausalLM,
        Phi3Config,
        {**GQA, **PADDED, "original_max_position_embeddings": 16, "rope_scaling": LONGROPE},
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig,
        {**GQA, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**GQA, "head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "qwen3_moe_dense_first": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            **GQA,
            "num_hidden_layers": 3,
            "intermediate_size": 40,
            "mlp_only_layers": [0],
            "head_dim": 16,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "qwen3_next": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        {**DELTA, **EXPERTS, "intermediate_size": 40, "mlp_only_layers": [0]},
    ),
    "qwen3_5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig, {**DELTA, "tie_word_embeddings": True}),
    "qwen3_5_moe": (
        Qwen3_5MoeForCausalLM,
        Qwen3_5MoeTextConfig,
        {k: v for k, v in {**DELTA, **EXPERTS}.items() if k != "intermediate_size"},
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            **{key: value for key, value in GQA.items() if key != "rope_theta"},
            **PADDED,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 7,
            "swiglu_limit": 1.5,
            "rope_parameters": YARN,
        },
    ),
    "smollm3": (
        SmolLM3ForCausalLM,
        SmolLM3Config,
        {
            **GQA,
            **PADDED,
            "num_hidden_layers": 3,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "gemma4": (
        Gemma4ForCausalLM,
        Gemma4TextConfig,
        {
            **{key: value for key, value in NO_ROPE.items() if key != "sliding_window"},
            **PADDED,
            **WINDOWED,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "head_dim": 16,
            "global_head_dim": 24,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 15.0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1000.0,
                },
            },
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {**GQA, **PADDED}),
    "olmo3": (
        Olmo3ForCausalLM,
        Olmo3Config,
        {
            **NO_ROPE,
            **PADDED,
            **WINDOWED,
            "rope_parameters": {
                "full_attention": {k: v for k, v in YARN.items() if k != "truncate"},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "granite": (
        GraniteForCausalLM,
        GraniteConfig,
        {
            **GQA,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite_moe": (
        GraniteMoeSharedForCausalLM,
        GraniteMoeSharedConfig,
        {
            **GQA,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 20,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.22,
            "tie_word_embeddings": True,
        },
    ),
    "phi4_mini": (
        Phi3ForCausalLM,
        Phi3Config,
        {
            **GQA,
            **PADDED,
            "hidden_size": 64,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 16,
            "rope_scaling": {
                **LONGROPE,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 1.5, 2.5, 4.0, 5.0, 6.0],
            },
            "tie_word_embeddings": True,
        },
    ),
    "lfm2": (
        Lfm2ForCausalLM,
        Lfm2Config,
        {
            **NO_EPS,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "intermediate_size": 60,
            "block_multiple_of": 16,
        },
    ),
    "glm4": (Glm4ForCausalLM, Glm4Config, {**GQA, **PADDED, "head_dim": 16}),
    "glm4_moe": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig,
        {
            **GQA,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "attention_bias": True,
            "use_qk_norm": True,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "num_nextn_predict_layers": 0,
        },
    ),
    "minimax_m2": (
        MiniMaxM2ForCausalLM,
        MiniMaxM2Config,
        {
            **GQA,
            "head_dim": 16,
            "rotary_dim": 8,
            "intermediate_size": 24,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
        },
    ),
    "ministral3": (
        Ministral3ForCausalLM,
        Ministral3Config,
        {
            **NO_ROPE,
            **PADDED,
            "head_dim": 16,
            "rope_parameters": {
                **{key: value for key, value in YARN.items() if key != "truncate"},
                "original_max_position_embeddings": 5,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "seed_oss": (SeedOssForCausalLM, SeedOssConfig, {**GQA, **PADDED, "head_dim": 16}),
    "ernie4_5": (Ernie4_5ForCausalLM, Ernie4_5Config, {**GQA, "head_dim": 16}),
    "exaone4": (Exaone4ForCausalLM, Exaone4Config, {**GQA, **WINDOWED, "head_dim": 16}),
    "starcoder2": (Starcoder2ForCausalLM, Starcoder2Config, {**NO_EPS, "sliding_window": 7}),
    "hunyuan": (
        HunYuanDenseV1ForCausalLM,
        HunYuanDenseV1Config,
        {
            **NO_ROPE,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 4.0, "factor": 1.0},
        },
    ),
}


def randomize(model: torch.nn.Module) -> None:
    """Sets weights large enough that a wrong bias, norm or rotation shows in the logits.

    They are rounded to bfloat16, which tests in float32 can represent, and which halves the files.
    """
    generator = torch.Generator().manual_seed(SEED)
    kind = model.config.model_type
    centered = any(
        name in kind for name in ("gemma2", "gemma3", "qwen3_next", "qwen3_5")
    )  # 1 is added to norms' scales
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        mean = 0 if centered and "linear_attn.norm" not in name else 1
        if "norm" in name:
            parameter.data = (mean + 0.3 * noise) if name.endswith("weight") else 0.3 * noise
        elif name.endswith("bias"):
            parameter.data = 0.3 * noise
        elif "embed" in name:
            parameter.data = noise
        else:
            parameter.data = noise * 1.5 * parameter.shape[-1] ** -0.5
        parameter.data = parameter.data.bfloat16().float()
    for name, buffer in model.named_buffers():
        if name.endswith(("score_correction_bias", "layer_scalar")):
            mean = 1 if name.endswith("layer_scalar") else 0
            noise = torch.randn(buffer.shape, generator=generator)
            buffer.data = (mean + 0.3 * noise).bfloat16().float()


def run(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits, and the first block's input and every block's output, before the final norm."""
    hidden = []
    decoder = model.model.decoder if hasattr(model.model, "decoder") else model.model
    for i, layer in enumerate(decoder.layers):
        if i == 0:
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: hidden.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        layer.register_forward_hook(
            lambda _, args, out: hidden.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    return logits.numpy(), torch.stack(hidden).detach().numpy()


def saved_weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint as on the hub: without tied LM heads, with separate experts."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return load_file(Path(directory) / "model.safetensors")


def main() -> None:
    """Writes the cases to this file's folder."""
    for name in sys.argv[1:] or CASES:
        model_class, config_class, fields = CASES[name]
        model = model_class._from_config(config_class(**fields), attn_implementation="eager").eval()
        randomize(model)
        generator = torch.Generator().manual_seed(SEED + 1)
        tokens = torch.randint(3, fields["vocab_size"], (BATCH, TIMES.get(name, TIME)), generator=generator)
        logits, hidden = run(model, tokens)
        config = {**model.config.to_dict(), "architectures": [model_class.__name__]}
        np.savez_compressed(
            HERE / f"{name}.npz",
            config=np.frombuffer(json.dumps(config, sort_keys=True).encode(), np.uint8),
            tokens=tokens.numpy().astype(np.int32),
            logits=logits,
            hidden=hidden,
            **{f"weight:{k}": v for k, v in saved_weights(model).items()},
        )
        print(f"{name}: {(HERE / f'{name}.npz').stat().st_size} bytes, logits up to {abs(logits).max():.2f}")


if __name__ == "__main__":
    main()
