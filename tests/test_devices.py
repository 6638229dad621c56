"""Quantization on eight devices, and by two processes, gives the same bits and codes as on one device."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from distributed_run import CONFIG, SLIM, TOKENS
from flax import nnx
from test_pipeline import assert_same_checkpoint

from slim_jax.calibrate import pipeline
from slim_jax.calibrate.activations import Activations
from slim_jax.config import SlimConfig
from slim_jax.eval.perplexity import perplexity
from slim_jax.infer.generate import Generator
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import split_params
from slim_jax.placement import Placement
from slim_jax.store import checkpoint
from slim_jax.store.manifest import Block
from slim_jax.store.source import DecoderSource


@pytest.fixture(scope="module")
def source() -> DecoderSource:
    return DecoderSource(Decoder(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "out"
    pipeline.quantize_to_checkpoint(source, TOKENS, SLIM, path)
    return path


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("data", "model"))


@pytest.mark.slow
@pytest.mark.parametrize("offload", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_eight_devices_find_the_same_codes(source, alone, mesh, tmp_path, offload):
    pipeline.quantize_to_checkpoint(source, TOKENS, SLIM, tmp_path / "out", mesh=mesh, offload=offload)
    assert_same_checkpoint(tmp_path / "out", alone)


def quantize_by_two_processes(out: Path, stop_after: int) -> tuple[Block, ...]:
    """Runs two processes of two devices each; returns the manifest's blocks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "distributed_run.py"
    command = [sys.executable, str(script), str(port), "2"]
    processes = [
        subprocess.Popen([*command, str(i), str(out), str(stop_after)], stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors
    return checkpoint.read_manifest(out, complete=False).blocks


@pytest.mark.slow
def test_two_processes_find_the_same_codes(alone, tmp_path):
    blocks = quantize_by_two_processes(tmp_path / "out", CONFIG.num_layers)
    for index in range(2):
        assert any(f"ocdbt.process_{index}/" in file for file in blocks[0].files)
    assert_same_checkpoint(tmp_path / "out", alone)


@pytest.mark.slow
def test_two_processes_resume(alone, tmp_path):
    assert len(quantize_by_two_processes(tmp_path / "out", 1)) == 1
    assert len(quantize_by_two_processes(tmp_path / "out", CONFIG.num_layers)) == CONFIG.num_layers
    assert_same_checkpoint(tmp_path / "out", alone)


def test_samples_and_channels_lie_on_all_devices(source, mesh):
    placement = Placement(mesh)
    seen = {}
    before = Activations.of(source, TOKENS, placement=placement)
    after = before.through(0, source.block(0), lambda names, inputs: seen.update({names: inputs.x}) or {})
    for batches in (*seen.values(), after.batches):
        for x in batches:
            assert {shard.data.shape[0] for shard in x.addressable_shards} == {len(TOKENS) // 8}
    assert placement.channels(np.zeros((3, 16))).addressable_shards[0].data.shape == (3, 2)
    assert placement.channels(np.zeros((3, 12))).is_fully_replicated


@pytest.mark.slow
def test_a_checkpoint_loads_over_several_devices(alone, mesh):
    model, spread = checkpoint.load(alone), checkpoint.load(alone, mesh=mesh)
    words = split_params(spread)[1][0]["mlp.down.weight"].words
    assert len({shard.index for shard in words.addressable_shards}) == 8
    assert spread.blocks[0].mlp.down.weight.get_value().mesh.size == 8
    tokens = TOKENS.reshape(-1)[:128]
    assert perplexity(spread, tokens, 32).perplexity == pytest.approx(
        perplexity(model, tokens, 32).perplexity, rel=1e-5
    )


@pytest.mark.slow
def test_generating_over_several_devices(alone):
    """Each device stores the keys and values of its own heads."""
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    generator = Generator(checkpoint.load(alone, mesh=mesh))
    assert len({shard.index for shard in generator._empty(1, 16).kv[0][0].addressable_shards}) == 2
    prompts = [[3, 4, 5], [7, 8]]
    wanted = Generator(checkpoint.load(alone)).generate(prompts, max_tokens=5)
    assert generator.generate(prompts, max_tokens=5) == wanted


@pytest.mark.slow
def test_learning_over_several_devices(source, mesh):
    config = SlimConfig(
        bits=2, group_size=32, method="slim-plus", criterion="kl", epochs=2, batch_size=8, tune_epochs=1
    )
    losses = {}
    for name, devices in (("one", None), ("eight", mesh)):
        _, report = pipeline.quantize(source, TOKENS, config, mesh=devices)
        losses[name] = report.blocks[0].learning.losses
    assert len(losses["eight"]) > 1
    np.testing.assert_allclose(losses["eight"], losses["one"], rtol=1e-2)


def test_the_number_of_samples_must_fit(source, mesh):
    with pytest.raises(ValueError, match="12 samples, expected a multiple of the 8 devices"):
        pipeline.quantize(source, TOKENS[:12], SLIM, mesh=mesh)
