"""Damaged files give a model or a one-line error of ours; never another exception, never much memory."""

import copy
import json
import math
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from golden_models import load_golden, write_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gguf import with_pair, write_gguf
from test_packed import packed_source
from test_tokenizer import byte_level, pieces

from convert import ConvertError, load_source
from convert.readers.gguf import GGUFStore
from convert.readers.hf import read_config
from convert.report import report_page
from convert.tokenizer import gguf_tokenizer
from convert.writers.card import model_card
from convert.writers.packed import export_packed
from slim_jax.store.checkpoint import CheckpointError, CheckpointSource, save_source
from slim_jax.store.manifest import read_manifest, summary

MORE_MEMORY = 1 << 29
"""Bytes: far more than any of these files needs, far less than a damaged header may claim."""

NUMBERS = (0, 1, 2, 3, 7, 9, 31, 2**8, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**60, -(2**63), 10**30, 0.5, -1.5, 1e308),
    *(math.nan, math.inf, "", "x", "../x", "a\0b", "\ud800", [], {}, [None], [0], ["x"], {"x": 1}, [[]]),
)

IN_GGUF = (
    *(True, 0, 1, -1, 3, 7, 2**31, 2**63 - 1, -(2**63), 0.0, -1.5, math.nan, math.inf, "", "x"),
    *([], [0], ["x"], [[0]], [[]]),
)
MORE_KEYS = (
    *("general.alignment", "llama.attention.sliding_window", "llama.expert_count", "llama.rope.scale_linear"),
    *("llama.rope.scaling.attn_factor", "llama.attention.key_length", "llama.rope.dimension_count"),
)


def counts(quick: int) -> Any:
    """Numbers of examples: few, and many in the slow tests."""
    slow = pytest.param(50 * quick, marks=pytest.mark.slow)
    return pytest.mark.parametrize("examples", [quick, slow], ids=["few", "many"])


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MORE_MEMORY >> 10


def in_one_line(read: Callable[[], Any]) -> None:
    """Reads a possibly damaged file; its error, if any, must be of ours and have one line."""
    said = "a model"
    try:
        read()
    except (ConvertError, CheckpointError) as error:
        said = str(error)
    assert len(said.splitlines()) == 1


EDIT = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["byte", "number", "short", "delete", "repeat", "end"]),
    st.integers(0, 255),
)
"""Place as a fraction of the file, kind of damage, and its byte or number."""


def edited(content: bytes, edits: list[tuple[float, str, int]], within: int) -> bytes:
    """Returns a file's bytes with damage in the first ``within`` bytes."""
    data = bytearray(content)
    for place, kind, value in edits:
        at = int(place * min(within, len(data)))
        number = NUMBERS[value % len(NUMBERS)]
        if kind == "byte":
            data[at : at + 1] = bytes([value])
        elif kind == "number":
            data[at : at + 8] = struct.pack("<Q", number)
        elif kind == "short":
            data[at : at + 4] = struct.pack("<I", number % 2**32)
        elif kind == "delete":
            del data[at : at + 1 + value % 16]
        elif kind == "repeat":
            data[at:at] = data[at : at + 1 + value]
        else:
            del data[at:]
    return bytes(data)


@counts(60)
def test_gguf(examples: int, tmp_path: Path) -> None:
    whole = write_gguf(
        load_golden("llama_gqa_tied"),
        tmp_path / "whole.gguf",
        rope__scaling__factor=2.0,
        rope__scaling__type="linear",
    ).read_bytes()
    keys = [*GGUFStore(tmp_path / "whole.gguf").metadata, *MORE_KEYS]
    header, bad = whole.index(b"output_norm") + 400, tmp_path / "bad.gguf"

    @settings(max_examples=examples)
    @given(
        st.lists(EDIT, min_size=1, max_size=3) | st.tuples(st.sampled_from(keys), st.sampled_from(IN_GGUF))
    )
    def check(damage: Any) -> None:
        pair = isinstance(damage, tuple)
        bad.write_bytes(with_pair(whole, *damage) if pair else edited(whole, damage, header))

        def read() -> None:
            source = load_source(bad)
            source.outer(), source.block(0)

        in_one_line(read)

    check()


