"""MLX's format: MLX itself reads our weights bit for bit, and mlx-lm computes our logits."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import QUANTIZE, said, write_model, write_text
from command_line import refused as refused_command
from golden_models import decoder_of, load_golden, relative_error, run, write_hf
from safetensors.numpy import load_file
from test_gptq_format import quantized as with_wide_scales
from test_gptq_format import uniform

import slim_jax
from convert import ConvertError, load_source
from convert.cli import run as run_command
from convert.cli.sources import open_source
from convert.writers.formats import write
from convert.writers.mlx import export_mlx
from pallas_kernels import MixedTensor, pack, scales
from slim_jax import SlimConfig

mx = pytest.importorskip("mlx.core", reason="MLX has no wheel for this platform")
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm import generate, load  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

TEXT = "The capital of France is a city on the river"

NAMES = [
    "llama_biases", "llama_gqa_tied", "llama_rope_llama3", "mistral_window", "mixtral", "qwen2_bias",
    "qwen3", "qwen3_moe", "gemma3", "phi3_window", "smollm3",
]  # fmt: skip


def quantized(name: str, bits: int, **changes: Any) -> Any:
    """A random model whose scales have 8 bits, as solvers choose them; float16 holds what is not packed."""
    source = with_wide_scales(name, bits, **changes)
    for params in (*source.blocks, source.outer()):
        for key, value in params.items():
            if isinstance(value, MixedTensor):
                params[key] = dataclasses.replace(value, scale=scales.encoded(value.scales()))
            elif key.endswith((".scale", ".bias", ".weight")):
                params[key] = value.astype(np.float16).astype(np.float32)
    return source


def random(widths: list[int], k: int, n: int, group_size: int, zero: float | None = None) -> Any:
    """A packed weight ``[k, n]`` with these widths in turn; zero points of six bits at most, or ``zero``."""
    rng = np.random.default_rng(k + n)
    bits = np.resize(widths, -(-k // group_size))
    stored = 4 if max(widths) <= 4 else 8
    levels = np.exp2(np.repeat(bits, group_size)[:k])
    codes = np.floor(rng.random((k, n)) * levels[:, None]).astype(np.uint32)
    zeros = rng.integers(0, 1 << min(stored, 6), (len(bits), n)) << (stored - min(stored, 6))
    if zero is not None:
        zeros = np.full((len(bits), n), zero * np.exp2(stored - bits)[:, None])
    scale = rng.integers(0, 256, (len(bits), n)).astype(np.uint8)
    return pack(codes, scale, zeros.astype(np.uint8), bits, group_size=group_size)


def written(source: Any, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Exports a model; returns config.json and the arrays, as MLX reads them."""
    export_mlx(source, out)
    return json.loads((out / "config.json").read_text()), mx.load(str(out / "model.safetensors"))


def dequantized(arrays: dict[str, Any], path: str, config: dict[str, Any], dtype: Any = None) -> np.ndarray:
    """Dequantizes one layer with MLX to ``float32[K, N]``; the scales as stored, or in ``dtype``."""
    parts = [arrays[f"{path}.{leaf}"] for leaf in ("scales", "biases")]
    parts = [part.astype(dtype or part.dtype) for part in parts]
    found = mx.dequantize(arrays[f"{path}.weight"], *parts, **config["quantization"][path])
    return np.asarray(found.astype(mx.float32)).T


@pytest.mark.parametrize(
    ("widths", "shape", "group_size", "expected"),
    [
        *(([bits], (256, 24), 64, (bits, 64)) for bits in (2, 3, 4, 5, 6)),
        ([1], (64, 8), 32, (2, 32)),
        ([2, 3, 4], (384, 16), 128, (4, 128)),
        ([2, 5, 3], (576, 16), 128, (5, 64)),  # the last group is a short one
        ([3], (288, 8), 256, (3, 32)),
    ],
)
def test_mlx_reads_our_weights(
    tmp_path: Path, widths: list[int], shape: tuple[int, int], group_size: int, expected: tuple[int, int]
) -> None:
    source = quantized("llama_untied", 4)
    source.blocks[1]["mlp.up.weight"] = weight = random(widths, *shape, group_size)
    config, arrays = written(source, tmp_path / "out")
    path = "model.layers.1.mlp.up_proj"
    assert config["quantization"][path] == {"bits": expected[0], "group_size": expected[1]}
    assert arrays[f"{path}.scales"].dtype == mx.float16
    assert dequantized(arrays, path, config).tobytes() == np.asarray(weight.dequantize()).tobytes()
    embedding = np.asarray(source.outer()["embed"].dequantize())
    np.testing.assert_array_equal(dequantized(arrays, "model.embed_tokens", config), embedding)


