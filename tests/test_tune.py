"""End-to-end fine-tuning of scales: loss and gradient against oracles, kept results, effects, resuming."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_pipeline import CONFIG, GEMMA, TOKENS, Killed, assert_same_checkpoint

from pallas_kernels import MixedTensor
from slim_jax.calibrate import fine_tuning, fit, pipeline
from slim_jax.calibrate.activations import Activations
from slim_jax.calibrate.embeddings import head_inputs
from slim_jax.calibrate.events import TuningStep
from slim_jax.config import SlimConfig
from slim_jax.method import fine_tune
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import make_decoder, split_params
from slim_jax.store import checkpoint
from slim_jax.store.checkpoint_sink import CheckpointSink
from slim_jax.store.source import DecoderSource

# Validated on its training samples: what a random model learns from a sample says nothing about others.
TUNED = SlimConfig(
    bits=2,
    group_size=32,
    tune=True,
    tune_samples=0,
    tune_epochs=8,
    tune_batch_size=len(TOKENS),
    tune_rate=1e-2,
    embedding_bits=8,
    criterion="kl",
)
UNTUNED = dataclasses.replace(TUNED, tune=False)


def confident(config: DecoderConfig) -> Decoder:
    """A random model whose next tokens differ."""
    model = Decoder(dataclasses.replace(config, num_layers=2), rngs=nnx.Rngs(0))
    model.embed.set_value(20 * model.embed.get_value())
    return model


BOTH = [pytest.param(CONFIG, id="plain"), pytest.param(GEMMA, id="local_global", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=BOTH)
def models(request):
    """A model, and its quantization before fine-tuning."""
    model = confident(request.param)
    return model, pipeline.quantize(model, TOKENS, UNTUNED)[0]


@nnx.jit
def logits(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def divergence(full: Decoder, packed: Decoder, tokens: np.ndarray) -> float:
    """Mean of ``sum_v p (log p - log q)``, in float64 from the models' logits."""
    p, q = (np.asarray(logits(m, jnp.asarray(tokens)), np.float64) for m in (full, packed))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float(np.mean(np.sum(np.exp(p) * (p - q), -1)))


def parts(
    full: Decoder, packed: Decoder, tokens: np.ndarray
) -> tuple[fine_tune.Fixed, fine_tune.Learned, fine_tune.Batch]:
    """Arguments of the loss."""
    source = DecoderSource(full)
    outer, blocks = split_params(packed)
    reference = Activations.of(source, tokens)
    for index in range(source.config.num_layers):
        reference = reference.through(index, source.block(index))
    target = jnp.concatenate(list(head_inputs(source.config, source.outer(), reference)))
    fixed = fine_tune.Fixed(fine_tune.stacked(source.config, blocks), outer, source.outer())
    inside = {run: fine_tune.no_change(params, inside=True) for run, params in fixed.blocks.items()}
    learned = fine_tune.Learned(inside, fine_tune.no_change(outer, inside=False))
    return fixed, learned, fine_tune.Batch(jnp.asarray(tokens, jnp.int32), target)


@partial(jax.jit, static_argnames="config")
def evaluate(config, learned, fixed, batch):
    return fine_tune.TuningLoss(config)(learned, fixed, batch)


@pytest.mark.slow
def test_the_loss_is_the_divergence_of_the_stored_model(models):
    full, packed = models
    fixed, learned, batch = parts(full, packed, TOKENS[:2])
    found = evaluate(full.config, learned, fixed, batch)
    assert float(found) == pytest.approx(divergence(full, packed, TOKENS[:2]), rel=0.03)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda a: jnp.asarray(0.1 * rng.normal(size=a.shape), jnp.float32), learned)
    outer, blocks = split_params(packed)
    offset = full.config.norm_offset
    stored = [fine_tune.apply(block, moved.of(i), offset) for i, block in enumerate(blocks)]
    other = make_decoder(full.config, fine_tune.apply(outer, moved.outer, offset), stored)
    found = evaluate(full.config, moved, fixed, batch)
    assert float(found) == pytest.approx(divergence(full, other, TOKENS[:2]), rel=0.03)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gains_of_norms_are_multiplied(dtype):
    """All norms are scaled, including the model's offset of the scale, and stay storable."""
    config = dataclasses.replace(CONFIG, norm_offset=1.0, qk_norm=True, output_norms=True, num_layers=1)
    outer, (block,) = split_params(Decoder(config, rngs=nnx.Rngs(0)))
    params = {name: jnp.full_like(value, 0.5, dtype) for name, value in (outer | block).items()}
    start = fine_tune.no_change(params, inside=False)
    assert set(start) == {name for name in params if "norm" in name}
    assert len(start) == 7
    found = fine_tune.apply(params, {name: jnp.full_like(a, 0.1) for name, a in start.items()}, 1.0)
    expected = np.asarray(1.5 * np.exp(0.1) - 1, dtype)
    for name in start:
        assert found[name].dtype == dtype
        np.testing.assert_allclose(found[name], np.full_like(found[name], expected), rtol=1e-6)
    assert all(np.all(value == 0.5) for name, value in found.items() if name not in start)


