"""Plans from a model's config alone: sizes compared with those of an actual model."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import refused, said, tiny_golden
from flax import nnx
from golden_models import load_golden, write_hf
from test_pipeline import CONFIG

from bench.models import LLAMA_2_7B
from convert.readers.hf import load_hf
from convert.readers.source import ModelSource
from slim_jax import memory, plan, quantize
from slim_jax.calibrate import activations, quantizer
from slim_jax.config import SlimConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import split_params

GROUPS = ("--group-size", 32)


@pytest.fixture
def model() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


def test_llama_2_7b():
    found = plan.make_plan(LLAMA_2_7B, SlimConfig(bits=2), "v5e")
    assert found.parameters == 6_738_415_616  # as in its paper's repository
    assert found.bfloat16_bytes == 2 * found.parameters
    assert found.cache_bytes_per_token == 2 * 32 * 4096 * 2
    assert found.bits_per_weight == pytest.approx(2 + (8 + 4) / 128, rel=1e-3)
    assert found.fits
    assert found.max_context == 4096
    assert not plan.make_plan(LLAMA_2_7B, SlimConfig(bits=7), "v5e", batch=64).fits


def test_sizes_are_those_of_a_quantized_model(model):
    settings = SlimConfig(bits=2, group_size=32, method="gptq", embedding_bits=16)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 16))
    quantized, _ = quantize(model, tokens, settings)
    outer, blocks = split_params(quantized)
    found = plan.make_plan(model.config, settings, "v5e")
    packed = sum(leaf.nbytes for block in blocks for leaf in block.values() if hasattr(leaf, "words"))
    rest = sum(leaf.nbytes for block in blocks for leaf in block.values() if not hasattr(leaf, "words"))
    assert found.packed_bytes == packed + rest + sum(leaf.nbytes for leaf in outer.values())
    dense = sum(leaf.size for leaf in jax.tree.leaves(split_params(model)))
    assert found.parameters == dense


@pytest.mark.slow
@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
def test_memory_is_that_of_the_arrays_at_the_worst_moment(model, monkeypatch, asymmetric):
    settings = SlimConfig(
        bits=2, group_size=32, criterion="kl", asymmetric=asymmetric, embedding_bits=16, tune=False
    )
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (256, 64))
    before, most = jax.live_arrays(), 0  # kept alive, so that no id is reused
    known = {id(array) for array in before}

    def observe(*arguments):
        nonlocal most
        found = activations.observe(*arguments)
        most = max(most, sum(array.nbytes for array in jax.live_arrays() if id(array) not in known))
        return found

    monkeypatch.setattr(quantizer, "observe", observe)
    quantize(model, tokens, settings)
    size = sum(leaf.size for leaf in jax.tree.leaves(split_params(model)[1][0]))
    planned = memory.held_bytes(model.config, settings.resolved(), size, tokens.size)
    assert 0.8 * most < planned < 1.3 * most


QUANTIZE_TWO_BLOCKS = """
import dataclasses
import convert.readers.load
from convert.cli.program import main

whole = convert.readers.load.open_model

def first_blocks(spec, dtype=None):
    source = whole(spec, dtype)
    source.config = dataclasses.replace(source.config, num_layers=2)
    return source

convert.readers.load.open_model = first_blocks
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere allocators differ")
@pytest.mark.parametrize(
    "options", [["--preset", "fast"], ["--bits", "2.25"]], ids=["blocks", "sweep and tuning"]
)
def test_memory_is_as_forecast(tmp_path, options):
    """Measures a process that quantizes the first blocks of SmolLM2, including its calibration text."""
    asked = ["quantize", "smollm2", str(tmp_path / "q"), *options, "--samples", "64", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", QUANTIZE_TWO_BLOCKS, *asked], stdout=subprocess.PIPE, check=True
    )
    found = json.loads(done.stdout)
    assert found["forecast_bytes"] / 1.5 < found["peak_bytes"] < 1.3 * found["forecast_bytes"]


def test_tuning_needs_the_whole_model():
    """Few windows, whose activations do not outweigh it."""
    fast, good = (
        plan.make_plan(LLAMA_2_7B, SlimConfig.preset(name, bits=2), "v5e", samples=8, length=512)
        for name in ("fast", "good")
    )
    assert good.calibration_bytes > fast.calibration_bytes
    assert good.calibration_bytes > good.packed_bytes


def test_devices_share_what_can_be_cut():
    one, four = (plan.make_plan(LLAMA_2_7B, SlimConfig(bits=2), "v5e", n) for n in (1, 4))
    assert set(one.sharding.values()) == {"replicated"}
    assert set(four.sharding.values()) == {"n"}
    assert four.device_bytes < one.device_bytes
    odd = plan.make_plan(LLAMA_2_7B, SlimConfig(), "v5e", 3)
    assert odd.sharding["attn.o"] == "replicated"


