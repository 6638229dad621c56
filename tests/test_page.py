"""The report page: its contents, that it needs no other file, and that a browser renders it."""

import contextlib
import copy
import dataclasses
import functools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from golden_models import load_golden, write_hf
from test_packed import packed_source

from convert import load_source
from convert.report import byte_parts, report_page, write_report
from convert.writers.card import model_card
from convert.writers.packed import export_packed
from slim_jax.report import BlockReport, LayerReport, LearningReport
from slim_jax.store.manifest import CheckpointError, Manifest, read_manifest, summary

CHROMIUM = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell"))
    ),
    None,
)


def with_reports(room: Path) -> Manifest:
    """Manifest of a packed model with groups of 1, 2 and 4 bits, and with reports of a run that learned."""
    export_packed(packed_source("llama_untied", room / "hf", (2,)), room / "packed")
    manifest = read_manifest(room / "packed")
    blocks = []
    for index, block in enumerate(manifest.blocks):
        names = [f"blocks.{index}.{name.removesuffix('.weight')}" for name in block.packed]
        layers = [LayerReport(name, (32, 32), 32, {"2": 1}, 2.5, 0.25 * (index + 1)) for name in names]
        learning = LearningReport([4.0 + index, 1.0, 2.0], 1)
        bits = {name: [1, 2, 2, 4] for name in names}
        report = BlockReport(index, len(manifest.blocks), layers, 1.0, bits, learning)
        blocks.append(dataclasses.replace(block, report=report))
    return dataclasses.replace(manifest, blocks=tuple(blocks))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return with_reports(tmp_path_factory.mktemp("page"))


class Strict(HTMLParser):
    """Collects a page's tags and links, and refuses tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(manifest: Manifest) -> None:
    page, parser = report_page("a model", manifest), Strict()
    parser.feed(page)
    assert parser.open == []
    assert parser.links == []
    assert not parser.tags & {"script", "link", "img", "iframe"}
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page
    for drawing in re.findall("<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_the_heat_map_has_the_bits_of_every_group(manifest: Manifest) -> None:
    page = report_page("a model", manifest)
    figure = r"<figcaption>(.*?)</figcaption>\s*<svg.*?viewBox=\"(.*?)\".*?>(.*?)</svg>"
    panels = re.findall(figure, page, re.DOTALL)
    assert len(panels) == 7
    caption, box, drawing = panels[0]
    blocks = len(manifest.blocks)
    assert caption.endswith(f": {blocks} × 4")
    assert box == f"0 0 4 {blocks}"
    runs = [re.findall(r"M(\d+) (\d+)h(\d+)", path) for path in re.findall('d="(.*?)"', drawing)]
    assert len(runs) == 3  # a path for each width: 1, 2 and 4 bits
    assert runs[1] == [("1", str(y), "2") for y in range(blocks)]
    assert sum(int(run[2]) for path in runs for run in path) == 4 * blocks


def test_bytes_add_up(manifest: Manifest) -> None:
    parts = byte_parts(manifest)
    found = summary(manifest)
    assert sum(parts.values()) == found["bytes"]
    assert parts["codes"] + parts["scales"] + parts["zero points"] + parts["order"] == found["packed_bytes"]
    assert parts["embedding and head"] > 0


def test_errors_and_losses(manifest: Manifest) -> None:
    page = report_page("a model", manifest)
    assert "block 0: 0.25" in page
    assert "block 1: 5 to 1" in page
    bare = [
        dataclasses.replace(block, report=None) for block in manifest.blocks
    ]  # as `slim_jax.save` leaves it
    plain = dataclasses.replace(manifest, blocks=tuple(bare))
    assert "Error of each block" not in report_page("a model", plain)
    assert "Where the bytes went" in report_page("a model", plain)


HOSTILE = "</td><script>alert('1')</script>|\n[x](javascript:y)"


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all strings and numbers of a JSON document."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path


def test_a_strangers_words_are_words(manifest: Manifest, tmp_path: Path) -> None:
    """Tries every value and name; where a number is expected, reading the manifest refuses the text."""
    fields = json.loads(json.dumps(manifest.to_json()))
    calibration = {"samples": 1, "length": 2, "sha256": "0123456789abcdef"}
    rules = [["*", {"bits": 3}]]
    fields["quantization"] = {"method": "m", "bits": 2, "group_size": 32, "rules": rules}
    fields["quantization"] |= {"sqc": "paper", "calibration": calibration}
    fields["origin"] = {"kind": "hf", "path": "owner/name", "name": "owner/name"}
    layer = json.dumps(HOSTILE)[1:-1]
    documents = [json.loads(json.dumps(fields).replace("attn.q", f"attn.{layer}"))]
    alike = {
        tuple("*" if type(key) is int or "." in key else key for key in path): path for path in leaves(fields)
    }
    for path in alike.values():
        document = copy.deepcopy(fields)
        *way, last = path
        functools.reduce(lambda inner, key: inner[key], way, document)[last] = HOSTILE
        documents.append(document)
    read, pages, cards = 0, [], []
    for document in documents:
        (tmp_path / "slim.json").write_text(json.dumps(document))
        with contextlib.suppress(CheckpointError):
            found = read_manifest(tmp_path)
            read += 1
            pages.append(report_page(HOSTILE, found))
            cards.append(model_card(HOSTILE, found, 1, [(HOSTILE, 2.0)]))
    assert len(cards) == read > 8
    assert not any("<script" in text for text in (*pages, *cards))
    assert not any(re.search(r"(?<!\\)\[x\]\(javascript", card) for card in cards)
    assert not any("alert" in card.split("---")[1] for card in cards)


def test_of_a_dense_model(tmp_path: Path) -> None:
    export_packed(load_source(write_hf(load_golden("llama_untied"), tmp_path / "hf")), tmp_path / "dense")
    write_report(tmp_path / "dense", tmp_path / "report.html")
    assert "not packed" in (tmp_path / "report.html").read_text()


def photograph(page: Path, picture: Path, *options: str) -> bytes:
    """Takes a screenshot; the browser's console must be empty."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={picture.parent / 'profile'}", "--window-size=1200,1600", *options,
            f"--screenshot={picture}", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    return picture.read_bytes()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_takes_it_by_day_and_by_night(manifest: Manifest, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(report_page("a model", manifest), encoding="utf-8")
    day = photograph(page, tmp_path / "day.png")
    night = photograph(page, tmp_path / "night.png", "--blink-settings=preferredColorScheme=0")
    for picture in (day, night):
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(picture) > 20_000  # an empty page has a tenth of that
    assert day != night
