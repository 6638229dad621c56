"""Perplexity against float64, in parts of any size, and the products that it takes."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slim_jax.model.decoder import Decoder, DecoderConfig

# `slim_jax.model.perplexity` is the function of that name.
module = importlib.import_module("slim_jax.model.perplexity")
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


def test_logits_of_many_tokens_are_one_product(model, monkeypatch):
    """Token by token, a head in bfloat16 would be multiplied as rows of their own."""
    rows: list[tuple[int, ...]] = []
    logits = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, h: rows.append(h.shape) or logits(self, h))
    monkeypatch.setattr(module, "LOGIT_TOKENS", 10)
    module._loss.clear_cache()
    module.perplexity(model, np.zeros(26, int), 26)
    assert {shape[0] for shape in rows} == {10, 5}
    module._loss.clear_cache()
