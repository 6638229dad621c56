"""The manifest `slim.json`: reading returns what was written; each fault is one line that names it."""

import json
from pathlib import Path
from typing import Any

import pytest
from golden_models import load_golden, write_hf
from test_page import with_reports

from convert import load_source
from convert.writers.packed import export_packed
from slim_jax.config import SlimConfig
from slim_jax.store.manifest import CheckpointError, Manifest, read_manifest

LAYER = "blocks.0.report.layers.0"
CASES = [
    ("decoder", None, "decoder is None, expected an object"),
    ("decoder.hidden_size", "wide", "decoder.hidden_size is 'wide', expected a whole number"),
    ("decoder.num_heads", 3, "decoder: num_heads is 3, expected a multiple"),
    ("decoder.norm", "batch", "decoder.norm is 'batch', expected one of rms, layer"),
    ("decoder.more", 1, "decoder.more is not known to this version of slim-jax"),
    ("decoder.kinds", [[["num_heads", "many"]]], "decoder: "),
    ("version", "2", "version is '2', expected a whole number"),
    ("version", 99, "format version is 99, expected at most"),
    ("origin.path", 3, "origin.path is 3, expected a text"),
    ("origin.path", "\ud800", "surrogates not allowed"),
    ("outer", None, "it lists 3 blocks of 3, and nothing outside of them"),
    ("blocks", [], "it lists 0 blocks of 3"),
    ("blocks.0.arrays", {}, "blocks[0]: "),
    ("blocks.0.arrays.extra", [[2], "O"], "blocks[0]: extra is O[2], expected an array"),
    ("blocks.0.arrays.extra", [[-2], "float32"], "blocks[0]: extra is float32[-2], expected an array"),
    ("blocks.0.arrays.extra", [2], "blocks[0].arrays['extra'] is [2], expected a list of 2"),
    ("blocks.0.files", {"../../secret": "0"}, "../../secret is not in the checkpoint"),
    (f"{LAYER}.error", float("nan"), "NaN is not a number"),
    (f"{LAYER}.error", "<b>", "blocks[0].report.layers[0].error is '<b>', expected a number"),
    (f"{LAYER}.bits", {"9": 1}, "expected groups of 1 to 8"),
    (f"{LAYER}.shape", [32], "blocks[0].report.layers[0].shape is [32], expected a list of 2"),
    ("blocks.0.report.learning.kept_epoch", 7, "kept_epoch is 7, of 3 losses"),
    ("quantization", {"bits": 2}, "quantization has no method"),
    ("quantization", {"method": "slim", "bits": 2, "group_size": 64, "rules": [3]}, "a rule is 3"),
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return with_reports(tmp_path_factory.mktemp("manifest"))


def write(folder: Path, fields: Any) -> Path:
    (folder / "slim.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(("place", "value", "says"), CASES)
def test_a_fault_is_named(manifest: Manifest, tmp_path: Path, place: str, value: Any, says: str) -> None:
    fields = json.loads(json.dumps(manifest.to_json()))
    *owners, name = [int(part) if part.isdigit() else part for part in place.split(".")]
    owner = fields
    for part in owners:
        owner = owner[part]
    owner[name] = value
    with pytest.raises(CheckpointError) as caught:
        read_manifest(write(tmp_path, fields))
    assert str(tmp_path / "slim.json") in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "3", "{}", "\ufeff{}"])
def test_what_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "slim.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"slim\.json is not"):
        read_manifest(tmp_path)


def test_what_is_written_is_read(manifest: Manifest, tmp_path: Path) -> None:
    fields = manifest.to_json() | {"of_a_later_version": 1}
    assert read_manifest(write(tmp_path, fields)) == manifest
    del fields["decoder"]
    with pytest.raises(CheckpointError, match=r"slim\.json: it has no decoder"):
        read_manifest(write(tmp_path, fields))
    assert not {"tuned", "tuning"} & fields.keys()
    export_packed(load_source(write_hf(load_golden("llama_untied"), tmp_path / "hf")), tmp_path / "dense")
    assert read_manifest(tmp_path / "dense").told is None


def test_settings_that_are_gone_are_read(manifest: Manifest, tmp_path: Path) -> None:
    """Checkpoints of earlier versions have settings that were removed since."""
    old = {**SlimConfig().resolved().to_json(), "guide": True, "learn": "clip-gptq"}
    found = read_manifest(write(tmp_path, manifest.to_json() | {"quantization": old}))
    assert found.told is not None
    assert found.told.bits == 2
