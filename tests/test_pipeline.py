"""The pipeline on a tiny random model: parity, resume, compilations, errors."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_layout import dequantize

from pallas_kernels import MixedTensor
from slim_jax.calibrate import activations, pipeline, sensitivity
from slim_jax.calibrate.events import BlockDone, Event, OnEvent
from slim_jax.config import SlimConfig
from slim_jax.eval.perplexity import perplexity
from slim_jax.eval.windows import select_windows
from slim_jax.method import gptq, hessian, refine, sba
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import make_decoder, split_params
from slim_jax.store import checkpoint, manifest
from slim_jax.store.source import DecoderSource

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=112,  # not a multiple of the group size: a short last group
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=64,
)
SLIM = SlimConfig(bits=2, group_size=32, criterion="kl", tune=False)
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 32))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def quantized(model):
    return pipeline.quantize(model, TOKENS, SLIM)


class Killed(Exception):
    pass


def kill_after(index: int) -> OnEvent:
    """A subscriber that ends a run once a block is finished, as an interruption would."""

    def kill(event: Event) -> None:
        if isinstance(event, BlockDone) and event.report.index == index:
            raise Killed

    return kill


@nnx.jit
def logits(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def dense(decoder: Decoder) -> Decoder:
    """Returns the decoder with the same weights, dequantized."""
    outer, blocks = split_params(decoder)
    unpacked = [
        {name: dequantize(v) if isinstance(v, MixedTensor) else v for name, v in block.items()}
        for block in blocks
    ]
    return make_decoder(decoder.config, outer, unpacked)


def folder_arrays(path):
    """Yields all arrays of a checkpoint, those outside the blocks first."""
    source = checkpoint.CheckpointSource(path)
    for index in range(-1, source.config.num_layers):
        for name, value in (source.outer() if index < 0 else source.block(index)).items():
            leaves = (
                [getattr(value, leaf) for leaf in manifest.LEAVES]
                if isinstance(value, MixedTensor)
                else [value]
            )
            for leaf in leaves:
                yield index, name, np.asarray(leaf)


def assert_same_checkpoint(one, other):
    for (i, name, a), (j, same, b) in zip(folder_arrays(one), folder_arrays(other), strict=True):
        assert (i, name) == (j, same)
        np.testing.assert_array_equal(a, b, err_msg=f"{i} {name}")


def test_packed_equals_fake_quantized(quantized):
    decoder, _ = quantized
    tokens = jnp.asarray(TOKENS[:2])
    np.testing.assert_allclose(logits(decoder, tokens), logits(dense(decoder), tokens), rtol=1e-5, atol=1e-5)
    text = np.random.default_rng(1).integers(0, 64, 200)
    packed, fake = (perplexity(m, text, 32).perplexity for m in (decoder, dense(decoder)))
    assert packed == pytest.approx(fake, rel=1e-5)


def test_report(quantized):
    decoder, report = quantized
    assert len(report.layers) == 3 * 7
    _, blocks = split_params(decoder)
    for layer in report.layers:
        _, index, name = layer.name.split(".", 2)
        tensor = blocks[int(index)][f"{name}.weight"]
        assert layer.shape == tensor.shape
        assert report.allocation[layer.name] == tensor.bits().tolist()
        assert np.mean(tensor.bits()) == 2
        assert 0 < layer.error < 0.5


GEMMA = dataclasses.replace(
    CONFIG,
    sliding_window=8,
    global_layers=(1,),
    local_rope_theta=100.0,
    attn_softcap=5.0,
    output_norms=True,
    qk_norm=True,
    norm_offset=1.0,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [pytest.param(CONFIG, id="alike"), pytest.param(GEMMA, id="local_global", marks=pytest.mark.slow)],
)
def test_each_step_compiles_once_per_model(config):
    model = Decoder(config, rngs=nnx.Rngs(0))
    steps = [
        *(activations._run, activations._observe),
        *(hessian.statistics, hessian.corrected, gptq.solve, refine.refine, sba.scores),
    ]
    counts = []
    for layers in (1, 3):
        for step in steps:
            step.clear_cache()
        outer, blocks = split_params(model)
        small = make_decoder(dataclasses.replace(config, num_layers=layers), outer, blocks[:layers])
        pipeline.quantize(small, TOKENS, SLIM)
        counts.append([step._cache_size() for step in steps])
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2))])
@pytest.mark.parametrize(
    "slim",
    [
        pytest.param(SLIM, marks=pytest.mark.slow),
        pytest.param(SlimConfig(bits=3, group_size=32, sqc="paper"), marks=pytest.mark.slow),
        SlimConfig(bits=2.5, group_size=32, criterion="model", tune=False),
    ],
    ids=["search", "paper", "model"],
)
def test_resumed_equals_uninterrupted(model, tmp_path, monkeypatch, killed_after, slim):
    offload = killed_after == 1  # where activations are stored has no effect
    source = DecoderSource(model)
    pipeline.quantize_to_checkpoint(source, TOKENS, slim, tmp_path / "whole")

    kill = kill_after(killed_after)
    with pytest.raises(Killed):
        pipeline.quantize_to_checkpoint(
            source, TOKENS, slim, tmp_path / "parts", on_event=kill, offload=offload
        )
    assert not (tmp_path / "parts/activations.0").exists()
    (tmp_path / "parts/activations.0/left/by/kill-9").mkdir(parents=True)
    with pytest.raises(ValueError, match="unfinished"):
        checkpoint.load(tmp_path / "parts")
    # A block folder written just before the process could write the manifest.
    shutil.copytree(tmp_path / "parts/blocks/000", tmp_path / "parts/blocks" / f"{killed_after + 1:03d}")
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity.Sweep, "run", None)  # the sweep's result is kept
        pipeline.quantize_to_checkpoint(
            source, TOKENS, slim, tmp_path / "parts", resume=True, offload=offload
        )
    assert not (tmp_path / "parts/drafts").exists()
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts/activations.0").exists()
    before = (tmp_path / "parts/slim.json").read_bytes()
    pipeline.quantize_to_checkpoint(source, TOKENS, slim, tmp_path / "parts", resume=True)
    assert (tmp_path / "parts/slim.json").read_bytes() == before


def test_resume_refuses_other_settings(model, tmp_path):
    source = DecoderSource(model)
    pipeline.quantize_to_checkpoint(source, TOKENS, SLIM, tmp_path / "q")
    before = (tmp_path / "q/slim.json").read_bytes()
    with pytest.raises(ValueError, match="bits was 2, is 3"):
        pipeline.quantize_to_checkpoint(
            source, TOKENS, dataclasses.replace(SLIM, bits=3), tmp_path / "q", resume=True
        )
    with pytest.raises(ValueError, match="calibration"):
        pipeline.quantize_to_checkpoint(source, TOKENS[:4], SLIM, tmp_path / "q", resume=True)
    assert (tmp_path / "q/slim.json").read_bytes() == before


def test_save_and_load(quantized, tmp_path):
    decoder, report = quantized
    checkpoint.save(decoder, tmp_path / "q", report)
    loaded = checkpoint.load(tmp_path / "q")
    tokens = jnp.asarray(TOKENS[:2])
    np.testing.assert_array_equal(logits(loaded, tokens), logits(decoder, tokens))
    summary = checkpoint.inspect(tmp_path / "q")
    assert summary["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    bits = {layer["name"]: layer["bits"] for layer in summary["layers"]}
    assert bits == {layer.name: layer.bits for layer in report.layers}
    with pytest.raises(ValueError, match="not an empty directory"):
        checkpoint.save(decoder, tmp_path / "q")


def test_a_flipped_byte_is_found(quantized, tmp_path):
    checkpoint.save(quantized[0], tmp_path / "q")
    file = max(
        (tmp_path / "q/blocks/001").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.load(tmp_path / "q")


@pytest.mark.parametrize("criterion", ["kl", pytest.param("model", marks=pytest.mark.slow)])
def test_given_allocation_is_used(model, criterion):
    config = dataclasses.replace(SLIM, criterion=criterion)
    allocation = {
        f"blocks.{i}.{name}": [2] * (4 if name == "mlp.down" else 2)
        for i in range(3)
        for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    allocation["blocks.1.attn.q"] = [1, 3]
    _, report = pipeline.quantize(model, TOKENS, config, allocation=allocation)
    assert report.allocation == allocation
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.k, expected 2 groups"):
        pipeline.quantize(model, TOKENS, config, allocation={**allocation, "blocks.0.attn.k": [2]})


def test_packed_models_are_not_quantized_again(quantized):
    with pytest.raises(ValueError, match="already quantized"):
        pipeline.quantize(quantized[0], TOKENS, SLIM)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (TOKENS.astype(float), "float64"),
        (TOKENS[0], "expected int"),
        (TOKENS + 60, "expected 0 to 63"),
        (np.zeros((2, 65), int), "at most 64"),
    ],
)
def test_bad_tokens(model, tokens, says):
    with pytest.raises(ValueError, match=says):
        pipeline.quantize(model, tokens, SLIM)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_baselines_and_their_order(model, quantized, method):
    _, report = pipeline.quantize(model, TOKENS, SlimConfig(bits=2, group_size=32, method=method))
    assert {b for bits in report.allocation.values() for b in bits} == {2}
    assert quantized[1].blocks[0].error < report.blocks[0].error


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits": 1, "criterion": "kl"}, "bits is 1, expected 2 to 7"),
        ({"bits": 9, "method": "rtn"}, "expected 1 to 8"),
        ({"group_size": 48}, "multiple of 32"),
        ({"method": "awq"}, "expected one of slim, slim-plus, gptq, rtn"),
        ({"sqc": "best"}, "sqc is 'best'"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"search_tokens": 0}, "search_tokens is 0"),
        ({"asymmetric": 1.5}, "asymmetric is 1.5, expected 0 to 1"),
        ({"refine": -1}, "refine is -1, expected 0 or more"),
    ],
)
def test_bad_settings(changes, says):
    with pytest.raises(ValueError, match=says):
        SlimConfig(**changes)


def test_windows():
    tokens = np.arange(1000)
    assert select_windows(tokens, 100).shape == (10, 100)
    assert select_windows(tokens, 100, 4)[:, 0].tolist() == [0, 300, 600, 900]
    with pytest.raises(ValueError, match="at least one window"):
        select_windows(tokens, 2000)


def test_perplexity_of_uniform_logits(model):
    outer, blocks = split_params(model)
    flat = make_decoder(CONFIG, {**outer, "embed": outer["embed"] * 0}, blocks)
    assert perplexity(flat, np.arange(64), 32).perplexity == pytest.approx(64, rel=1e-5)
