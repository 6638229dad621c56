"""Layers that compensate the error of the layers before them, compared with float64 least squares."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from test_pipeline import CONFIG

from slim_jax.calibrate.activations import Inputs, observe
from slim_jax.calibrate.embeddings import quantize_table
from slim_jax.calibrate.pipeline import quantize
from slim_jax.config import SlimConfig
from slim_jax.eval.perplexity import perplexity
from slim_jax.method.hessian import Observation, corrected
from slim_jax.model.decoder import Decoder
from slim_jax.placement import Placement

UNIFORM = SlimConfig(bits=2, group_size=32, method="gptq", sqc="search", embedding_bits=16)


@pytest.mark.parametrize("adds", [False, True])
def test_the_target_is_the_least_squares_one(adds):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 24)) @ rng.normal(size=(24, 24))
    full = x + 0.3 * rng.normal(size=x.shape)
    w, missing = rng.normal(size=(24, 5)), rng.normal(size=(300, 5)) if adds else np.zeros((300, 5))
    u = oracles.inverse_cholesky(oracles.hessian(x))
    unit = 2 / len(x)
    given = [jnp.asarray(a, jnp.float32) for a in (w, u, unit * x.T @ (full - x), unit * x.T @ missing)]
    if not adds:
        given[3] = None
    best = np.linalg.lstsq(x, full @ w + missing, rcond=None)[0]
    np.testing.assert_allclose(corrected(*given, jnp.float32(1)), best, atol=1e-3)
    np.testing.assert_allclose(corrected(*given, jnp.float32(0.5)), (w + best) / 2, atol=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_lost(weighted):
    """Several batches, with equal or weighted tokens; the sums are scaled like the Gram matrix."""
    rng = np.random.default_rng(1)
    x, full = rng.normal(size=(2, 3, 4, 6, 32)).astype(np.float32)
    h, full_h = rng.normal(size=(2, 3, 4, 6, 16)).astype(np.float32)
    weights = rng.random((12, 6)).astype(np.float32) if weighted else None
    arrays = [list(map(jnp.asarray, batches)) for batches in (x, h, full, full_h)]
    reference = Inputs(arrays[2], residual=arrays[3])
    inputs = Inputs(arrays[0], weights=weights, residual=arrays[1], reference=reference)
    found = observe(inputs, 4, Placement())
    counts = np.ones((12, 6)) if weights is None else weights
    counts = (counts / counts.mean()).reshape(-1, 1)
    flat, apart = x.reshape(-1, 32).astype(np.float64), (full - x).reshape(-1, 32).astype(np.float64)
    apart_h = (full_h - h).reshape(-1, 16).astype(np.float64)
    np.testing.assert_allclose(found.gram, flat.T @ (counts * flat), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.input_error, flat.T @ (counts * apart), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.residual_error, flat.T @ (counts * apart_h), rtol=1e-3, atol=1e-3)
    without = observe(inputs._replace(residual=None), 4)
    assert without.residual_error is None
    assert np.array_equal(without.input_error, found.input_error)
    assert observe(inputs._replace(reference=None), 4).input_error is None


@pytest.mark.slow
def test_a_model_loses_less():
    """At 2 bits, compensation brings a random model's logits closer to the full-precision ones."""
    model, rng = Decoder(CONFIG, rngs=nnx.Rngs(0)), np.random.default_rng(3)
    text, tokens = rng.integers(0, CONFIG.vocab_size, 2000), rng.integers(0, CONFIG.vocab_size, (64, 32))
    lost = []
    for share in (0.0, 0.5):
        packed, _ = quantize(model, tokens, dataclasses.replace(UNIFORM, asymmetric=share))
        lost.append(perplexity(packed, text, 32, against=model).divergence)
    assert lost[1] < 0.85 * lost[0]


def test_a_head_makes_up_for_what_it_reads():
    """An untied LM head with 8-bit codes equals the least-squares solution."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4096, 64))
    full, w = x + 0.3 * rng.normal(size=x.shape) + 0.2 * x[:, ::-1], rng.normal(size=(64, 96))
    seen = Observation(
        *(jnp.asarray(a, jnp.float32) for a in (x.T @ x, x[:8])),
        len(x),
        input_error=jnp.asarray(x.T @ (full - x)),
    )
    config = dataclasses.replace(UNIFORM, embedding_bits=8, asymmetric=1.0, damping=0.01).resolved()
    packed, _ = quantize_table("head.weight", w.astype(np.float32), seen, config)
    best = w + (1 - 64 / 4096) * (np.linalg.lstsq(x, full @ w, rcond=None)[0] - w)
    assert np.abs(packed.dequantize() - best).max() < 0.1
    assert np.abs(packed.dequantize() - w).max() > 0.5