def test_seven_bits_are_written_as_eight(tmp_path: Path) -> None:
    """MLX's own float16 arithmetic rounds at 8 bits; that of its products is float32."""
    source = quantized("llama_untied", 4)
    weights = [random([bits], 128, 8, 64, zero=1 << (bits - 1)) for bits in (7, 8)]
    for block, weight in zip(source.blocks, weights):
        block["mlp.up.weight"] = weight
    config, arrays = written(source, tmp_path / "out")
    for index, weight in enumerate(weights):
        path = f"model.layers.{index}.mlp.up_proj"
        assert config["quantization"][path]["bits"] == 8
        np.testing.assert_array_equal(dequantized(arrays, path, config, mx.float32), weight.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_mlx_lm_computes_our_logits(tmp_path: Path, name: str) -> None:
    """Stored types are cast to float32; the next tokens that it chooses are ours."""
    source = quantized(name, 3, scale=0.1, layers=None)
    if name == "gemma3":
        source.config = dataclasses.replace(source.config, embed_scale=source.config.hidden_size**0.5)
    elif name in ("mistral_window", "phi3_window"):  # longer than the text: mlx-lm ignores it
        source.config = dataclasses.replace(source.config, sliding_window=64)
    model, _ = load_model(export_mlx(source, tmp_path / "out"))
    packed = [path for path, _ in tree_flatten(model.parameters()) if path.endswith(".scales")]
    assert len(packed) > 4 * source.config.num_layers
    model.set_dtype(mx.float32)
    tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (1, 6))
    for _ in range(6):
        found = np.asarray(model(mx.array(tokens)))
        tokens = np.concatenate([tokens, found[:, -1:].argmax(-1)], axis=1)
    _, expected = run(decoder_of(source), tokens[:, :-1])
    assert relative_error(found, expected) < 1e-4
    np.testing.assert_array_equal(expected[0, 5:].argmax(-1), tokens[0, 6:])


def test_experts_are_stacked(tmp_path: Path) -> None:
    source = quantized("qwen3_moe", 2)
    up = source.blocks[0]["moe.experts.1.up.weight"]
    source.blocks[0]["moe.experts.1.up.weight"] = random([3], *up.shape, 32)
    config, arrays = written(source, tmp_path / "out")
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    assert config["quantization"][path] == {"bits": 3, "group_size": 32}
    assert "model.layers.0.mlp.gate" not in config["quantization"]
    found = dequantized(arrays, path, config)  # [K, N, experts]
    for expert in range(found.shape[2]):
        expected = source.blocks[0][f"moe.experts.{expert}.up.weight"].dequantize()
        np.testing.assert_array_equal(found[..., expert], expected)


def wide_zero_points(source: Any) -> str:
    source.blocks[1]["mlp.up.weight"] = random([8], 64, 8, 64, zero=171)
    return r"up_proj \(mlp.up.weight\) has biases that float16 cannot hold exactly: quantize with --for mlx"


def wide_scales(source: Any) -> str:
    source.blocks[1]["mlp.up.weight"] = uniform(np.zeros((64, 8)), np.random.default_rng(0), 4, scale=1e-9)
    return r"\(mlp.up.weight\) has scales that float16 cannot hold exactly: .* export with --dtype float32"


def odd_inputs(source: Any) -> str:
    source.blocks[0]["mlp.up.weight"] = random([4], 48, 8, 32)
    return "model.layers.0.mlp.up_proj has 48 inputs, expected a multiple of 32 for mlx"


def not_quantized(source: Any) -> str:
    for block in (*source.blocks, source.outer()):
        for name in block:
            block[name] = np.asarray(getattr(block[name], "dequantize", lambda v=block[name]: v)())
    return "the model has no packed layers, expected a quantized one for mlx"


@pytest.mark.parametrize("change", [wide_zero_points, wide_scales, odd_inputs, not_quantized])
def test_what_has_no_place_in_the_format_is_refused(tmp_path: Path, change: Any) -> None:
    refused(quantized("llama_untied", 4), tmp_path, change)


def test_partly_packed_tensors_are_refused(tmp_path: Path) -> None:
    def change(source: Any) -> str:
        source.blocks[0]["attn.q.weight"] = np.asarray(source.blocks[0]["attn.q.weight"].dequantize())
        return "qkv_proj.weight is packed in part"

    refused(quantized("phi3_window", 4), tmp_path, change)


