"""Helpers for tests of the command line: a tiny model with tokenizer and texts, commands run in process."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_models import Golden, load_golden, write_hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from convert.cli import run
from slim_jax.store import checkpoint

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 64))]
QUANTIZE = ["--bits", "2", "--group-size", "32", "--samples", "4", "--length", "32", "--preset", "fast"]


def tiny_golden() -> Golden:
    """A golden model's architecture with random weights, four times as wide, for several groups per layer."""
    golden = load_golden("llama_gqa_tied")
    rng = np.random.default_rng(0)

    def wider(weight: np.ndarray) -> np.ndarray:
        shape = [4 * n if n != golden.config["vocab_size"] else n for n in weight.shape]
        return np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.1, shape)

    sizes = {key: 4 * golden.config[key] for key in ("hidden_size", "intermediate_size", "head_dim")}
    weights = {name: wider(weight) for name, weight in golden.weights.items()}
    return dataclasses.replace(golden, config={**golden.config, **sizes}, weights=weights)


def write_model(directory: Path, *, shards: int = 1) -> Path:
    """Writes the tiny model with a tokenizer of 64 words."""
    write_hf(tiny_golden(), directory, shards=shards)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(str(directory))
    return directory


def write_text(path: Path, words: int, seed: int) -> Path:
    """Writes a text of random words."""
    ids = np.random.default_rng(seed).integers(3, 64, words)
    path.write_text(" ".join(WORDS[i] for i in ids))
    return path


def make_room(room: Path) -> Path:
    """Fills a directory with a model, texts, and a quantized checkpoint ``q2`` of the model."""
    write_model(room / "hf")
    write_text(room / "calib.txt", 300, 1)
    write_text(room / "test.txt", 200, 2)
    write_text(room / "short.txt", 20, 3)
    arguments = ["quantize", str(room / "hf"), str(room / "q2"), "--calibration", str(room / "calib.txt")]
    assert run([*arguments, *QUANTIZE, "--save-allocation", str(room / "bits.json")]) == 0
    return room


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that succeeds; returns its standard output."""
    capsys.readouterr()
    assert run([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command with a user's mistake; returns the one line that it prints."""
    capsys.readouterr()
    status = run([str(a) for a in arguments])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert status == 2, captured.err
    assert captured.out == ""
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("slim-jax: error: ")
    return lines[0]


def names(folder: Path) -> list[str]:
    """Names of the entries of a folder."""
    return sorted(path.name for path in folder.iterdir())


def same_weights(a: Path, b: Path) -> bool:
    """True if two checkpoints hold the same arrays, bit for bit."""
    leaves = [jax.tree.leaves(checkpoint.load(path)) for path in (a, b)]
    assert len(leaves[0]) == len(leaves[1])
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*leaves))
