"""Hugging Face directories: parity with PyTorch's transformers, streaming, and bad input."""

import dataclasses
import json
import shutil
from pathlib import Path

import golden_models
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import Golden, decoder_of, load_golden, relative_error, run_cached, write_hf

from convert import ConvertError, load_source
from slim_jax.model.config import DecoderConfig
from slim_jax.model.rotary import RopeScaling

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", golden_models.NAMES)
def test_parity(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    decoder = decoder_of(load_source(write_hf(golden, tmp_path)))
    hidden, logits = golden_models.run(decoder, golden.tokens)
    for i in range(len(hidden)):
        assert relative_error(hidden[i], golden.hidden[i]) <= TOLERANCE, f"hidden state {i}"
    assert relative_error(logits, golden.logits) <= TOLERANCE


PADDED = (
    *("gemma3", "llama_gqa_tied", "mixtral", "opt_post_norm_projected", "phi3_longrope", "qwen2_window"),
    *("gpt_oss", "qwen3_next", "glm4", "lfm2", "ministral3"),
)
"""Together they cover all kinds of attention and positions; the others are slow tests."""


@pytest.mark.parametrize(
    "name", [n if n in PADDED else pytest.param(n, marks=pytest.mark.slow) for n in golden_models.NAMES]
)
def test_parity_of_a_padded_batch_with_cache(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    lengths, steps = np.array([13, 20]), 4  # beyond longrope's 16 from the start; test_longrope crosses it
    logits = run_cached(decoder_of(load_source(write_hf(golden, tmp_path))), golden.tokens, lengths, steps)
    seen = lengths - 1 + np.arange(steps + 1)[:, None]
    assert relative_error(logits, golden.logits[[0, 1], seen]) <= TOLERANCE


def changed(golden: Golden, *, drop: tuple[str, ...] = (), **config: object) -> Golden:
    """Returns the golden model with other config keys, and without the keys in ``drop``."""
    fields = {k: v for k, v in {**golden.config, **config}.items() if k not in drop}
    return dataclasses.replace(golden, config=fields)


def same_parameters(a: object, b: object) -> bool:
    """True if two sources hold the same arrays."""
    pairs = [(a.outer(), b.outer())]
    pairs += [(a.block(i), b.block(i)) for i in range(a.config.num_layers)]
    return all(x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in pairs)


@pytest.mark.parametrize(
    ("name", "prefix"), [("opt_pre_norm", "model.decoder."), ("llama_gqa_tied", "model.")]
)
def test_shards_and_prefixes_change_nothing(name: str, prefix: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    plain = load_source(write_hf(golden, tmp_path / "plain"))
    sharded = load_source(write_hf(golden, tmp_path / "sharded", shards=3))
    for shorter in {prefix.removeprefix("model."), ""}:
        bare = {shorter + k.removeprefix(prefix): v for k, v in golden.weights.items()}
        other = write_hf(dataclasses.replace(golden, weights=bare), tmp_path / f"bare{shorter}")
        assert same_parameters(plain, load_source(other))
    assert same_parameters(plain, sharded)
    assert sharded.config == plain.config
    assert sharded.origin["fingerprint"] != plain.origin["fingerprint"]
    assert load_source(tmp_path / "plain").origin == plain.origin


@pytest.mark.parametrize(
    ("stored", "asked", "given"),
    [
        (jnp.bfloat16, None, "bfloat16"),
        (np.float16, None, "float32"),
        (np.float32, None, "float32"),
        (jnp.bfloat16, "float32", "float32"),
        (np.float32, jnp.bfloat16, "bfloat16"),
    ],
)
def test_dtypes(stored: type, asked: object, given: str, tmp_path: Path) -> None:
    golden = load_golden("llama_gqa_tied")  # its weights are exact in bfloat16
    source = load_source(write_hf(golden, tmp_path, dtype=stored), dtype=asked)
    weight = source.block(1)["attn.q.weight"]
    assert weight.dtype.name == given
    expected = golden.weights["model.layers.1.self_attn.q_proj.weight"].T
    np.testing.assert_allclose(weight.astype(np.float32), expected, atol=1e-6)


def test_reads_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load_source(write_hf(load_golden("llama_untied"), tmp_path, shards=2))
    read: list[str] = []
    original = source._store.read
    monkeypatch.setattr(source._store, "read", lambda names: original(read.extend(n := list(names)) or n))
    source.block(1)
    assert len(read) == 9
    assert all(name.startswith("layers.1.") for name in read)
    with pytest.raises(IndexError, match="block 3 of a model of 3"):
        source.block(3)


def test_tied_head_may_be_stored_twice(tmp_path: Path) -> None:
    golden = load_golden("llama_gqa_tied")
    twice = {**golden.weights, "lm_head.weight": golden.weights["model.embed_tokens.weight"]}
    twice["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    source = load_source(write_hf(dataclasses.replace(golden, weights=twice), tmp_path / "same"))
    assert "head.weight" not in source.outer()
    twice["lm_head.weight"] = 2 * twice["lm_head.weight"]
    refused(write_hf(dataclasses.replace(golden, weights=twice), tmp_path / "other"), "lm_head", "tie_word")


def config_of(golden: Golden, directory: Path) -> object:
    """Our config of a golden model with changed fields."""
    shutil.rmtree(directory, ignore_errors=True)
    return load_source(write_hf(golden, directory)).config


def test_old_and_new_rope_keys_mean_the_same(tmp_path: Path) -> None:
    golden = load_golden("llama_rope_llama3")
    rope = dict(golden.config["rope_parameters"])
    theta = rope.pop("rope_theta")
    old = changed(golden, drop=("rope_parameters",), rope_scaling=rope, rope_theta=theta)
    new = config_of(golden, tmp_path / "a")
    assert new == config_of(old, tmp_path / "b")
    assert new.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 48)
    assert new.rope_theta == 100.0
    typed = changed(golden, drop=("rope_parameters",), rope_scaling={"type": "linear", "factor": 2})
    assert config_of(typed, tmp_path / "c").rope_scaling == RopeScaling("linear", 2.0)


def test_defaults_of_transformers(tmp_path: Path) -> None:
    llama = changed(load_golden("llama_untied"), drop=("num_key_value_heads", "head_dim", "rms_norm_eps"))
    config = config_of(llama, tmp_path / "a")
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (4, 8, 1e-6)
    mistral = load_golden("mistral_window")
    assert config_of(changed(mistral, drop=("sliding_window",)), tmp_path / "b").sliding_window == 4096
    assert config_of(changed(mistral, sliding_window=None), tmp_path / "c").sliding_window is None


def test_older_keys_mean_the_same(tmp_path: Path) -> None:
    gemma = load_golden("gemma3")
    scaling = {"rope_type": "linear", "factor": 4.0}
    older = {"rope_theta": 1000.0, "rope_local_base_freq": 100.0, "rope_scaling": scaling}
    old = changed(gemma, drop=("rope_parameters", "layer_types"), **older)
    assert config_of(old, tmp_path / "a") == config_of(gemma, tmp_path / "b")
    phi = load_golden("phi3_longrope")
    rope = {key: phi.config["rope_parameters"][key] for key in ("short_factor", "long_factor")}
    old = changed(phi, drop=("rope_parameters",), rope_scaling={"type": "su", **rope}, rope_theta=1e4)
    assert config_of(old, tmp_path / "c") == config_of(phi, tmp_path / "d")
    qwen = load_golden("qwen2_window")
    same = config_of(changed(qwen, drop=("layer_types",)), tmp_path / "e")
    assert same == config_of(qwen, tmp_path / "f")
    assert (same.sliding_window, same.global_layers) == (7, (0,))
    off = config_of(changed(qwen, drop=("layer_types",), use_sliding_window=False), tmp_path / "g")
    assert (off.sliding_window, off.global_layers) == (None, ())


def test_configs_survive_json(tmp_path: Path) -> None:
    for name in ("gemma3", "phi3_longrope", "llama_rope_llama3"):
        config = config_of(load_golden(name), tmp_path)
        assert DecoderConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_generation_config_adds_stop_tokens(tmp_path: Path) -> None:
    write_hf(load_golden("llama_untied"), tmp_path)
    assert load_source(tmp_path).config.eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert load_source(tmp_path).config.eos_token_ids == (2, 5)


def refused(spec: str | Path, *culprits: str, dtype: object = None) -> None:
    """Asserts that the model is refused with one line that names every culprit."""
    with pytest.raises(ConvertError) as caught:
        load_source(spec, dtype)
    message = str(caught.value)
    assert "\n" not in message
    for culprit in culprits:
        assert culprit in message, message


LLAMA_CHANGES = [
    (
        {"architectures": ["GPTNeoXForCausalLM"]},
        ("GPTNeoXForCausalLM", "LlamaForCausalLM", "OPTForCausalLM", "docs/adding-a-family.md"),
    ),
    ({"architectures": ["DeepseekV3ForCausalLM"]}, ("DeepseekV3ForCausalLM", "it needs latent attention")),
    ({"architectures": None}, ("architecture", "LlamaForCausalLM")),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, ("rope_type", "dynamic", "llama3")),
    ({"rope_parameters": {"rope_type": "linear"}}, ("factor",)),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ("partial_rotary_factor", "0.5")),
    ({"hidden_act": "xielu"}, ("hidden_act", "xielu", "silu")),
    ({"hidden_size": None}, ("hidden_size",)),
    ({"hidden_size": "32"}, ("hidden_size", "'32'")),
    ({"num_hidden_layers": 0}, ("num_hidden_layers is 0",)),
    ({"num_attention_heads": 0}, ("num_attention_heads is 0",)),
    ({"num_key_value_heads": 3}, ("num_heads", "num_kv_heads")),
    ({"quantization_config": {"quant_method": "gptq"}}, ("gptq",)),
    ({"quantization_config": "fp8"}, ("fp8",)),
    ({"architectures": "LlamaForCausalLM"}, ("architectures", "expected list")),
    ({"num_hidden_layers": 10**9}, ("num_hidden_layers is 1000000000",)),
    ({"vocab_size": 10**30}, ("vocab_size",)),
    ({"rms_norm_eps": float("nan")}, ("rms_norm_eps is nan",)),
    ({"rms_norm_eps": 10**400}, ("config.json", "rms_norm_eps")),
    ({"head_dim": 7}, ("head_dim", "7")),
    ({"eos_token_id": "</s>"}, ("</s>",)),
    ({"rope_scaling": "yarn"}, ("rope_parameters", "'yarn'")),
]


@pytest.mark.parametrize(("change", "culprits"), LLAMA_CHANGES)
def test_unsupported_llama(change: dict, culprits: tuple[str, ...], tmp_path: Path) -> None:
    refused(write_hf(changed(load_golden("llama_untied"), **change), tmp_path), "config.json", *culprits)


OTHER_CHANGES = [
    ("qwen2_window", {"layer_types": ["full_attention"]}, ("layer_types", "1", "num_hidden_layers", "3")),
    ("qwen2_window", {"layer_types": ["chunked_attention"] * 3}, ("chunked_attention", "full_attention")),
    ("gemma2", {"use_bidirectional_attention": True}, ("use_bidirectional_attention",)),
    (
        "gemma3",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        ("sliding_attention", "linear"),
    ),
    ("phi3_window", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, ("linear", "longrope")),
    (
        "phi3_longrope",
        {"rope_scaling": {"short_factor": [1.0]}, "rope_parameters": {"type": "su"}},
        ("short_factor", "got 1", "4"),
    ),
    ("gemma3", {"sliding_window_pattern": 0}, ("sliding_window_pattern is 0",)),
    ("gemma3", {"layer_types": 0}, ("layer_types", "0")),
    ("gemma3", {"layer_types": [0, 0]}, ("layer_types", "0")),
    ("gemma2", {"sliding_window": 0}, ("sliding_window is 0",)),
    ("gemma2", {"attn_logit_softcapping": "high"}, ("attn_logit_softcapping", "'high'")),
    ("smollm3", {"no_rope_layers": [], "no_rope_layer_interval": 0}, ("no_rope_layer_interval is 0",)),
    ("exaone4", {"layer_types": ["full_attention"] * 3}, ("sliding_attention", "sliding_window = 7")),
    ("gemma4", {"enable_moe_block": True}, ("enable_moe_block is True",)),
    ("lfm2", {"conv_bias": True}, ("conv_bias is True",)),
    ("lfm2", {"layer_types": ["linear_attention"] * 3}, ("linear_attention", "conv")),
    ("minimax_m2", {"scoring_func": "softmax"}, ("scoring_func is 'softmax'",)),
]


@pytest.mark.parametrize(("name", "change", "culprits"), OTHER_CHANGES)
def test_unsupported_variants(name: str, change: dict, culprits: tuple[str, ...], tmp_path: Path) -> None:
    refused(write_hf(changed(load_golden(name), **change), tmp_path), "config.json", *culprits)


def test_unsupported_opt(tmp_path: Path) -> None:
    golden = changed(load_golden("opt_pre_norm"), layer_norm_elementwise_affine=False)
    refused(write_hf(golden, tmp_path), "config.json", "layer_norm_elementwise_affine", "False")


def test_all_mismatches_in_one_message(tmp_path: Path) -> None:
    golden = load_golden("llama_untied")
    weights = dict(golden.weights)
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    weights["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    weights["model.layers.2.self_attn.q_proj.weight"] = np.ones((32, 31), np.float32)
    refused(
        write_hf(dataclasses.replace(golden, weights=weights), tmp_path),
        "2 missing",
        "layers.1.mlp.up_proj.weight",
        "norm.weight",
        "1 unexpected: layers.0.self_attn.q_norm.weight",
        "layers.2.self_attn.q_proj.weight is [32, 31], expected [32, 32]",
    )


def test_missing_files(tmp_path: Path) -> None:
    refused(tmp_path / "no" / "such", "no/such", "does not exist")
    refused(tmp_path, "config.json")
    (tmp_path / "some.gguf").touch()
    refused(tmp_path, "config.json", "some.gguf")
    golden = load_golden("llama_untied")
    write_hf(golden, tmp_path)
    refused(tmp_path / "config.json", "config.json", ".gguf")
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "model.safetensors")
    (tmp_path / "pytorch_model.bin").touch()
    refused(tmp_path, "pytorch_model.bin", "save_pretrained")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json", "not JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json", "list")


def test_bad_shards(tmp_path: Path) -> None:
    write_hf(load_golden("llama_untied"), tmp_path, shards=3)
    second, index = tmp_path / "model-00002-of-00003.safetensors", tmp_path / "model.safetensors.index.json"
    whole, names = second.read_bytes(), json.loads(index.read_text())
    for size in (len(whole) - 5, 100, 4, 0):
        second.write_bytes(whole[:size])
        refused(tmp_path, second.name, "truncated")
    second.unlink()
    refused(tmp_path, second.name, "missing")
    second.write_bytes(whole)
    load_source(tmp_path)
    names["weight_map"]["model.layers.9.lost.weight"] = second.name
    index.write_text(json.dumps(names))
    refused(tmp_path, index.name, "model.layers.9.lost.weight")
    for bad in ("../evil.safetensors", 7):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        refused(tmp_path, index.name, str(bad))
    index.write_text("{}")
    refused(tmp_path, index.name, "weight_map")


def test_bad_dtypes(tmp_path: Path) -> None:
    golden = load_golden("llama_untied")
    refused(write_hf(golden, tmp_path), "float16", "bfloat16", dtype="float16")
    refused(tmp_path, "'nonsense'", dtype="nonsense")
    refused(write_hf(golden, tmp_path / "ints", dtype=np.int32), "I32", "BF16")
