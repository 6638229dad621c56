"""The command line, end to end on a tiny random model, and what it says to each mistake of its user."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_models import Golden, load_golden, write_hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from convert.cli import run
from convert.display import layer_kinds
from convert.load import load_source
from convert.tokenizer import load_tokenizer
from slim_jax.run import checkpoint, pipeline

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 64))]
QUANTIZE = ["--bits", "2", "--group-size", "32", "--samples", "4", "--length", "32", "--preset", "fast"]


def tiny_golden() -> Golden:
    """A golden's architecture, four times as wide, so that layers have several groups."""
    golden = load_golden("llama_gqa_tied")
    rng = np.random.default_rng(0)

    def wider(weight: np.ndarray) -> np.ndarray:
        shape = [4 * n if n != golden.config["vocab_size"] else n for n in weight.shape]
        return np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.1, shape)

    sizes = {key: 4 * golden.config[key] for key in ("hidden_size", "intermediate_size", "head_dim")}
    weights = {name: wider(weight) for name, weight in golden.weights.items()}
    return dataclasses.replace(golden, config={**golden.config, **sizes}, weights=weights)


def write_model(directory: Path, *, shards: int = 1) -> Path:
    """The tiny model with a tokenizer of 64 words."""
    write_hf(tiny_golden(), directory, shards=shards)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(str(directory))
    return directory


