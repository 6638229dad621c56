"""Estimated duration of a quantization: counted operations against counts by hand, and the messages."""

import dataclasses
import json

import pytest
from command_line import said
from golden_models import load_golden, write_hf
from test_pipeline import CONFIG

from slim_jax import duration
from slim_jax.config import SlimConfig

PLAIN = SlimConfig(bits=2, group_size=32, criterion="kl", asymmetric=0.0, embedding_bits=16, tune=False)


def test_operations_by_hand():
    d, inner, layers, length = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_layers, 16
    heads, kv = CONFIG.num_heads * CONFIG.head_dim, CONFIG.num_kv_heads * CONFIG.head_dim
    weights = d * heads + 2 * d * kv + heads * d + 3 * d * inner
    forward = 2 * (weights + 2 * length * heads)
    grams = 1.5 * (2 * d**2 + heads**2 + inner**2)
    solving = duration.SOLVED * layers * weights
    count = duration.operations(CONFIG, PLAIN, 4, length)
    assert count == pytest.approx(4 * length * layers * (forward + grams) + solving)
    drifts = 2 * (2 * d**2 + heads**2 + inner**2) + 2 * (heads * d + inner * d)
    makes_up = dataclasses.replace(PLAIN, asymmetric=0.5)
    assert duration.operations(CONFIG, makes_up, 4, length) == pytest.approx(
        4 * length * layers * (2 * forward + grams + drifts) + solving
    )


@pytest.mark.parametrize(
    "more",
    [
        {"tune": True, "tune_samples": 0},
        {"criterion": "model", "bits": 2.5},
        {"method": "slim-plus"},
    ],
)
def test_whatever_is_done_beside_takes_longer(more):
    plain, longer = (
        duration.operations(CONFIG, SlimConfig(**fields), 4096, 16) for fields in (FIELDS, FIELDS | more)
    )
    assert longer > 1.05 * plain


FIELDS = {"bits": 2, "group_size": 32, "criterion": "kl", "asymmetric": 0.0, "tune": False}


def test_writing_takes_longer_with_more_words():
    few, many = (dataclasses.replace(CONFIG, vocab_size=size) for size in (64, 640))
    one, two = (
        duration.operations(c, PLAIN, 4, 16, 2) - duration.operations(c, PLAIN, 4, 16) for c in (few, many)
    )
    assert two > 5 * one > 0


def test_a_token_passes_few_experts():
    few, all_ = (dataclasses.replace(CONFIG, num_experts=8, experts_per_token=chosen) for chosen in (2, 8))
    rtn = SlimConfig(bits=2, group_size=32, method="rtn")
    assert duration.operations(few, rtn, 4, 16) < 0.6 * duration.operations(all_, rtn, 4, 16)


@pytest.mark.parametrize(
    ("seconds", "words"), [(1, "a minute"), (185, "3 minutes"), (5300, "88 minutes"), (9000, "2.5 hours")]
)
def test_in_words(seconds, words):
    assert duration.in_words(seconds) == words


def test_plan_says_how_long(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(duration, "rate", lambda config: 1e6)
    folder = write_hf(load_golden("llama_gqa_tied"), tmp_path / "model")
    asked = ("plan", folder, "--group-size", 32, "--samples", 4, "--length", 16)
    found = json.loads(said(capsys, *asked, "--json"))
    assert f"about {duration.in_words(found['seconds_here'])} here" in said(capsys, *asked)
