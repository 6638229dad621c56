"""Exported directories: reading them again gives the same model."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden_models
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import load_golden, write_hf
from test_hf import same_parameters
from test_tokenizer import byte_level

from convert import ConvertError, ModelSource, export_hf, load_source
from convert.tokenizer import gguf_tokenizer
from pallas_kernels import pack
from slim_jax import CheckpointError


def golden_source(name: str, directory: Path) -> Any:
    """Opens a golden model as a source without a tokenizer."""
    source = load_source(write_hf(load_golden(name), directory))
    return SimpleNamespace(config=source.config, origin={}, outer=source.outer, block=source.block)


@pytest.mark.parametrize("name", golden_models.NAMES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    source = golden_source(name, tmp_path / "in")
    assert export_hf(source, tmp_path / "out") == tmp_path / "out"
    again = load_source(tmp_path / "out")
    assert again.config == source.config
    assert same_parameters(source, again)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    original = load_golden(name).config
    assert written["architectures"] == original["architectures"]
    assert written["dtype"] == "float32"


def test_shards_and_dtype(tmp_path: Path) -> None:
    source = golden_source("llama_untied", tmp_path / "in")
    out = export_hf(source, tmp_path / "out", dtype="bfloat16", shard_bytes=20_000)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    again: ModelSource = load_source(out)
    assert again.block(0)["attn.q.weight"].dtype == jnp.bfloat16
    assert same_parameters(source, again)  # the goldens are exact in bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_packed_weights_are_dequantized(tmp_path: Path) -> None:
    source = golden_source("llama_untied", tmp_path / "in")
    rng = np.random.default_rng(0)
    packed = pack(
        rng.integers(0, 4, (32, 48), np.uint32),
        rng.random((1, 48), np.float32),
        rng.integers(0, 16, (1, 48), np.uint32),
        np.array([2]),
        group_size=32,
    )
    blocks = [{**source.block(i), "mlp.up.weight": packed} for i in range(source.config.num_layers)]
    source.block = blocks.__getitem__
    again = load_source(export_hf(source, tmp_path / "out"))
    np.testing.assert_array_equal(again.block(2)["mlp.up.weight"], packed.dequantize())
    np.testing.assert_array_equal(again.block(2)["mlp.gate.weight"], blocks[2]["mlp.gate.weight"])


def test_tokenizer_goes_along(tmp_path: Path) -> None:
    source = golden_source("llama_untied", tmp_path / "in")
    tokenizer = gguf_tokenizer(byte_level(), "x")
    out = export_hf(source, tmp_path / "out", tokenizer=tokenizer)
    assert load_source(out).tokenizer("the 2024").input_ids == tokenizer("the 2024").input_ids


def test_into_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_hf(golden_source("opt_pre_norm", tmp_path / "in"), tmp_path / "out")
    assert load_source(tmp_path / "out").config.family == "opt"


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    source = golden_source("llama_untied", tmp_path / "in")
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="occupied exists and is not an empty directory"):
        export_hf(source, occupied)
    with pytest.raises(ConvertError, match="dtype is 'int8', expected one of float32"):
        export_hf(source, tmp_path / "out", dtype="int8")
    source.block = lambda index: 1 / 0
    with pytest.raises(ZeroDivisionError):
        export_hf(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "occupied"]


def test_configs_that_transformers_lacks(tmp_path: Path) -> None:
    source = golden_source("llama_untied", tmp_path / "in")
    for change in ({"qkv_bias": True}, {"sliding_window": 5, "mlp_bias": True}):
        source.config = dataclasses.replace(load_source(tmp_path / "in").config, **change)
        with pytest.raises(ConvertError, match="no class of transformers"):
            export_hf(source, tmp_path / "out")
    source.config = dataclasses.replace(source.config, family="gpt9")
    with pytest.raises(ConvertError, match="family 'gpt9' is not known"):
        export_hf(source, tmp_path / "out")


def test_file_weights_are_transposed_views_no_more(tmp_path: Path) -> None:
    """safetensors' NumPy writer stores a view's underlying buffer, which would be untransposed."""
    source = golden_source("llama_gqa_tied", tmp_path / "in")
    export_hf(source, tmp_path / "out")
    up = load_source(tmp_path / "out").block(0)["mlp.up.weight"]
    np.testing.assert_array_equal(
        up, load_golden("llama_gqa_tied").weights["model.layers.0.mlp.up_proj.weight"].T
    )