def write_text(path: Path, words: int, seed: int) -> Path:
    """Random words."""
    ids = np.random.default_rng(seed).integers(3, 64, words)
    path.write_text(" ".join(WORDS[i] for i in ids))
    return path


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, texts, and a quantized checkpoint ``q2`` of it."""
    room = tmp_path_factory.mktemp("room")
    write_model(room / "hf")
    write_text(room / "calib.txt", 300, 1)
    write_text(room / "test.txt", 200, 2)
    write_text(room / "short.txt", 20, 3)
    arguments = ["quantize", str(room / "hf"), str(room / "q2"), "--calibration", str(room / "calib.txt")]
    assert run([*arguments, *QUANTIZE, "--save-allocation", str(room / "bits.json")]) == 0
    return room


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Standard output of a command that succeeds."""
    capsys.readouterr()
    assert run([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command says to its user's mistake."""
    capsys.readouterr()
    status = run([str(a) for a in arguments])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert status == 2, captured.err
    assert captured.out == ""
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("slim-jax: error: ")
    return lines[0]


def same_weights(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same, bit for bit."""
    leaves = [jax.tree.leaves(checkpoint.load(path)) for path in (a, b)]
    assert len(leaves[0]) == len(leaves[1])
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*leaves))


def test_help_has_examples(capsys):
    assert "slim-jax quantize smollm2" in said(capsys, "--help")
    for command in ("convert", "quantize", "eval", "generate", "chat", "inspect", "plan", "export"):
        assert f"slim-jax {command}" in said(capsys, command, "--help")
    assert "SliM-LLM+" in said(capsys, "quantize", "--help")
    assert said(capsys) == said(capsys, "--help")
    assert said(capsys, "--version").startswith("slim-jax ")


def test_inspect(room, capsys, tmp_path):
    found = json.loads(said(capsys, "inspect", room / "q2", "--json", "--html", tmp_path / "q2.html"))
    assert len(found["layers"]) == 14
    assert found["packed_bytes"] > 0
    assert found["parameters"] == sum(weight.size for weight in tiny_golden().weights.values())
    row = found["layers"][0]
    assert {"name", "shape", "group_size", "bits", "bits_per_weight", "error"} <= row.keys()
    assert row["bits_per_weight"] > 2
    page = (tmp_path / "q2.html").read_text()
    assert all(layer["name"] in page for layer in found["layers"])
    assert "<h2>Bits</h2>" in page
    assert page == (room / "q2/report.html").read_text()  # quantize has written it, too
    table = said(capsys, "inspect", room / "q2")
    assert "mlp.down" in table
    assert "embed" in table
    assert "bits per weight" in table
    assert "times smaller than in bfloat16" in " ".join(table.split())


def test_layer_kinds():
    kinds = layer_kinds([{"name": f"blocks.{i}.attn.q"} for i in range(3)])
    assert [(kind, len(layers)) for kind, layers in kinds.items()] == [("attn.q", 3)]


def test_eval(room, capsys, tmp_path):
    dense = json.loads(
        said(capsys, "eval", room / "hf", "--text", room / "test.txt", "--window", "32", "--json")
    )
    assert dense.keys() == {"perplexity", "tokens", "windows"}
    assert (dense["tokens"], dense["windows"]) == (192, 6)
    arguments = ("--text", room / "test.txt", "--window", "32", "--max-windows", "2")
    packed = json.loads(said(capsys, "eval", room / "q2", *arguments, "--json"))
    assert (packed["tokens"], packed["windows"]) == (64, 2)
    said(capsys, "export", room / "q2", tmp_path / "packed", "--format", "safetensors")
    assert f"perplexity {packed['perplexity']:.4f}" in said(capsys, "eval", tmp_path / "packed", *arguments)


def test_eval_against_the_dense_model(room, capsys):
    write_text(room / "other.txt", 100, 4)
    texts = ("--text", room / "test.txt", "--text", room / "other.txt", "--window", "32")
    out = said(capsys, "eval", room / "q2", *texts, "--against", room / "hf", "--json")
    assert out.count("\n") == 1
    found = json.loads(out)["texts"]
    assert list(found) == [str(room / "test.txt"), str(room / "other.txt")]
    assert [text["windows"] for text in found.values()] == [6, 3]
    for path, text in found.items():
        alone = ("--text", path, "--window", "32", "--json")
        dense = json.loads(said(capsys, "eval", room / "hf", *alone))
        assert text["against_perplexity"] == pytest.approx(dense["perplexity"])
        assert text["kl"] > 0
        assert 0 < text["top1_agreement"] < 1
    lines = said(capsys, "eval", room / "q2", *texts, "--against", room / "hf").splitlines()
    assert len(lines) == 2
    assert all("nats a token" in line for line in lines)


def test_generate(room, capsys, tmp_path):
    prompt = "w5 w6 w7"
    one = said(capsys, "generate", room / "q2", "--prompt", prompt, "--max-tokens", "8")
    assert one.startswith(prompt)
    said(capsys, "export", room / "q2", tmp_path / "packed", "--format", "safetensors")
    assert one == said(capsys, "generate", tmp_path / "packed", "--prompt", prompt, "--max-tokens", "8")
    sampled = ("--temperature", "1.0", "--top-p", "0.9", "--seed", "3")
    other = said(capsys, "generate", room / "q2", "--prompt", prompt, "--max-tokens", "8", *sampled)
    assert other.startswith(prompt)
    assert other != one


@pytest.mark.slow
def test_generate_from_a_file(room, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("w5 w6 w7\n\nw9\n")
    options = ("--prompts", tmp_path / "prompts.txt", "--max-tokens", "8", "--json")
    found = json.loads(said(capsys, "generate", room / "q2", *options))["results"]
    assert [row["prompt"] for row in found] == ["w5 w6 w7", "w9"]
    for row in found:
        assert row["ended"] == ("length" if row["tokens"] == 8 else "end")
    two = ("--prompt", "w5 w6 w7", "--prompt", "w9", "--max-tokens", "8")
    lines = said(capsys, "generate", room / "q2", *two).splitlines()
    assert [line for line in lines if line] == [row["prompt"] + row["text"] for row in found]
    last = found[0]["text"].split()[-1]
    stopped = json.loads(said(capsys, "generate", room / "q2", *options, "--stop", last))["results"]
    assert stopped[0]["text"] == found[0]["text"].partition(last)[0]
    assert stopped[0]["ended"] == "stop"
    one = ("--prompt", "w5 w6 w7", "--max-tokens", "8", "--stop", last)
    assert said(capsys, "generate", room / "q2", *one) == "w5 w6 w7" + stopped[0]["text"] + "\n"


def test_chat(room, capsys, tmp_path, monkeypatch):
    shutil.copytree(room / "q2", tmp_path / "q2")
    assert "has no chat template" in refused(capsys, "chat", room / "q2")
    template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
    )
    (tmp_path / "q2/tokenizer/chat_template.jinja").write_text(template)
    greedy = ("--temperature", "0", "--max-tokens", "6")

    def talk(*lines: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        return said(capsys, "chat", tmp_path / "q2", *greedy, "--system", "w4").splitlines()

    def alone(prompt: str) -> str:
        text = said(capsys, "generate", room / "q2", "--prompt", prompt, *greedy)
        return text.removeprefix(prompt).strip()

    first = alone("w4 w5 w6 w3")
    second = alone(f"w4 w5 w6 {first} w7 w3")
    assert [line.strip() for line in talk("w5 w6", "w7", "", "/reset", "w5 w6")] == [first, second, first]
    assert len(talk("w5 w6", "/exit", "w7")) == 1
    assert talk("/help") == []
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5\n" + " ".join(["w6"] * 62)))
    assert run(["chat", str(tmp_path / "q2"), *greedy]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert re.match(r"slim-jax: [1-6] tokens?, ", errors[0])
    assert "64 positions: /reset begins anew" in errors[1]


@pytest.mark.slow
def test_convert_then_quantize_gives_the_same_as_quantize(room, capsys, tmp_path):
    said(capsys, "convert", room / "hf", tmp_path / "dense")
    calibration = ("--calibration", room / "calib.txt")
    out = said(capsys, "quantize", tmp_path / "dense", tmp_path / "q2", *calibration, *QUANTIZE, "--json")
    assert json.loads(out)["bits_per_weight"] > 2
    assert same_weights(tmp_path / "q2", room / "q2")
    evaluated = ("--text", room / "test.txt", "--window", "32", "--json")
    converted = json.loads(said(capsys, "eval", tmp_path / "dense", *evaluated))
    assert converted == json.loads(said(capsys, "eval", room / "hf", *evaluated))


def test_export_is_a_model_again(room, capsys, tmp_path):
    said(capsys, "export", room / "q2", tmp_path / "hf", "--dtype", "float32")
    assert load_source(tmp_path / "hf").tokenizer("w5 w6")["input_ids"] == [5, 6]
    evaluated = ("--text", room / "test.txt", "--window", "32", "--json")
    exported = json.loads(said(capsys, "eval", tmp_path / "hf", *evaluated))["perplexity"]
    packed = json.loads(said(capsys, "eval", room / "q2", *evaluated))["perplexity"]
    assert exported == pytest.approx(packed, rel=1e-4)


def test_a_packed_export_is_a_checkpoint_again(room, capsys, tmp_path):
    packed = tmp_path / "packed"
    options = ("--format", "safetensors", "--perplexity", "test=12.5")
    assert "as it is" in said(capsys, "export", room / "q2", packed, *options)
    assert same_weights(packed, room / "q2")
    assert len(list(packed.iterdir())) == 7
    card = (packed / "README.md").read_text()
    assert "| perplexity on test | 12.5 |" in card
    assert "4 windows of 32 tokens" in card
    layers = [json.loads(said(capsys, "inspect", path, "--json"))["layers"] for path in (packed, room / "q2")]
    assert layers[0] == layers[1]
    assert said(capsys, "plan", packed)
    assert load_tokenizer(packed)("w5 w6")["input_ids"] == [5, 6]


def test_allocation_goes_round(room, capsys, tmp_path):
    bits = json.loads((room / "bits.json").read_text())
    assert bits
    said(
        capsys, "quantize", room / "hf", tmp_path / "q2", "--calibration", room / "calib.txt", *QUANTIZE,
        "--allocation", room / "bits.json", "--save-allocation", tmp_path / "bits.json",
    )  # fmt: skip
    assert json.loads((tmp_path / "bits.json").read_text()) == bits
    layers = [json.loads(said(capsys, "inspect", out / "q2", "--json"))["layers"] for out in (room, tmp_path)]
    assert [row["bits"] for row in layers[0]] == [row["bits"] for row in layers[1]]


@pytest.mark.slow
def test_self_calibration(room, capsys, tmp_path):
    own = ("--calibration", "self", "--set", "method=rtn")
    said(capsys, "quantize", room / "hf", tmp_path / "q", *QUANTIZE, *own)
    assert json.loads(said(capsys, "inspect", tmp_path / "q", "--json"))["layers"]


def test_what_a_command_without_options_asks_for(room, capsys, tmp_path, monkeypatch):
    def interrupt(self, on_sweep=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Sweep, "run", interrupt)
    small = ["--calibration", str(room / "calib.txt"), "--samples", "2"]
    assert run(["quantize", str(room / "hf"), str(tmp_path / "q"), *small]) == 130
    lines = capsys.readouterr().err.splitlines()
    assert any("slim at 2 bits: at least" in line and "MB to store" in line for line in lines)
    settings = json.loads((tmp_path / "q/slim.json").read_text())["quantization"]
    assert (settings["method"], settings["tune"], settings["bits"]) == ("slim", True, 2)
    assert settings["calibration"]["length"] == 64  # all positions that the model has


def interrupt_in_block(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Ctrl-C while the block of this index is quantized."""
    whole = pipeline.BlockQuantizer.quantize

    def quantize(self, at, on_epoch=None):
        if at == index:
            raise KeyboardInterrupt
        return whole(self, at, on_epoch)

    monkeypatch.setattr(pipeline.BlockQuantizer, "quantize", quantize)


def test_interrupt_and_resume(room, capsys, tmp_path, monkeypatch):
    calibration = ["--calibration", str(room / "calib.txt")]
    arguments = ["quantize", str(room / "hf"), str(tmp_path / "q2"), *calibration, *QUANTIZE]
    with monkeypatch.context() as patch:
        interrupt_in_block(patch, 1)
        assert run(arguments) == 130
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert "--resume" in refused(capsys, *arguments)
    before = sorted(tmp_path.rglob("*"))
    refused(capsys, *arguments, "--bits", "3", "--resume")
    assert sorted(tmp_path.rglob("*")) == before
    said(capsys, *arguments, "--resume")
    assert same_weights(tmp_path / "q2", room / "q2")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--bits", "9"], "bits is 9"),
        (["--bits", "two"], "--bits"),
        (["--group-size", "48"], "group_size is 48"),
        (["--preset", "slow"], "preset is 'slow', expected one of fast, good, best"),
        (["--set", "method=slow"], "method is 'slow'"),
        (["--set", "sqc=best"], "sqc is 'best'"),
        (["--set", "criterion=luck"], "criterion is 'luck'"),
        (["--set", "damping=-1"], "damping is -1"),
        (["--set", "damp=1"], "no setting 'damp', expected one such as damping"),
        (["--set", "damping"], "expected name=value"),
        (["--set", "damping=high"], "damping is 'high', expected a number"),
        (["--set", "epochs=1.5"], "epochs is '1.5', expected a whole number"),
        (["--set", "guide=1"], "guide is '1', expected true or false"),
        (["--set", "bits=3"], "bits is given twice"),
        (["--rule", "*.mlp.down"], "expected PATTERN: OPTIONS"),
        (["--rule", "*.mlp.down: bit=3"], "no option 'bit', expected one such as bits"),
        (["--rule", "*.mlp.down: bits=many"], "bits is 'many', expected a number"),
        (["--rule", "*.mlp.down: bits=3, bits=4"], "bits is given twice"),
        (["--rule", "*.mlp.down: leave"], "'leave' is not name=value"),
        (["--rule", "*.mlp.down: bits=9"], "rule '*.mlp.down': bits is 9"),
        (["--rule", "*.mlp.dwn: skip"], "matches none of the 14 layers, near names: blocks.*.mlp.down"),
        (["--rule", "blocks.*: bits=3", "--rule", "*.attn.q: skip"], "rules before it match blocks.0.attn.q"),
        (["--rules", "{room}/none.toml"], "none.toml"),
        (["--rules", "{room}/calib.txt"], "calib.txt is not TOML"),
        (["--target-size", "1MB"], "--bits 2 and --target-size 1MB say two things"),
        (["--samples", "0"], "--samples"),
        (["--length", "128"], "64 positions"),
        (["--seed", "-1"], "--seed"),
        (["--calibration", "{room}/none.txt"], "none.txt"),
        (["--calibration", "{room}/short.txt"], "has 20 tokens, expected at least 32"),
        (["--calibration", "{room}/hf/model.safetensors"], "not UTF-8"),
        (["--allocation", "{room}/none.json"], "none.json"),
        (["--allocation", "{room}/calib.txt"], "calib.txt"),
        (["--save-allocation", "{room}/none/bits.json"], "is not a directory"),
        (["--devices", "99"], "--devices is 99, this machine has"),
        (["--devices", "3"], "4 samples, expected a multiple of the 3 devices"),
        (["--colour"], "--colour"),
    ],
)
def test_quantize_refuses(room, capsys, tmp_path, options, expected):
    given = [option.format(room=room) for option in options]
    calibration = ["--calibration", room / "calib.txt"]
    line = refused(capsys, "quantize", room / "hf", tmp_path / "out", *calibration, *QUANTIZE, *given)
    assert expected in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["convert", "quantize", "export"])