@pytest.mark.parametrize(("text", "expected"), [("v5e", ("v5e", 1)), ("h100:8", ("h100", 8))])
def test_devices(text, expected):
    assert plan.parse_devices(text) == expected


@pytest.mark.parametrize("text", ["v9", "v5e:", "v5e:0", "v5e:x", ""])
def test_bad_devices(text):
    with pytest.raises(ValueError, match="expected"):
        plan.parse_devices(text)


def test_command_needs_no_weights(tmp_path, capsys):
    directory = write_hf(load_golden("llama_gqa_tied"), tmp_path / "hf")
    for file in directory.glob("*.safetensors"):
        file.unlink()
    found = json.loads(said(capsys, "plan", directory, "--bits", 3, *GROUPS, "--devices", "v6e:2", "--json"))
    assert found["devices"] == 2
    assert math.isfinite(found["bits_per_weight"])
    assert "fits" in said(capsys, "plan", directory, *GROUPS)
    apart = json.loads(said(capsys, "plan", directory, *GROUPS, "--embedding-bits", 16, "--json"))
    assert apart["embedding_bytes"] == 0 < found["embedding_bytes"]
    assert "embedding_bits is 9" in refused(capsys, "plan", directory, "--embedding-bits", 9)
    assert "device is 'v9'" in refused(capsys, "plan", directory, "--devices", "v9")


@pytest.mark.parametrize("size", ["1.5GB", "2GB", "3GiB"])
def test_a_target_size_is_met_and_used(size):
    wanted = plan.parse_size(size)
    found = plan.for_size(LLAMA_2_7B, SlimConfig(), wanted)
    whole = SlimConfig(bits=int(found.bits)).resolved()
    assert found.embedding_bits == whole.embedding_bits
    assert (found.tune_rate, found.resolved().tune_rate) == (None, whole.tune_rate)
    assert 0.97 * wanted < plan.make_plan(LLAMA_2_7B, found, "v5e").packed_bytes <= wanted
    assert plan.for_size(LLAMA_2_7B, SlimConfig(embedding_bits=8), wanted).embedding_bits == 8


DTYPES = pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.float16, jnp.bfloat16], ids=lambda dtype: dtype.__name__
)
LEFT = pytest.mark.parametrize("more", [{}, {"embedding_bits": 16}], ids=["packed", "embedding left"])


def written(folder: Path, dtype: Any) -> ModelSource:
    return load_hf(write_hf(tiny_golden(), folder, dtype=dtype))


@DTYPES
@LEFT
def test_what_is_stored_is_at_most_what_is_planned(tmp_path, dtype, more):
    rules = [("*.q", {"bits": 2}), ("*", "skip")]
    source = written(tmp_path, dtype)
    settings = SlimConfig(group_size=32, method="rtn", rules=rules, **more)
    _, report = quantize(source, np.zeros((1, 32), np.int32), settings)
    planned = plan.make_plan(source.config, settings, "v5e").packed_bytes
    assert 0.97 * planned < report.stored_bytes <= planned


@pytest.mark.slow
@DTYPES
@LEFT
def test_a_target_size_holds_for_every_dtype_of_the_source(tmp_path, dtype, more):
    source, wanted = written(tmp_path, dtype), 60_000 + 20_000 * len(more)
    settings = plan.for_size(source.config, SlimConfig(group_size=32, **more), wanted)
    _, report = quantize(source, np.random.default_rng(0).integers(0, 64, (4, 32)), settings)
    assert 0.97 * wanted < report.stored_bytes <= wanted


def test_a_target_size_does_not_depend_on_the_samples_of_tuning():
    found = [plan.for_size(LLAMA_2_7B, SlimConfig(tune=True, tune_samples=n), 2 * 10**9) for n in (1, 500)]
    assert found[0].bits == found[1].bits


def test_target_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="at 1 bit the model takes"):
        plan.for_size(LLAMA_2_7B, SlimConfig(), 10**6)
    with pytest.raises(ValueError, match="needs criterion 'model'"):
        plan.for_size(LLAMA_2_7B, SlimConfig(criterion="kl"), 10**10)


@pytest.mark.parametrize(
    ("text", "size"), [("48MB", 48_000_000), ("1.5 GiB", 1_610_612_736), ("7", 7), ("2kB", 2000)]
)
def test_sizes(text, size):
    assert plan.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1.2.3GB", "5TB", "0"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="expected one such as 48MB"):
        plan.parse_size(text)