def test_engines_families(tmp_path: Path) -> None:
    refused(
        quantized("opt_pre_norm", 4), tmp_path, lambda _: "opt is not exported for mlx-lm, expected one of"
    )
    gemma = quantized("gemma3", 4, layers=None)
    gemma.config = dataclasses.replace(gemma.config, global_layers=(0,), sliding_window=8)
    refused(gemma, tmp_path, lambda _: r"blocks \(0,\) have no window, expected a regular pattern for mlx")


def test_windows_that_mlx_lm_ignores_are_told(tmp_path: Path) -> None:
    source = quantized("phi3_window", 4)
    said = write("mlx", source, tmp_path / "out", None, None, [])
    assert said.endswith(f"mlx-lm ignores the attention window of {source.config.sliding_window} tokens")
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].dtype == np.float16


def refused(source: Any, directory: Path, change: Any) -> None:
    with pytest.raises(ConvertError, match=change(source)):
        export_mlx(source, directory / "out")
    assert list(directory.iterdir()) == []


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model quantized for mlx from the command line, at widths that need zero points of eight bits."""
    room = tmp_path_factory.mktemp("room")
    write_model(room / "hf")
    write_text(room / "calib.txt", 300, 1)
    more = ["--for", "mlx", "--bits", "4.5", *QUANTIZE[2:]]
    arguments = ["quantize", room / "hf", room / "q", "--calibration", room / "calib.txt", *more]
    assert run_command([str(argument) for argument in arguments]) == 0
    return room


def test_for_mlx_from_the_command_line(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "export", room / "q", room / "mlx", "--format", "mlx")
    config = json.loads((room / "mlx/config.json").read_text())
    widths = {path: told["bits"] for path, told in config["quantization"].items() if "." in path}
    assert widths["model.embed_tokens"] == 6
    for index in range(config["num_hidden_layers"]):
        for unit in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            assert len({widths[f"model.layers.{index}.{unit[0]}.{name}_proj"] for name in unit[1]}) == 1
    assert set(widths.values()) <= {4, 5, 6, 8}
    assert len(set(widths.values())) > 1
    source = open_source(str(room / "q"))
    arrays = mx.load(str(room / "mlx/model.safetensors"))
    for index in range(source.config.num_layers):
        for ours, theirs in {"attn.v": "self_attn.v_proj", "mlp.down": "mlp.down_proj"}.items():
            expected = source.block(index)[f"{ours}.weight"].dequantize(np.float32)
            found = dequantized(arrays, f"model.layers.{index}.{theirs}", config, mx.float32)
            np.testing.assert_array_equal(found, expected)


def test_mlx_lm_goes_on_as_we_do(room: Path) -> None:
    """`mlx_lm.generate` with the files as a user has them, in float16, and the tokenizer that went along."""
    model, tokenizer = load(str(export_mlx(open_source(str(room / "q")), room / "again")))
    found = tokenizer.encode(generate(model, tokenizer, "w5 w6 w7", max_tokens=16))
    tokens = np.array([[*tokenizer.encode("w5 w6 w7"), *found]])
    _, logits = run(decoder_of(open_source(str(room / "q"))), tokens[:, :-1])
    chosen = logits[0, -len(found) :]
    assert len(found) == 16
    assert np.all(chosen.max(-1) - chosen[np.arange(16), found] < 1e-2 * np.abs(logits).max())


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    source = load_source("smollm2")
    tokens = np.asarray(source.tokenizer(TEXT)["input_ids"], np.int32)
    settings = SlimConfig(bits=4, group_size=64, method="rtn", unit="layer")
    packed, _ = slim_jax.quantize(source, np.resize(tokens, (2, 64)), settings)
    slim_jax.save(packed, tmp_path / "q")
    out = export_mlx(open_source(str(tmp_path / "q")), tmp_path / "out", tokenizer=source.tokenizer)
    model, tokenizer = load(str(out))
    assert tokenizer.encode(TEXT) == tokens.tolist()
    model.set_dtype(mx.float32)
    found = tokens[None]
    for _ in range(16):
        logits = np.asarray(model(mx.array(found)))
        found = np.concatenate([found, logits[:, -1:].argmax(-1)], axis=1)
    _, expected = run(packed, found[:, :-1])
    assert relative_error(logits, expected) < 1e-2
    np.testing.assert_array_equal(expected[0, len(tokens) - 1 :].argmax(-1), found[0, len(tokens) :])


def test_models_that_are_not_exported_are_refused_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf(load_golden("opt_pre_norm"), tmp_path / "hf")
    line = refused_command(
        capsys, "quantize", tmp_path / "hf", tmp_path / "q", "--for", "mlx", "--samples", 4
    )
    assert "opt is not exported for mlx-lm, expected one of" in line
    assert not (tmp_path / "q").exists()