@pytest.mark.slow
def test_the_gradient_is_that_of_finite_differences(models, monkeypatch):
    """Turns off rounding to bfloat16, which would disturb the differences."""
    full, packed = models
    monkeypatch.setattr(fine_tune, "COMPUTE_DTYPE", jnp.dtype(jnp.float32))
    monkeypatch.setattr(fine_tune, "straight_through", lambda x, rounded: x)
    fixed, learned, batch = parts(full, packed, TOKENS[:2])
    loss = jax.jit(lambda learned: fine_tune.TuningLoss(full.config)(learned, fixed, batch))
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), learned)
    gradient = jax.jit(jax.grad(loss))(learned)
    slope = sum(float(jnp.sum(g * d)) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))
    step = 1e-3
    ahead, behind = (
        float(loss(jax.tree.map(lambda a, d, s=s: a + s * d, learned, direction))) for s in (step, -step)
    )
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=0.05, abs=1e-5)
    assert all(np.any(np.asarray(g)) for g in jax.tree.leaves(gradient))  # every scale and norm is reached


@pytest.mark.slow
def test_tuning_lowers_the_divergence_and_leaves_codes(models):
    full, packed = models
    steps = []
    found, report = pipeline.quantize(full, TOKENS, TUNED, on_event=steps.append)
    steps = [event for event in steps if isinstance(event, TuningStep)]
    assert [(event.step, event.total) for event in steps] == [(i, 8) for i in range(1, 9)]
    losses = [loss for _, loss in report.tuning.losses]
    assert [step for step, _ in report.tuning.losses] == [0, 2, 5, 8]
    assert report.tuning.kept == np.argmin(losses) > 0
    assert losses[0] == pytest.approx(divergence(full, packed, TOKENS), rel=0.03)
    assert losses[report.tuning.kept] == pytest.approx(divergence(full, found, TOKENS), rel=0.03)
    for before, after in zip(split_params(packed)[1], split_params(found)[1], strict=True):
        for name, value in before.items():
            if not isinstance(value, MixedTensor):
                assert np.array_equal(value, after[name]) != name.endswith("norm.scale")
                continue
            for leaf in ("words", "zero", "order", "segments"):
                np.testing.assert_array_equal(getattr(value, leaf), getattr(after[name], leaf))
            assert np.any(value.scale != after[name].scale)


def codes(model: Decoder) -> list[np.ndarray]:
    leaves = jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, MixedTensor))
    return [np.asarray(leaf.words) for leaf in leaves if isinstance(leaf, MixedTensor)]


