"""Runs that share a folder, find it damaged, or find another model."""

import contextlib
import dataclasses
import json
import os
import socket
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from command_line import names
from flax import nnx
from golden_models import load_golden, write_hf
from test_gguf import write_gguf
from test_pipeline import CONFIG as WIDE
from test_pipeline import TOKENS, Killed, assert_same_checkpoint, kill_after

from convert import load_source
from slim_jax import CheckpointError, Decoder, SlimConfig
from slim_jax.calibrate import pipeline
from slim_jax.calibrate.drawn_windows import Draw
from slim_jax.calibrate.events import Notice
from slim_jax.model.params import make_decoder, split_params
from slim_jax.report import TuningReport
from slim_jax.store import checkpoint, entries
from slim_jax.store.checkpoint_sink import CheckpointSink
from slim_jax.store.files import LOCK, locked
from slim_jax.store.source import DecoderSource

CONFIG = dataclasses.replace(
    WIDE, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1
)
ROUNDED = SlimConfig(bits=2, group_size=32, method="rtn", tune=False)


@pytest.fixture(scope="module")
def source() -> DecoderSource:
    return DecoderSource(Decoder(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "out"
    pipeline.quantize_to_checkpoint(source, TOKENS, ROUNDED, path)
    return path


def die(*_: Any) -> Any:
    raise Killed


def interrupt(source: Any, path: Path, after: int = 1, config: SlimConfig = ROUNDED) -> Path:
    """Quantizes until a block is finished, as an interrupted run does."""
    with pytest.raises(Killed):
        pipeline.quantize_to_checkpoint(source, TOKENS, config, path, on_event=kill_after(after))
    return path


def damage(folder: Path) -> None:
    """Changes one byte of the largest file."""
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    out = tmp_path / "new/out"
    holder = f"out is being written by process {os.getpid()} on {socket.gethostname()} since .*: wait, or"
    with locked(out), pytest.raises(CheckpointError, match=holder), locked(out):
        pytest.fail("two have it")
    assert names(tmp_path) == []  # nothing was written
    out.mkdir(parents=True)
    (out / LOCK).write_text("process 1 on a machine that went down")
    with locked(out):
        (out / "file").touch()
    assert names(out) == ["file"]


def test_a_second_run_leaves_the_first_alone(source, whole, tmp_path):
    met = []

    def start_another(event):
        with pytest.raises(CheckpointError, match=f"is being written by process {os.getpid()}"):
            pipeline.quantize_to_checkpoint(
                source, TOKENS, ROUNDED, tmp_path / "out", resume=True, offload=True
            )
        met.append(event.report.index)

    pipeline.quantize_to_checkpoint(
        source, TOKENS, ROUNDED, tmp_path / "out", offload=True, on_event=start_another
    )
    assert met == [0, 1]
    assert_same_checkpoint(tmp_path / "out", whole)
    assert names(tmp_path / "out") == ["blocks", "outer", "slim.json"]


def test_windows_are_drawn_once_the_folder_is_locked(source, whole, tmp_path):
    out, drawn = tmp_path / "out", []

    def draw():
        with pytest.raises(CheckpointError, match="is being written by"), locked(out):
            pytest.fail("another run could begin")
        drawn.append(True)
        return TOKENS

    pipeline.quantize_to_checkpoint(source, Draw("recipe", draw), ROUNDED, out)
    assert drawn == [True]
    assert_same_checkpoint(out, whole)


def test_what_follows_a_damaged_block_is_done_again(source, whole, tmp_path):
    out, heard = interrupt(source, tmp_path / "out"), []
    damage(out / "blocks/000")
    pipeline.quantize_to_checkpoint(source, TOKENS, ROUNDED, out, resume=True, on_event=heard.append)
    assert_same_checkpoint(out, whole)
    (line,) = [event.message for event in heard if isinstance(event, Notice)]
    assert "is damaged" in line
    assert "from blocks/000 on" in line


def test_a_damaged_end_is_done_again(source, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSink, "finish", die)
        with pytest.raises(Killed):
            pipeline.quantize_to_checkpoint(source, TOKENS, ROUNDED, tmp_path / "out")
    damage(tmp_path / "out/outer")
    with pytest.warns(UserWarning, match="from outer on is made again"):
        pipeline.quantize_to_checkpoint(source, TOKENS, ROUNDED, tmp_path / "out", resume=True)
    assert_same_checkpoint(tmp_path / "out", whole)


def test_drafts_stay_until_all_tuned_blocks_are_written(source, tmp_path):
    """A damaged fine-tuned block is rebuilt from its draft; a damaged draft invalidates later blocks."""
    outer, blocks = split_params(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    heard: list[str] = []

    def write(last: int) -> list[int]:
        """Writes missing blocks, fine-tuned ones up to ``last``; returns the fine-tuned ones written."""
        made, resume = [], (tmp_path / "out").exists()
        with (
            contextlib.suppress(Killed),
            CheckpointSink(tmp_path / "out", notify=heard.append) as sink,
        ):
            settings = ROUNDED.resolved().to_json()
            sink.begin(CONFIG, source.origin, settings, resume=resume, drafts=True)
            if not sink.all_written:
                for block in blocks[len(sink.blocks) :]:
                    sink.write_block(block)
                sink.write_outer(outer)
            sink.write_tuned(
                outer,
                lambda i: die() if i > last else made.append(i) or blocks[i],
                TuningReport([(0, 1.0)], 0, 1),
            )
            sink.finish()
        return made

    assert write(0) == [0]
    (tmp_path / "out/drafts/tuning.npz").write_bytes(b"PK")
    damage(tmp_path / "out/blocks/000")
    assert write(0) == [0]
    assert not (tmp_path / "out/drafts/tuning.npz").exists()
    damage(tmp_path / "out/drafts/blocks/001")
    assert write(1) == [1]
    assert [line.partition("; ")[2] for line in heard if "; " in line] == [
        f"what is there from blocks/00{i} on is made again" for i in (0, 1)
    ]
    assert any("tuning.npz is damaged" in line for line in heard)
    assert names(tmp_path / "out") == ["blocks", "outer", "slim.json"]
    assert len(checkpoint.load(tmp_path / "out").blocks) == 2


def test_files_are_on_disk_before_the_manifest_names_them(source, tmp_path, monkeypatch):
    synced: set[Path] = set()
    monkeypatch.setattr(entries, "sync", lambda *paths: synced.update(paths))
    interrupt(source, tmp_path / "out", 0)
    files = {path for path in (tmp_path / "out/blocks/000").rglob("*") if path.is_file()}
    assert files <= synced
    assert {tmp_path / "out/blocks/000", tmp_path / "out/blocks", tmp_path / "out"} <= synced


def retrained(decoder: Decoder) -> Decoder:
    outer, blocks = split_params(decoder)
    return make_decoder(
        CONFIG, outer, [*blocks[:-1], {k: v + jnp.ones_like(v) for k, v in blocks[-1].items()}]
    )


def test_retrained_weights_are_another_model(source, tmp_path):
    out = interrupt(source, tmp_path / "out", 0)
    other = DecoderSource(retrained(Decoder(CONFIG, rngs=nnx.Rngs(0))))
    with pytest.raises(CheckpointError, match="the model is another, its weights"):
        pipeline.quantize_to_checkpoint(other, TOKENS, ROUNDED, out, resume=True)
    manifest = json.loads((out / "slim.json").read_text())
    manifest["origin"]["fingerprint"] = "that of an earlier version"
    (out / "slim.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="begun by an earlier version of slim-jax"):
        pipeline.quantize_to_checkpoint(source, TOKENS, ROUNDED, out, resume=True)


@pytest.mark.parametrize("write", ["hf", "shards", "gguf"])
def test_fingerprints_know_the_weights_and_not_the_place(tmp_path, write):
    def fingerprint(name: str, change: float = 0.0) -> str:
        golden = load_golden("llama_untied")
        golden.weights["model.layers.1.mlp.up_proj.weight"][-1, -1] += change
        if write == "gguf":
            path = write_gguf(golden, tmp_path / f"{name}.gguf")
        else:
            path = write_hf(golden, tmp_path / name, shards=3 if write == "shards" else 1)
        return load_source(path).origin["fingerprint"]

    assert fingerprint("one") == fingerprint("two") != fingerprint("three", 1.0)