def test_an_output_that_holds_something_else_is_left_alone(room, capsys, tmp_path, command):
    (tmp_path / "mine.txt").write_text("mine")
    options = ["--calibration", room / "calib.txt", *QUANTIZE] if command == "quantize" else []
    assert "not an empty directory" in refused(capsys, command, room / "hf", tmp_path, *options)
    if command == "quantize":
        refused(capsys, command, room / "hf", tmp_path, *options, "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def without_a_shard(model: Path) -> str:
    (model / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors is missing"


def with_half_a_shard(model: Path) -> str:
    shard = model / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    return "truncated"


def with_a_tensor_that_no_file_holds(model: Path) -> str:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    return "model.ghost.weight"


def of_an_unknown_architecture(model: Path) -> str:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["MambaForCausalLM"]}))
    return "MambaForCausalLM"


@pytest.mark.parametrize(
    "broken",
    [without_a_shard, with_half_a_shard, with_a_tensor_that_no_file_holds, of_an_unknown_architecture],
)
def test_broken_models_are_refused(room, capsys, tmp_path, broken):
    model = write_model(tmp_path / "hf", shards=2)
    expected = broken(model)
    assert expected in refused(capsys, "convert", model, tmp_path / "out")
    calibration = ("--calibration", room / "calib.txt")
    assert expected in refused(capsys, "quantize", model, tmp_path / "out", *calibration, *QUANTIZE)
    assert expected in refused(capsys, "eval", model, "--text", room / "test.txt", "--window", "32")
    assert expected in refused(capsys, "export", model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_gguf_without_its_magic_is_refused(capsys, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(64))
    assert "is no GGUF file" in refused(capsys, "convert", tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_a_flipped_byte(path: Path) -> str:
    files = [file for part in ("blocks", "outer") for file in (path / part).rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return ""


def of_a_newer_format(path: Path) -> str:
    manifest = json.loads((path / "slim.json").read_text())
    manifest["version"] += 1
    (path / "slim.json").write_text(json.dumps(manifest))
    return "format version"


def with_half_a_manifest(path: Path) -> str:
    content = (path / "slim.json").read_text()
    (path / "slim.json").write_text(content[: len(content) // 2])
    return "slim.json"


@pytest.mark.parametrize("damaged", [with_a_flipped_byte, of_a_newer_format, with_half_a_manifest])
def test_damaged_checkpoints_are_refused(room, capsys, tmp_path, damaged):
    shutil.copytree(room / "q2", tmp_path / "q2")
    expected = damaged(tmp_path / "q2")
    arguments = ("--text", room / "test.txt", "--window", "32")
    assert expected in refused(capsys, "eval", tmp_path / "q2", *arguments)
    assert expected in refused(capsys, "export", tmp_path / "q2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "{room}/q2"], "--text"),
        (["eval", "{room}/q2", "--text", "{room}/none.txt"], "none.txt"),
        (["eval", "{room}/q2", "--text", "{room}/short.txt", "--window", "32"], "has 20 tokens"),
        (["eval", "{room}/q2", "--text", "{room}/test.txt", "--window", "1"], "--window"),
        (["eval", "{room}/q2", "--text", "{room}/test.txt", "--max-windows", "0"], "--max-windows"),
        (["eval", "{room}/q2", "--text", "{room}/test.txt", "--window", "128"], "64 positions"),
        (["eval", "{room}/none", "--text", "{room}/test.txt"], "none"),
        (["eval", "{room}/q2", "--text", "{room}/test.txt", "--against", "{room}/none"], "none"),
        (["generate", "{room}/q2"], "--prompt"),
        (["generate", "{room}/q2", "--prompt", ""], "--prompt"),
        (["generate", "{room}/q2", "--prompt", "w5", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "{room}/q2", "--prompt", "w5", "--max-tokens", "64"], "64 positions"),
        (["generate", "{room}/q2", "--prompt", "w5", "--temperature", "-1"], "--temperature"),
        (["generate", "{room}/q2", "--prompt", "w5", "--top-p", "0"], "--top-p"),
        (["generate", "{room}/q2", "--prompt", "w5", "--top-k", "-1"], "--top-k"),
        (["generate", "{room}/q2", "--prompt", "w5", "--min-p", "1"], "min_p is 1.0"),
        (["generate", "{room}/q2", "--prompt", "w5", "--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["generate", "{room}/q2", "--prompt", "w5", "--stop", ""], "--stop is empty"),
        (["generate", "{room}/q2", "--prompts", "{room}/none.txt"], "none.txt"),
        (["inspect", "{room}/none"], "none"),
        (["inspect", "{room}/hf"], "hf"),
        (["inspect", "{room}/q2", "--html", "{room}/none/page.html"], "is not a directory"),
        (["export", "{room}/q2", "{room}/x", "--format", "gguf"], "--format is 'gguf'"),
        (["export", "{room}/q2", "{room}/x", "--dtype", "int8"], "int8"),
        (["export", "{room}/q2", "{room}/x", "--format", "gptq"], "bits, expected one width for gptq"),
        (["export", "{room}/q2", "{room}/x", "--format", "gptq", "--dtype", "float32"], "float32"),
        (["export", "{room}/hf", "{room}/x", "--format", "gptq"], "no packed layers"),
        (["export", "{room}/q2", "{room}/x", "--format", "safetensors", "--dtype", "float16"], "--dtype"),
        (["export", "{room}/q2", "{room}/x", "--perplexity", "text=3"], "--perplexity is for the model card"),
        (
            ["export", "{room}/q2", "{room}/x", "--format", "safetensors", "--perplexity", "text"],
            "--perplexity is 'text', expected one such as",
        ),
        (["convert", "{room}/hf", "{room}/x", "--dtype", "float8"], "float8"),
        (["convert"], "SOURCE"),
        (["transmogrify"], "transmogrify"),
    ],
)
def test_other_mistakes_are_refused(room, capsys, arguments, expected):
    assert expected in refused(capsys, *[argument.format(room=room) for argument in arguments])
    assert not (room / "x").exists()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        run(["--debug", "convert", str(tmp_path / "none"), str(tmp_path / "out")])


@pytest.mark.slow
def test_the_program_says_nothing_else(room):
    """Other libraries' logs and warnings stay away from both streams."""
    program = [
        sys.executable,
        "-m",
        "convert.cli",
        "eval",
        str(room / "q2"),
        "--text",
        str(room / "test.txt"),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "SLIM_JAX_DEBUG"}
    done = subprocess.run(
        [*program, "--text", str(room / "test.txt"), "--window", "32", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert json.loads(done.stdout)["windows"] == 6
    assert all(line.startswith("evaluating") for line in done.stderr.splitlines())
