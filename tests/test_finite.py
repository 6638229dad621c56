"""NaN and infinity: refused by name in weights and calibration inputs, and ignored by learning."""

import dataclasses
import math

import command_line
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import QUANTIZE, tiny_golden, write_model, write_text
from flax import nnx
from golden_models import Golden, load_golden
from test_gguf import write_gguf
from test_pipeline import CONFIG, SLIM, TOKENS

import convert
import slim_jax
from convert.cli import run
from slim_jax import Decoder, SlimConfig, quantize_module
from slim_jax.calibrate.embeddings import quantize_table
from slim_jax.calibrate.fit import fit
from slim_jax.method.budget import LayerCosts, spend
from slim_jax.method.hessian import Observation
from slim_jax.method.layer import LayerSolver
from slim_jax.store.checkpoint import CheckpointSource, save, save_source
from slim_jax.store.source import FiniteSource

DOWN = "model.layers.0.mlp.down_proj.weight"


def damaged(golden: Golden, name: str, value: float = math.nan) -> Golden:
    """Replaces two values of a tensor."""
    weight = golden.weights[name].copy()
    weight.flat[[1, 5]] = value
    return dataclasses.replace(golden, weights={**golden.weights, name: weight})


def test_a_damaged_model_is_refused_by_every_command_that_writes_one(tmp_path, capsys, monkeypatch):
    golden = tiny_golden()
    monkeypatch.setattr(command_line, "tiny_golden", lambda: damaged(golden, DOWN))
    model, text = write_model(tmp_path / "hf"), write_text(tmp_path / "text.txt", 300, 1)
    for command in (["convert", model, tmp_path / "c"], ["quantize", model, tmp_path / "q", "--calibration"]):
        given = [text, *QUANTIZE] if command[0] == "quantize" else []
        capsys.readouterr()
        assert run([str(a) for a in (*command, *given)]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.endswith("blocks.0.mlp.down.weight has 2 of 24,576 values that are NaN or infinite")
        assert str(model) in last


@pytest.mark.parametrize("kind", ["gguf", "checkpoint", "memory"])
def test_every_reader_refuses(tmp_path, kind):
    if kind == "gguf":
        file = tmp_path / "model.gguf"
        write_gguf(damaged(load_golden("llama_gqa_tied"), "model.norm.weight", math.inf), file)
        with pytest.raises(
            ValueError, match=r"model.gguf: norm.scale has 2 of \d+ values that are NaN or inf"
        ):
            FiniteSource(convert.load_source(file)).outer()
        return
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    weight = decoder.embed.get_value()
    decoder.embed.set_value(weight.at[3, 4].set(jnp.nan))
    if kind == "memory":
        with pytest.raises(ValueError, match=r"^embed has 1 of 4,096 values"):
            slim_jax.quantize(decoder, TOKENS, SLIM)
        return
    save(decoder, tmp_path / "dense")  # a copy of the model in memory, whatever it holds
    with pytest.raises(ValueError, match=r"dense: embed has 1 of"):
        save_source(CheckpointSource(tmp_path / "dense"), tmp_path / "again")


def test_a_module_is_refused_too():
    module = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    batch, config = np.ones((4, 32), np.float32), SlimConfig(bits=4, group_size=32, method="rtn")
    with pytest.raises(ValueError, match=r"what inner read for the calibration text is not finite"):
        quantize_module(nnx.Dict(inner=module), [batch * np.inf], config, forward=lambda m, x: m["inner"](x))
    module.kernel.set_value(module.kernel.get_value().at[0, 0].set(jnp.inf))
    with pytest.raises(ValueError, match=r"inner.kernel has 1 of 256 values"):
        quantize_module(nnx.Dict(inner=module), [batch], config, forward=lambda m, x: m["inner"](x))


@pytest.mark.parametrize("method", ["rtn", "slim"])
def test_a_layer_whose_error_is_not_finite_is_named(method):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((64, 96), (96, 8)))
    solver = LayerSolver(SlimConfig(bits=2, group_size=32, method=method, criterion="kl").resolved(), None)
    seen = Observation(x.T @ x, x, len(x))
    with pytest.raises(ValueError, match=r"(attn.q cannot be quantized: the error|scores of attn.q's)"):
        list(solver.solve(["attn.q"], [w * 1e30], seen))
    for broken in (jnp.nan, jnp.inf):
        gram = seen.gram.at[3, 3].set(broken)
        with pytest.raises(ValueError, match=r"what attn\.q, attn\.k read for the .* is not finite"):
            list(solver.solve(["attn.q", "attn.k"], [w, w], seen._replace(gram=gram)))


def test_a_table_whose_error_is_not_finite_is_named():
    table = jnp.full((64, 32), 1e30).at[0].set(-1e30)
    with pytest.raises(ValueError, match="embed cannot be quantized: the error of its outputs is"):
        quantize_table("embed", table, None, SlimConfig().resolved())


def test_costs_of_bits_that_are_not_finite_are_named():
    layers = {"a": LayerCosts(np.ones((2, 2)), 32), "b": LayerCosts(np.array([[1, np.nan], [1, 1]]), 32)}
    with pytest.raises(ValueError, match="the predicted loss increase of b is not finite"):
        spend(layers, (2, 3), 2.5)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_learning_that_begins_without_a_finite_loss_keeps_its_start(loss):
    start = {"layer": {"log_scale": jnp.ones(3)}}
    kept, history = fit(start, lambda *_: pytest.fail("a step"), lambda learned: loss, range(5), None)
    np.testing.assert_array_equal(kept["layer"]["log_scale"], 1.0)
    assert (history.losses, history.best, history.step) == ([], 0, 0)
    assert history.note == f"the validation loss is {loss} at the start; the best parameters before are kept"
