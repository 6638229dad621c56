"""Checkpoints that are quantized already: each decoder against its own library, and whole directories."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from command_line import said
from golden_models import HERE, Golden, load_golden, write_hf
from safetensors.numpy import save_file
from test_gptq_format import quantized
from test_hf import changed, refused, same_parameters
from test_towers import one_line

from convert import load_source
from convert.readers import decoders
from convert.report import report_page
from convert.writers.gptq import export_gptq, pack_rows
from pallas_kernels import MixedTensor
from slim_jax.store import checkpoint
from slim_jax.store.manifest import read_manifest

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def case(name: str) -> dict[str, np.ndarray]:
    """A case of `goldens/make_quantized.py`."""
    with np.load(HERE / "quantized" / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize(("name", "bits"), [("int4_group", 4), ("int4_zero", 4), ("int8_channel", 8)])
def test_compressed_tensors(name: str, bits: int) -> None:
    stored = case(name)
    found = decoders.pack_quantized(
        *(stored[f"weight_{part}"] for part in ("packed", "scale", "shape")),
        stored.get("weight_zero_point"),
        bits=bits,
    )
    np.testing.assert_allclose(found, stored["decoded"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "block"), [("fp8_tensor", None), ("fp8_block", (16, 16))])
def test_fp8(name: str, block: tuple[int, int] | None) -> None:
    stored = case(name)
    weight = stored["weight"].view(ml_dtypes.float8_e4m3fn)
    found = decoders.scaled(weight, stored["weight_scale_inv"], block)
    np.testing.assert_array_equal(found, stored["decoded"])


def test_mxfp4() -> None:
    stored = case("mxfp4")
    found = decoders.mxfp4(stored["blocks"], stored["scales"])
    np.testing.assert_array_equal(found.astype(np.float32), stored["decoded"])


def directory(golden: Golden, path: Path, tensors: dict[str, np.ndarray], told: Any, **fields: Any) -> Path:
    """Writes a golden model whose layers of the blocks are ``tensors`` instead."""
    layers = {name.rpartition(".")[0] for name in golden.weights if "_proj" in name}
    rest = {k: v for k, v in golden.weights.items() if k.rpartition(".")[0] not in layers}
    write_hf(changed(golden, quantization_config=told, **fields), path)
    save_file(
        {k: np.ascontiguousarray(v) for k, v in {**rest, **tensors}.items()}, path / "model.safetensors"
    )
    return path


def linear_weights(golden: Golden) -> dict[str, np.ndarray]:
    return {name: value for name, value in golden.weights.items() if "_proj" in name}


def with_weights(golden: Golden, path: Path, weights: dict[str, np.ndarray]) -> Any:
    """Opens the golden model with other weights, as float32."""
    return load_source(write_hf(dataclasses.replace(golden, weights={**golden.weights, **weights}), path))


def test_fp8_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden, tensors, expected = load_golden("llama_untied"), {}, {}
    rng = np.random.default_rng(0)
    for name, value in linear_weights(golden).items():
        codes = value.astype(ml_dtypes.float8_e4m3fn)
        scale = rng.random([-(-size // 16) for size in value.shape]).astype(np.float32)
        tensors |= {name: codes, f"{name}_scale_inv": scale, name[:-6] + "activation_scale": np.ones(())}
        rows, columns = (np.arange(size) // 16 for size in value.shape)
        expected[name] = codes.astype(np.float32) * scale[rows][:, columns]
    told = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    source = load_source(directory(golden, tmp_path / "fp8", tensors, told))
    assert same_parameters(source, with_weights(golden, tmp_path / "plain", expected))
    assert source.origin["quantized"] == "FP8, a scale per 16 x 16 weights"
    note = "the source is quantized already (FP8, a scale per 16 x 16 weights)"
    assert note in one_line(said(capsys, "plan", tmp_path / "fp8"))
    checkpoint.save_source(source, tmp_path / "out")
    assert note in one_line(said(capsys, "inspect", tmp_path / "out"))
    assert note in report_page("model", read_manifest(tmp_path / "out"))
    assert load_source(tmp_path / "fp8", "bfloat16").block(0)["attn.q.weight"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_compressed_float_directory(strategy: str, tmp_path: Path) -> None:
    golden, tensors, expected = load_golden("llama_untied"), {}, {}
    rng = np.random.default_rng(0)
    for name, value in linear_weights(golden).items():
        codes = value.astype(ml_dtypes.float8_e4m3fn)
        scale = rng.random((len(value), 1) if strategy == "channel" else 1).astype(ml_dtypes.bfloat16)
        tensors |= {name: codes, f"{name}_scale": scale}
        expected[name] = codes.astype(np.float32) * scale.astype(np.float32)
    weights = {"num_bits": 8, "type": "float", "strategy": strategy}
    told = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    source = load_source(directory(golden, tmp_path / "float", tensors, told))
    assert same_parameters(source, with_weights(golden, tmp_path / "plain", expected))


def test_compressed_int_directory(tmp_path: Path) -> None:
    golden, tensors, expected = load_golden("llama_untied"), {}, {}
    rng = np.random.default_rng(0)
    for name, (rows, columns) in ((n, v.shape) for n, v in linear_weights(golden).items()):
        codes = rng.integers(-8, 8, (rows, columns))
        scale = rng.random((rows, columns // 8)).astype(np.float32)
        prefix = name.removesuffix("weight")
        words = pack_rows((codes.T + 8).astype(np.uint32), 4).T.view(np.int32)
        tensors |= {
            f"{prefix}weight_packed": words,
            f"{prefix}weight_scale": scale,
            f"{prefix}weight_shape": np.array([rows, columns], np.int64),
        }
        expected[name] = (codes * np.repeat(scale, 8, 1)).astype(np.float32)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True}
    told = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    source = load_source(directory(golden, tmp_path / "int", tensors, told))
    assert same_parameters(source, with_weights(golden, tmp_path / "plain", expected))
    told["config_groups"]["group_1"] = {"weights": {"num_bits": 3}}
    refused(directory(golden, tmp_path / "mixed", tensors, told), "pack-quantized, 3 and 4 bits")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["llama_untied", "phi3_window"])
def test_gptq_directory(name: str, bits: int, tmp_path: Path) -> None:
    """Files of our own writer, whose format others read, give the weights that were packed."""
    model = quantized(name, bits, scale=0.25)
    source = load_source(export_gptq(model, tmp_path / "gptq", "bfloat16"))
    assert source.origin["quantized"] == f"GPTQ, {bits} bits, groups of 32"
    for i in range(model.config.num_layers):
        found = source.block(i)
        for key, value in model.block(i).items():
            if isinstance(value, MixedTensor):
                dense = np.asarray(value.dequantize(), np.float32)
                np.testing.assert_allclose(found[key], dense, rtol=1e-6, atol=1e-6, err_msg=key)


def test_gptq_with_activation_order() -> None:
    rng = np.random.default_rng(0)
    codes, zeros = rng.integers(0, 16, (32, 16)), rng.integers(1, 16, (4, 16))
    scales, index = rng.random((4, 16)), rng.permutation(np.arange(32) // 8).astype(np.int32)
    stored = (
        pack_rows(codes.astype(np.uint32), 4).view(np.int32),
        np.ascontiguousarray(pack_rows((zeros - 1).astype(np.uint32).T, 4).T).view(np.int32),
        scales.astype(np.float32),
        index,
    )
    found = decoders.gptq(*stored, bits=4, size=8, offset=1)
    np.testing.assert_allclose(found.T, scales[index] * (codes - zeros[index]), rtol=1e-6)


def test_awq_directory(tmp_path: Path) -> None:
    golden, tensors, expected = load_golden("llama_untied"), {}, {}
    rng = np.random.default_rng(0)

    def packed(codes: np.ndarray) -> np.ndarray:
        words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
        for column in range(codes.shape[1]):
            place = (0, 4, 1, 5, 2, 6, 3, 7)[column % 8]  # even columns in the low half of a word
            words[:, column // 8] |= codes[:, column].astype(np.uint32) << np.uint32(4 * place)
        return words.view(np.int32)

    for name, (rows, columns) in ((n, v.shape) for n, v in linear_weights(golden).items()):
        codes, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(0, 16, (columns // 8, rows))
        scales = rng.random((columns // 8, rows)).astype(np.float16)
        prefix = name.removesuffix("weight")
        tensors |= {f"{prefix}qweight": packed(codes), f"{prefix}qzeros": packed(zeros)}
        tensors[f"{prefix}scales"] = scales
        spread = [np.repeat(part.astype(np.float32), 8, 0) for part in (zeros, scales)]
        expected[name] = ((codes - spread[0]) * spread[1]).T.astype(np.float32)
    told = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}
    source = load_source(directory(golden, tmp_path / "awq", tensors, told))
    assert same_parameters(source, with_weights(golden, tmp_path / "plain", expected))
    del tensors["model.layers.1.mlp.up_proj.scales"]
    refused(directory(golden, tmp_path / "lost", tensors, told), "layers.1.mlp.up_proj.scales is missing")


@pytest.mark.parametrize(
    ("told", "culprits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bitsandbytes", "fp8, mxfp4")),
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, ("bits", "5")),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, ("marlin",)),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, ("gemv",)),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, ("marlin-24",)),
    ],
)
def test_methods_that_are_not_read(
    told: dict[str, Any], culprits: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = changed(load_golden("llama_untied"), quantization_config=told)
    refused(write_hf(golden, tmp_path), *culprits)


def test_a_weight_without_its_scale(tmp_path: Path) -> None:
    golden = load_golden("llama_untied")
    tensors = {k: v.astype(ml_dtypes.float8_e4m3fn) for k, v in linear_weights(golden).items()}
    path = directory(golden, tmp_path, tensors, {"quant_method": "fp8"})
    refused(path, "_proj.weight is F8_E4M3 without", "weight_scale_inv")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    refused(path, "F8_E4M3", "BF16")