def changed(draw: Callable[[Any], Any], document: Any) -> Any:
    """Returns a JSON document with one value changed or dropped."""
    document = copy.deepcopy(document)
    inner, key = document, None
    while isinstance(inner, dict | list) and inner:
        parent = inner
        key = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        inner = parent[key]
        if draw(st.booleans()):
            break
    if key is None:
        return document
    if draw(st.integers(0, 4)):
        parent[key] = draw(st.sampled_from(VALUES))
    else:
        del parent[key]
    return document


def written(draw: Callable[[Any], Any], document: Any) -> str:
    """Returns a changed document as text, which may be damaged too."""
    for _ in range(draw(st.integers(1, 2))):
        document = changed(draw, document)
    text = json.dumps(document)
    how = draw(st.integers(0, 15))
    if how == 0:
        return text[: len(text) // 2]
    return '{"x":' + "[" * 100_000 if how == 1 else text


@counts(60)
@pytest.mark.parametrize(
    "name", ["gemma3", "qwen3_moe_dense_first", "phi3_longrope", "opt_pre_norm", "smollm3"]
)
def test_config(name: str, examples: int, tmp_path: Path) -> None:
    whole = load_golden(name).config

    @settings(max_examples=examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        (tmp_path / "config.json").write_text(written(data.draw, whole))
        in_one_line(lambda: read_config(tmp_path))

    check()


@counts(30)
def test_safetensors(examples: int, tmp_path: Path) -> None:
    model = write_hf(load_golden("llama_untied"), tmp_path, shards=2)
    shard, index = model / "model-00001-of-00002.safetensors", model / "model.safetensors.index.json"
    whole, told = shard.read_bytes(), json.loads(index.read_text())
    header = int.from_bytes(whole[:8], "little")
    tensors = json.loads(whole[8 : 8 + header])

    @settings(max_examples=examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        index.write_text(json.dumps(told))
        kind = data.draw(st.sampled_from(["bytes", "header", "index"]))
        if kind == "bytes":
            edits = data.draw(st.lists(EDIT, min_size=1, max_size=3))
            shard.write_bytes(edited(whole, edits, 8 + header))
        elif kind == "header":
            text = written(data.draw, tensors).encode("utf-8", "surrogatepass")
            shard.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + header :])
        else:
            shard.write_bytes(whole)
            index.write_text(written(data.draw, told))

        def read() -> None:
            source = load_source(model)
            source.outer(), source.block(0)

        in_one_line(read)

    check()


@counts(20)
@pytest.mark.parametrize("vocabulary", [byte_level, pieces])
def test_gguf_tokenizers(vocabulary: Callable[[], dict[str, Any]], examples: int) -> None:
    whole = vocabulary()

    @settings(max_examples=examples)
    @given(st.sampled_from([*sorted(whole), "tokenizer.chat_template"]), st.sampled_from(VALUES))
    def check(key: str, value: Any) -> None:
        in_one_line(lambda: gguf_tokenizer({**whole, key: value}, "file.gguf"))

    check()


@counts(30)
@pytest.mark.parametrize("write", [export_packed, save_source])
def test_manifest(write: Callable[..., Any], examples: int, tmp_path: Path) -> None:
    write(packed_source("llama_untied", tmp_path / "hf", (2,)), tmp_path / "packed")
    file = tmp_path / "packed" / "slim.json"
    whole = json.loads(file.read_text())

    @settings(max_examples=examples)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        file.write_text(written(data.draw, whole))

        def read() -> None:
            manifest = read_manifest(file.parent)
            summary(manifest)
            report_page("a model", manifest)
            model_card("a model", manifest, 1, ())
            source = CheckpointSource(file.parent)
            source.outer(), source.block(0)

        in_one_line(read)

    check()
