"""The GPTQ format: an oracle of its documented arithmetic recovers the model bit for bit."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from golden_models import load_golden
from safetensors.numpy import load_file
from transformers.utils.quantization_config import GPTQConfig

from convert import ConvertError
from convert.families import by_architecture
from convert.readers.config import read_resolved
from convert.writers.gptq import export_gptq
from pallas_kernels import pack
from pallas_kernels.layout import zero_bits
from slim_jax.model.params import block_buffers, block_params, outer_params


def stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Reads ``count`` values of ``bits`` bits from ``int32[...]`` words, last axis, low bits first."""
    spread = (words.view(np.uint32)[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    values = spread.reshape(*words.shape[:-1], -1)[..., : count * bits].reshape(
        *words.shape[:-1], count, bits
    )
    return (values.astype(np.int64) << np.arange(bits)).sum(-1)


def dequantize(tensors: dict[str, np.ndarray], prefix: str, config: dict[str, Any]) -> np.ndarray:
    """Dequantizes to ``float32[K, N]`` by GPTQModel's documentation.

    The formula is ``scales * (code - zero)``, with groups by ``g_idx``. The first version of the format adds
    one to the stored zero point.
    """
    bits = config["bits"]
    qweight, qzeros = tensors[f"{prefix}.qweight"], tensors[f"{prefix}.qzeros"]
    scales, g_idx = tensors[f"{prefix}.scales"], tensors[f"{prefix}.g_idx"]
    assert [a.dtype for a in (qweight, qzeros, g_idx)] == [np.int32] * 3
    k, n = len(g_idx), scales.shape[1]
    assert qweight.shape == (k * bits // 32, n)
    assert qzeros.shape == (len(scales), n * bits // 32)
    code = stream(np.ascontiguousarray(qweight.T), bits, k).T
    zero = stream(qzeros, bits, n) + (config["checkpoint_format"] == "gptq")
    return scales.astype(np.float32)[g_idx] * (code - zero[g_idx]).astype(np.float32)


def uniform(weight: Any, rng: np.random.Generator, bits: int, **changes: Any) -> Any:
    """Random codes with integer zero points in the shape of a weight, in groups of 32."""
    k, n = weight.shape
    groups = -(-k // 32)
    lowest = changes.pop("lowest", 1)
    unit = 1 << (zero_bits((bits,)) - bits)  # of a stored zero point
    zeros = rng.integers(lowest, 1 << bits, (groups, n)) * unit + changes.pop("fraction", 0)
    codes = rng.integers(0, 1 << bits, (k, n)).astype(np.uint32)
    scale = changes.pop("scale", 1) * (rng.random((groups, n), np.float32) + 0.01)
    return pack(codes, scale, zeros.astype(np.uint32), np.full(groups, bits), group_size=32, **changes)


def quantized(name: str, bits: int, *, heads: int = 2, layers: int | None = 2, **changes: Any) -> Any:
    """A random model of a golden's architecture, with the blocks' layers and the embedding packed.

    It has ``layers`` blocks, or as many as the golden.
    """
    hf = load_golden(name).config
    config = read_resolved(hf, by_architecture(hf["architectures"][0]).hf)
    config = dataclasses.replace(
        config, hidden_size=64, intermediate_size=96, num_layers=layers or config.num_layers,
        num_heads=heads, num_kv_heads=1, head_dim=32,
    )  # fmt: skip
    rng = np.random.default_rng(bits)

    def random(params: Any) -> dict[str, Any]:
        dense = {key: rng.normal(size=shape.shape).astype(np.float32) for key, shape in params.items()}
        packed = [
            key for key in dense if key.endswith(".weight") and "router" not in key and key != "head.weight"
        ]
        return {**dense, **{key: uniform(dense[key], rng, bits, **changes) for key in packed}}

    kinds = enumerate(config.blocks())
    blocks = [{**random(block_params(kind)), **block_buffers(config, i)} for i, kind in kinds]
    outer = random(outer_params(config))
    outer["embed"] = uniform(outer["embed"].T, rng, 5)
    return SimpleNamespace(
        config=config, origin={}, outer=lambda: outer, block=blocks.__getitem__, blocks=blocks
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("lowest", [0, 1])
def test_it_is_the_model_bit_for_bit(tmp_path: Path, bits: int, lowest: int) -> None:
    source = quantized("llama_untied", bits, lowest=lowest)
    out = export_gptq(source, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    config = json.loads((out / "quantize_config.json").read_text())
    assert config["checkpoint_format"] == ("gptq" if lowest else "gptq_v2")
    assert config["bits"] == bits
    for index, block in enumerate(source.blocks):
        for ours, theirs in {"attn.q": "self_attn.q_proj", "mlp.down": "mlp.down_proj"}.items():
            found = dequantize(tensors, f"model.layers.{index}.{theirs}", config)
            expected = np.asarray(block[f"{ours}.weight"].dequantize(np.float32))
            assert found.tobytes() == expected.tobytes()
    assert tensors["model.layers.0.self_attn.q_proj.scales"].dtype == np.float16
    assert not any(name.endswith("proj.weight") for name in tensors)
    np.testing.assert_array_equal(
        tensors["model.embed_tokens.weight"],
        np.asarray(source.outer()["embed"].dequantize(np.float32)).T.astype(np.float16),
    )


def test_parts_of_one_tensor_lie_side_by_side(tmp_path: Path) -> None:
    source = quantized("phi3_window", 4)
    tensors = load_file(export_gptq(source, tmp_path / "out") / "model.safetensors")
    config = json.loads((tmp_path / "out/quantize_config.json").read_text())
    found = dequantize(tensors, "model.layers.1.self_attn.qkv_proj", config)
    parts = [source.blocks[1][f"attn.{part}.weight"].dequantize() for part in "qkv"]
    np.testing.assert_array_equal(found, np.concatenate(parts, axis=1))


def test_layers_that_are_not_packed_are_named(tmp_path: Path) -> None:
    source = quantized("qwen3_moe", 4)
    tensors = load_file(export_gptq(source, tmp_path / "out") / "model.safetensors")
    config = json.loads((tmp_path / "out/quantize_config.json").read_text())
    routers = [name for name in tensors if name.endswith("mlp.gate.weight")]
    assert len(routers) == source.config.num_layers
    assert next(iter(config["dynamic"])) == r"-:^model\.layers\.0\.mlp\.gate$"
    assert len(config["dynamic"]) == len(routers)
    found = dequantize(tensors, "model.layers.0.mlp.experts.1.up_proj", config)
    np.testing.assert_array_equal(found, source.blocks[0]["moe.experts.1.up.weight"].dequantize())


def test_transformers_takes_the_config(tmp_path: Path) -> None:
    source = quantized("llama_biases", 4)
    out = export_gptq(source, tmp_path / "out", "bfloat16")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == json.loads((out / "quantize_config.json").read_text())
    assert config["dtype"] == "bfloat16"
    read = GPTQConfig(**config["quantization_config"])
    assert (read.bits, read.group_size, read.format, read.desc_act, read.sym) == (4, 32, "gptq", False, False)
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.bias"].dtype == ml_dtypes.bfloat16
    assert tensors["model.layers.0.self_attn.q_proj.scales"].dtype == ml_dtypes.bfloat16


def mixing(source: Any) -> str:
    block = source.blocks[1]
    rng = np.random.default_rng(0)
    k, n = block["mlp.up.weight"].shape
    bits = np.resize([2, 4], k // 32)
    codes = rng.integers(0, 4, (k, n), np.uint32)
    ones = np.ones((k // 32, n), np.float32)
    block["mlp.up.weight"] = pack(codes, ones, ones.astype(np.uint32) * 4, bits, group_size=32)
    return r"up_proj.weight \(mlp.up.weight\) mixes groups of 2 and 4 bits, expected one width for gptq"


def of_another_width(source: Any) -> str:
    source.blocks[1]["mlp.up.weight"] = uniform(
        source.blocks[1]["mlp.up.weight"], np.random.default_rng(0), 2
    )
    return r"\(mlp.up.weight\) has bits 2, other layers 4, expected one for gptq"


def with_a_dense_part(source: Any) -> str:
    source.blocks[0]["attn.q.weight"] = np.asarray(source.blocks[0]["attn.q.weight"].dequantize())
    return "qkv_proj.weight is packed in part"


def not_quantized(source: Any) -> str:
    for block in source.blocks:
        for name in block:
            block[name] = np.asarray(getattr(block[name], "dequantize", lambda v=block[name]: v)())
    return "no packed layers, expected a quantized one"


@pytest.mark.parametrize("change", [mixing, of_another_width, not_quantized])
def test_what_has_no_place_in_the_format_is_refused(tmp_path: Path, change: Any) -> None:
    refused(quantized("llama_untied", 4), tmp_path, change)


def test_half_packed_tensors_are_refused(tmp_path: Path) -> None:
    refused(quantized("phi3_window", 4), tmp_path, with_a_dense_part)


@pytest.mark.parametrize(
    ("bits", "changes", "expected"),
    [
        (2, {"fraction": 1}, r"has zero points that are not whole"),
        (5, {}, r"has 5 bits, expected one of 2, 3, 4, 8"),
        (4, {"scale": 1e-9}, r"has scales that float16 cannot hold: export with --dtype bfloat16"),
    ],
)
def test_values_that_it_cannot_hold_are_refused(
    tmp_path: Path, bits: int, changes: dict[str, Any], expected: str
) -> None:
    refused(quantized("llama_untied", bits, **changes), tmp_path, lambda _: expected)


def refused(source: Any, directory: Path, change: Any) -> None:
    with pytest.raises(ConvertError, match=change(source)) as caught:
        export_gptq(source, directory / "out")
    assert "\n" not in str(caught.value)
    assert list(directory.iterdir()) == []


def test_shapes_that_do_not_end_where_words_end(tmp_path: Path) -> None:
    source = quantized("llama_untied", 3)
    source.blocks[1]["mlp.up.weight"] = uniform(np.zeros((64, 80)), np.random.default_rng(0), 3)
    refused(source, tmp_path, lambda _: r"is 64 x 80, expected multiples of 32 for gptq at 3 bits")
