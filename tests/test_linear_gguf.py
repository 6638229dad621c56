"""GGUF files of Qwen3-Next, Qwen 3.5 and gpt-oss, with tensors as llama.cpp's converter stores them."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import Golden, load_golden, write_hf
from test_gguf import write_gguf
from test_hf import changed, same_parameters

from convert import load_source

LINEAR = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv.": "attn_qkv.",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.out_proj": "ssm_out",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router": "ffn_gate_inp",
}
KEYS = {
    "ssm__conv_kernel": "linear_conv_kernel_dim",
    "ssm__state_size": "linear_key_head_dim",
    "ssm__group_count": "linear_num_key_heads",
    "ssm__time_step_rank": "linear_num_value_heads",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


def tiled(rows: np.ndarray, hf: dict[str, Any]) -> np.ndarray:
    """Reorders value heads as llama.cpp does for Qwen 3.5: first those that are first at their key heads."""
    keys, values = hf["linear_num_key_heads"], hf["linear_num_value_heads"]
    each = rows.reshape(keys, values // keys, -1, *rows.shape[1:])
    return each.swapaxes(0, 1).reshape(rows.shape)


def stored(name: str, value: np.ndarray, hf: dict[str, Any]) -> dict[str, np.ndarray]:
    """A tensor of a checkpoint as the converter writes it, by its part of the name."""
    keys = 2 * hf["linear_num_key_heads"] * hf["linear_key_head_dim"]
    if "in_proj_qkvz" in name:
        heads, key = hf["linear_num_key_heads"], hf["linear_key_head_dim"]
        values = hf["linear_num_value_heads"] // heads * hf["linear_value_head_dim"]
        parts = np.split(value.reshape(heads, -1, value.shape[1]), [key, 2 * key, 2 * key + values], axis=1)
        q, k, v, z = (part.reshape(-1, value.shape[1]) for part in parts)
        return {"attn_qkv.weight": np.concatenate([q, k, v]), "attn_gate.weight": z}
    if hf["model_type"] != "qwen3_next":
        if "conv1d" in name or "in_proj_qkv" in name:
            value = np.concatenate([value[:keys], tiled(value[keys:], hf)])
        elif re.search("in_proj_[zba]|A_log|dt_bias", name):
            value = tiled(value, hf)
        elif "out_proj" in name:
            value = tiled(value.T, hf).T
    if name.endswith("norm.weight") and "linear_attn" not in name:
        value = value + 1
    value = -np.exp(value) if "A_log" in name else value.squeeze() if "conv1d" in name else value
    for theirs, ours in LINEAR.items():
        name = name.replace(theirs, ours)
    return {name: value}


def converted(golden: Golden) -> Golden:
    """A golden hybrid with its blocks' tensors named and stored as in GGUF files."""
    weights = {}
    for name, value in golden.weights.items():
        block = re.match(r"model\.layers\.(\d+)\.(.*)", name)
        if block is None or ".experts." in name:
            weights[name] = value + 1 if name == "model.norm.weight" else value
            continue
        parts = stored(block[2], value, golden.config)
        weights |= {f"blk.{block[1]}.{part}": tensor for part, tensor in parts.items()}
    return dataclasses.replace(golden, weights=weights)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("qwen3_next", "qwen3next"), ("qwen3_5", "qwen35"), ("qwen3_5_moe", "qwen35moe")],
)
def test_linear_attention(name: str, architecture: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    hf = golden.config
    keys = {ours: hf[theirs] for ours, theirs in KEYS.items() if theirs in hf}
    inner = hf["linear_num_value_heads"] * hf["linear_value_head_dim"]
    model = changed(converted(golden), intermediate_size=hf.get("intermediate_size", 1))
    path = write_gguf(
        model,
        tmp_path / "model.gguf",
        architecture=architecture,
        rope__dimension_count=int(hf["head_dim"] * 0.25),
        ssm__inner_size=inner,
        **keys,
    )
    found, wanted = load_source(path), load_source(write_hf(golden, tmp_path / "hf"))
    assert found.config == dataclasses.replace(wanted.config, bos_token_id=1)
    for index in range(found.config.num_layers):
        ours, theirs = found.block(index), wanted.block(index)
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(ours[key], theirs[key], atol=1e-6, err_msg=key)
    np.testing.assert_allclose(found.outer()["norm.scale"], wanted.outer()["norm.scale"], atol=1e-6)


def test_gpt_oss(tmp_path: Path) -> None:
    golden = changed(load_golden("gpt_oss"), swiglu_limit=7.0)
    hf, weights = golden.config, {}
    for name, value in golden.weights.items():
        part = name.replace("model.layers", "blk").replace("mlp.experts", "ffn")
        suffix = "bias" if part.endswith("_bias") else "weight"
        if "gate_up_proj" in name:
            stem = part.partition("ffn.")[0]
            for offset, ours in enumerate(("gate", "up")):
                piece = value[..., offset::2]
                piece = piece if suffix == "bias" else piece.swapaxes(-1, -2)
                weights[f"{stem}ffn_{ours}_exps.{suffix}"] = np.ascontiguousarray(piece)
        elif "experts.down_proj" in name:
            stem = part.partition("ffn.")[0]
            piece = value if suffix == "bias" else np.ascontiguousarray(value.swapaxes(-1, -2))
            weights[f"{stem}ffn_down_exps.{suffix}"] = piece
        else:
            for theirs, ours in LINEAR.items():
                part = part.replace(theirs, ours)
            weights[part] = value
    rope = hf["rope_parameters"]
    path = write_gguf(
        dataclasses.replace(golden, weights=weights),
        tmp_path / "model.gguf",
        architecture="gpt-oss",
        attention__sliding_window=hf["sliding_window"],
        expert_count=hf["num_local_experts"],
        expert_used_count=hf["num_experts_per_tok"],
        expert_feed_forward_length=hf["intermediate_size"],
        rope__scaling__type="yarn",
        rope__scaling__factor=rope["factor"],
        rope__scaling__original_context_length=rope["original_max_position_embeddings"],
        rope__scaling__yarn_beta_fast=rope["beta_fast"],
        rope__scaling__yarn_beta_slow=rope["beta_slow"],
    )
    found, wanted = load_source(path), load_source(write_hf(golden, tmp_path / "hf"))
    assert found.config == dataclasses.replace(wanted.config, bos_token_id=1)
    assert same_parameters(found, wanted)
