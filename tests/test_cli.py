"""The command line, end to end on a tiny random model."""

import io
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from command_line import QUANTIZE, make_room, refused, said, same_weights, tiny_golden, write_text

from convert.cli import program, run
from convert.display import layer_kinds, print_json
from convert.readers.load import load_source
from convert.readers.source import ModelSource
from convert.tokenizer import load_tokenizer
from slim_jax import memory
from slim_jax.calibrate import quantizer
from slim_jax.eval.perplexity import Perplexity


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_room(tmp_path_factory.mktemp("room"))


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
    assert page == (room / "q2/report.html").read_text()  # quantize has written it too
    table = said(capsys, "inspect", room / "q2")
    assert "mlp.down" in table
    assert "embed" in table
    assert "bits per weight" in table
    assert "times smaller than in bfloat16" in " ".join(table.split())


def test_brackets_in_a_path_are_no_markup(room, capsys, tmp_path):
    shutil.copytree(room / "q2", tmp_path / "[red]q:x:2[/]")
    assert "[red]q:x:2[/]" in said(capsys, "inspect", tmp_path / "[red]q:x:2[/]").replace("\n", "")
    shutil.copytree(room / "hf", tmp_path / "[/b]")
    assert "[/b]" in said(capsys, "plan", tmp_path / "[/b]").replace("\n", "")


def test_numbers_that_json_has_not(room, capsys, monkeypatch):
    def broken(*_: object, **how: object) -> Perplexity:
        return Perplexity(math.nan, 64, 2, math.inf, 0.5, 1.0)

    monkeypatch.setattr("slim_jax.eval.perplexity.perplexity", broken)
    out = said(capsys, "eval", room / "q2", "--text", room / "test.txt", "--window", "32", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (found["perplexity"], found["against_perplexity"], found["kl"]) == (None, None, 0.5)
    print_json({"layers": [{"error": math.nan}, (1.0, -math.inf)]})
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"layers": [{"error": None}, [1.0, None]]}
    assert "layers.0.error is nan, which JSON cannot hold: null is printed" in printed.err
    for file in Path(program.__file__).parent.glob("*.py"):
        assert "json.dumps" not in file.read_text()


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
    assert all("nats per token" in line for line in lines)


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


def test_a_checkpoint_without_tokenizer(room, capsys, tmp_path):
    shutil.copytree(room / "q2", tmp_path / "q2")
    shutil.rmtree(tmp_path / "q2" / "tokenizer")
    said = refused(capsys, "generate", tmp_path / "q2", "--prompt", "w5")
    assert "source.tokenizer.save_pretrained(" in said


@pytest.mark.slow
def test_generate_by_two_cores(room, capsys):
    how = ("generate", room / "q2", "--prompt", "w5 w6 w7", "--max-tokens", "8")
    assert said(capsys, *how, "--devices", "2") == said(capsys, *how)


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
    assert "64 positions: try /reset" in errors[1]


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
    assert "as stored" in said(capsys, "export", room / "q2", packed, *options)
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


def own_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Replaces the model's calibration text; returns what was printed before each time that it is written."""
    said_before = []

    def write(source: object, samples: int, length: int, seed: int) -> np.ndarray:
        said_before.append(capsys.readouterr().err)
        return np.full((samples, length), 5 + seed, np.int32)

    monkeypatch.setattr("convert.cli.quantize._own_text", write)
    return said_before


def test_a_resumed_run_draws_nothing_and_a_finished_one_reads_nothing(room, capsys, tmp_path, monkeypatch):
    written = own_text(monkeypatch, capsys)
    calibration = ["--calibration", str(room / "calib.txt"), "--calibration", "self"]
    arguments = ["quantize", str(room / "hf"), str(tmp_path / "q"), *calibration, *QUANTIZE]
    with monkeypatch.context() as patch:
        interrupt_in_block(patch, 1)
        assert run(arguments) == 130
    assert "GiB of memory" in written[0]  # the forecast comes first
    found = json.loads(said(capsys, *arguments, "--resume", "--json"))
    assert found["peak_bytes"] > 0 < found["forecast_bytes"]
    monkeypatch.setattr(ModelSource, "_read", None)
    said(capsys, *arguments, "--resume")
    assert len(written) == 1
    assert "calibration was" in refused(capsys, *arguments, "--resume", "--seed", "1")


@pytest.mark.parametrize("given", [["self"], ["self", "{room}/calib.txt"]])
def test_a_model_too_large_to_write_leaves_it_to_other_texts(room, capsys, tmp_path, monkeypatch, given):
    written = own_text(monkeypatch, capsys)
    monkeypatch.setattr(memory, "available", lambda: 1)
    interrupt_in_block(monkeypatch, 0)
    calibration = [word for item in given for word in ("--calibration", item.format(room=room))]
    assert run(["quantize", str(room / "hf"), str(tmp_path / "q"), *calibration, *QUANTIZE]) == 130
    alone = len(given) == 1
    assert len(written) == alone
    assert ("calibrating on the other texts" in capsys.readouterr().err) != alone


@pytest.mark.slow
def test_self_calibration(room, capsys, tmp_path):
    own = ("--calibration", "self", "--set", "method=rtn")
    said(capsys, "quantize", room / "hf", tmp_path / "q", *QUANTIZE, *own)
    assert json.loads(said(capsys, "inspect", tmp_path / "q", "--json"))["layers"]


def test_what_a_command_without_options_asks_for(room, capsys, tmp_path, monkeypatch):
    interrupt_in_block(monkeypatch, 0)
    small = ["--calibration", str(room / "calib.txt"), "--samples", "2"]
    assert run(["quantize", str(room / "hf"), str(tmp_path / "q"), *small]) == 130
    lines = capsys.readouterr().err.splitlines()
    announced = next(line for line in lines if "slim at 2 bits: about" in line)
    assert "GiB of memory and a minute; about" in announced
    assert "MB to store" in announced
    settings = json.loads((tmp_path / "q/slim.json").read_text())["quantization"]
    assert (settings["method"], settings["tune"], settings["bits"]) == ("slim", True, 2)
    assert settings["calibration"]["length"] == 64  # all positions that the model has


def interrupt_in_block(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Raises Ctrl-C while the block of this index is quantized."""
    whole = quantizer.BlockQuantizer.quantize

    def quantize(self, at, on_event):
        if at == index:
            raise KeyboardInterrupt
        return whole(self, at, on_event)

    monkeypatch.setattr(quantizer.BlockQuantizer, "quantize", quantize)


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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_goes_back_unless_the_user_has_said_how(monkeypatch):
    calls: list[tuple[int, int]] = []
    library = types.SimpleNamespace(mallopt=lambda *options: calls.append(options))
    monkeypatch.setattr(program.ctypes, "CDLL", lambda name: library)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    program._return_memory()
    assert not calls
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    program._return_memory()
    assert calls == [(program.M_MMAP_THRESHOLD, 1 << 20)]
