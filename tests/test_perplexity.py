"""Perplexity compared with float64, in parts of any size, and the products that it computes."""

import dataclasses
import importlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder

# `slim_jax.eval.perplexity` is the function of that name.
module = importlib.import_module("slim_jax.eval.perplexity")
CONFIG = DecoderConfig("llama", 61, 32, 48, 1, 2, 1, 16, 64)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("part", [7, 31, 256])
def test_parts_of_a_window_change_nothing(part, model, monkeypatch):
    monkeypatch.setattr(module, "LOGIT_TOKENS", part)
    module._loss.clear_cache()
    rows = np.random.default_rng(0).integers(0, 61, (3, 32))
    logits = np.asarray(model(jnp.asarray(rows)), np.float64)[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.exp(-np.take_along_axis(log_p, rows[:, 1:, None], -1).mean())
    assert module.perplexity(model, rows.reshape(-1), 32).perplexity == pytest.approx(expected, rel=1e-5)
    module._loss.clear_cache()


def log_softmax(model: Decoder, rows: np.ndarray) -> np.ndarray:
    logits = np.asarray(model(jnp.asarray(rows)), np.float64)[:, :-1]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("batch", [1, 2, 3, None])
def test_windows_may_be_read_together(batch, model):
    rows = np.random.default_rng(1).integers(0, 61, (5, 16))
    seen: list[tuple[int, int, float]] = []
    found = module.perplexity(
        model, rows.reshape(-1), 16, on_window=lambda *figures: seen.append(figures), batch=batch
    )
    losses = -np.take_along_axis(log_softmax(model, rows), rows[:, 1:, None], -1)[..., 0].mean(axis=1)
    assert [(done, of) for done, of, _ in seen] == [(i, 5) for i in range(1, 6)]
    so_far = [np.exp(losses[:i].mean()) for i in range(1, 6)]
    assert [figure for *_, figure in seen] == pytest.approx(so_far, rel=1e-5)
    assert found.perplexity == seen[-1][2]
    assert (found.against, found.divergence, found.agreement) == (None, None, None)


def test_against_another_model(model):
    other = Decoder(dataclasses.replace(CONFIG, hidden_size=16, num_layers=2), rngs=nnx.Rngs(1))
    rows = np.random.default_rng(2).integers(0, 61, (3, 24))
    found = module.perplexity(model, rows.reshape(-1), 24, against=other, batch=2)
    log_q, log_p = log_softmax(model, rows), log_softmax(other, rows)
    assert found.divergence == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-4)
    assert found.agreement == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).mean())
    assert found.against == pytest.approx(module.perplexity(other, rows.reshape(-1), 24).perplexity)
    assert found.perplexity == pytest.approx(module.perplexity(model, rows.reshape(-1), 24).perplexity)
    itself = module.perplexity(model, rows.reshape(-1), 24, against=model)
    assert (itself.divergence, itself.agreement) == (pytest.approx(0, abs=1e-6), 1.0)


def test_other_vocabularies_are_refused(model):
    other = Decoder(dataclasses.replace(CONFIG, vocab_size=50), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="has 50 tokens, expected 61"):
        module.perplexity(model, np.zeros(32, int), 16, against=other)


def test_logits_of_many_tokens_are_one_product(model, monkeypatch):
    """Token by token, a bfloat16 LM head would be multiplied as single rows."""
    rows: list[tuple[int, ...]] = []
    logits = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, h: rows.append(h.shape) or logits(self, h))
    monkeypatch.setattr(module, "LOGIT_TOKENS", 10)
    module._loss.clear_cache()
    module.perplexity(model, np.zeros(26, int), 26)
    assert {shape[0] for shape in rows} == {10, 5}
    module._loss.clear_cache()
