"""Failures during a run: one clear message, no finished block is lost, and a resumed run ends the same."""

import contextlib
import dataclasses
import resource

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import QUANTIZE, write_model, write_text
from flax import nnx
from test_pipeline import CONFIG, SLIM, TOKENS, assert_same_checkpoint

from convert.cli import run
from slim_jax import Decoder
from slim_jax.calibrate import pipeline, quantizer
from slim_jax.method.hessian import Observation
from slim_jax.method.layer import LayerSolver
from slim_jax.store.source import DecoderSource


@contextlib.contextmanager
def file_size_limit(size: int):
    """Larger files cannot be written inside the block, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk(tmp_path):
    source = DecoderSource(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    pipeline.quantize_to_checkpoint(source, TOKENS, SLIM, tmp_path / "whole")
    with contextlib.ExitStack() as stack:

        def fill_the_disk(event):
            if event.report.index == 0:
                stack.enter_context(file_size_limit(2000))

        with pytest.raises(ValueError, match=r"parts/blocks/001 cannot be written: .*"):
            pipeline.quantize_to_checkpoint(source, TOKENS, SLIM, tmp_path / "parts", on_event=fill_the_disk)
    pipeline.quantize_to_checkpoint(source, TOKENS, SLIM, tmp_path / "parts", resume=True)
    assert sorted(path.name for path in (tmp_path / "parts/blocks").iterdir()) == ["000", "001", "002"]
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_shard_that_goes_away(tmp_path, capsys, monkeypatch):
    model = write_model(tmp_path / "hf", shards=3)
    text = write_text(tmp_path / "calib.txt", 300, 1)
    command = ["quantize", model, tmp_path / "q", "--calibration", text, *QUANTIZE]
    shards = sorted(model.glob("*.safetensors"))
    quantize = quantizer.BlockQuantizer.quantize

    def lose_a_shard(self, index, *rest):
        if index == 1:
            shards[1].rename(shards[1].with_suffix(".gone"))
        return quantize(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(quantizer.BlockQuantizer, "quantize", lose_a_shard)
        assert shards[1].name in refused_after_progress(capsys, *command)
    shards[1].with_suffix(".gone").rename(shards[1])
    assert run([*map(str, command), "--resume"]) == 0
    assert (
        run([str(a) for a in ("quantize", model, tmp_path / "whole", "--calibration", text, *QUANTIZE)]) == 0
    )
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "q")


def refused_after_progress(capsys, *arguments) -> str:
    """Runs a command that fails during the run; returns the last line that it prints."""
    capsys.readouterr()
    assert run([str(a) for a in arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_damping_is_raised_where_it_takes_that():
    """A Hessian with a negative eigenvalue, as float32 sums of nearly dependent inputs can have."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(32, 32)))[0]
    eigenvalues = np.linspace(1, 2, 32)
    eigenvalues[0] = -0.1
    gram = jnp.asarray(q * eigenvalues @ q.T, jnp.float32)
    seen = Observation(gram, jnp.asarray(rng.normal(size=(16, 32)), jnp.float32), 1)
    weight = jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)
    solver = LayerSolver(dataclasses.replace(SLIM, damping=0.01).resolved(), None)
    with pytest.warns(UserWarning, match="layer is positive definite only when damped by 0.1"):
        ((tensor, report),) = solver.solve(["layer"], [weight], seen)
    assert report.damping == pytest.approx(0.1)
    assert np.isfinite(tensor.dequantize()).all()
    with pytest.raises(ValueError, match="the Hessian of layer is not positive definite, damped by 10"):
        list(solver.solve(["layer"], [weight], seen._replace(gram=-100 * gram)))