@pytest.mark.slow
def test_layers_are_not_solved_on_what_tuning_looks_at():
    model = confident(dataclasses.replace(CONFIG, num_layers=1))
    own = dataclasses.replace(TUNED, tune_samples=None, tune_batch_size=1, tune_epochs=1)
    half = len(TOKENS) // 2
    found, report = pipeline.quantize(model, TOKENS, own)
    assert report.tuning is not None
    assert 0 < report.tuning.tokens <= (half - 1) * TOKENS.shape[1]  # one sample validates
    untuned, _ = pipeline.quantize(model, TOKENS[:half], UNTUNED)
    for mine, theirs in zip(codes(found), codes(untuned), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_how_many_samples_tuning_has():
    config = SlimConfig().resolved()
    assert [config.samples_to_tune(n) for n in (1, 2, 7, 128)] == [0, 1, 3, 64]
    assert config.samples_to_tune(12, devices=4) == 4
    assert SlimConfig(tune=False, tune_samples=8).resolved().samples_to_tune(4) == 0
    given = SlimConfig(tune_samples=4).resolved()
    assert given.samples_to_tune(12) == 4
    with pytest.raises(ValueError, match="tune_samples is 4 of 4 samples, expected fewer"):
        given.samples_to_tune(4)
    with pytest.raises(ValueError, match="tune_samples is 4, expected a multiple of the 3 devices"):
        given.samples_to_tune(12, devices=3)
    with pytest.raises(ValueError, match="tune_samples is -1, expected 0 or more"):
        SlimConfig(tune_samples=-1)


@pytest.mark.slow
def test_a_tuning_that_only_harms_changes_nothing(models, monkeypatch):
    full, packed = models
    uphill = optax.adam(-0.1)
    monkeypatch.setattr(fine_tuning, "default_optimizer", lambda rate, steps: uphill)
    found, report = pipeline.quantize(full, TOKENS, dataclasses.replace(TUNED, tune_epochs=12))
    assert report.tuning.kept == 0
    assert report.tuning.note
    assert len(report.tuning.losses) <= 1 + fit.PATIENCE  # and it stops early
    for before, after in zip(jax.tree.leaves(nnx.state(packed)), jax.tree.leaves(nnx.state(found))):
        np.testing.assert_array_equal(before, after)


def test_history_keeps_the_best_and_ends_in_time():
    history, lowest = fit.History(), []
    for history.step, loss in enumerate([3.0, 2.0, 2.5]):
        lowest.append(history.record(loss))
    assert lowest == [True, True, False]
    assert not history.over
    history.step = 3
    assert not history.record(2.1)
    assert history.over
    assert (history.losses, history.best, history.note) == ([(0, 3.0), (1, 2.0), (2, 2.5), (3, 2.1)], 1, "")
    broken = fit.History(5, losses=[(0, 1.0)])
    assert not broken.record(float("nan"))
    assert broken.over
    assert "became nan in step 5" in broken.note


@pytest.mark.slow
@pytest.mark.parametrize(
    "after", [1, *(pytest.param(a, marks=pytest.mark.slow) for a in (8, "first block", "blocks"))]
)
def test_a_killed_tuning_goes_on_and_ends_with_the_same_bytes(tmp_path, after, monkeypatch):
    source = DecoderSource(confident(CONFIG))
    monkeypatch.setattr(fit, "SAVED", 1)
    pipeline.quantize_to_checkpoint(source, TOKENS, TUNED, tmp_path / "whole")

    def kill(event):
        # The step is done, and the state of the step before is kept.
        if isinstance(event, TuningStep) and event.step - 1 == after:
            raise Killed

    save = CheckpointSink._save

    def kill_writing(self, folder, params):
        if folder == {"first block": "blocks/001", "blocks": "outer"}.get(after):
            raise Killed
        return save(self, folder, params)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSink, "_save", kill_writing)
        if after == 8:  # all steps are done, none is applied
            patch.setattr(CheckpointSink, "write_tuned", _raise)
        with pytest.raises(Killed):
            pipeline.quantize_to_checkpoint(source, TOKENS, TUNED, tmp_path / "parts", on_event=kill)
    with pytest.raises(ValueError, match="unfinished"):
        checkpoint.load(tmp_path / "parts")
    found = pipeline.quantize_to_checkpoint(source, TOKENS, TUNED, tmp_path / "parts", resume=True)
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts")
    manifests = [json.loads((tmp_path / run / "slim.json").read_text()) for run in ("whole", "parts")]
    assert manifests[0]["tuning"] == manifests[1]["tuning"]
    assert found.tuning is not None
    assert found.tuning.kept > 0
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["blocks", "outer", "slim.json"]


def _raise(*_):
    raise Killed


@pytest.mark.slow
def test_several_devices_share_the_samples(models):
    full, _ = models
    mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2])
    _, alone = pipeline.quantize(full, TOKENS, TUNED)
    _, shared = pipeline.quantize(full, TOKENS, TUNED, mesh=mesh)
    for (_, one), (_, other) in zip(alone.tuning.losses, shared.tuning.losses, strict=True):
        assert one == pytest.approx(other, rel=0.05)


def test_defaults():
    assert SlimConfig(method="slim-plus").resolved().tune
    assert SlimConfig().resolved().tune
    assert not SlimConfig(method="gptq").resolved().tune
    assert not SlimConfig(method="slim-plus", sqc="paper").resolved().tune
    with pytest.raises(ValueError, match="tune_rate is 0, expected above 0"):
        SlimConfig(tune_rate=0)
    with pytest.raises(ValueError, match="tune_epochs is 0, expected at least 1"):
        SlimConfig(tune_epochs=0)
