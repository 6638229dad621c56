"""Names on the hub: files and revisions that are requested, and the messages if they are unavailable."""

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from command_line import refused, said, write_model
from golden_models import load_golden, write_hf
from huggingface_hub import errors
from test_packed import packed_source
from test_towers import whole_model

import slim_jax
from convert.readers.load import load_config, load_source, open_model
from convert.writers.packed import export_packed

COMMIT = "0123abc"


class Hub:
    """Replacement of `snapshot_download` for one repository, a local folder."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.snapshot = repository, cache / "snapshots" / COMMIT
        self.calls: list[tuple[str, str | None]] = []
        self.fetched: list[str] = []

    def __call__(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append((name, revision))
        for file in (file for file in sorted(self.repository.rglob("*")) if file.is_file()):
            path = str(file.relative_to(self.repository))
            if any(fnmatchcase(path, pattern) for pattern in allow_patterns):
                self.fetched.append(path)
                (self.snapshot / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.snapshot / path)
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub whose repository also holds other forms of the model, other models, pickles and code."""
    found = Hub(tmp_path / "repository", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    for path in (
        *("original/consolidated.00.pth", "original/params.json", "original/tokenizer.model", "README.md"),
        *("consolidated.safetensors", "checkpoint-500/model.safetensors", "checkpoint-500/config.json"),
        *("onnx/model.onnx", "pytorch_model.bin", "modeling.py", "model-Q4.gguf", "trainer_state.json"),
    ):
        (found.repository / path).parent.mkdir(parents=True, exist_ok=True)
        (found.repository / path).write_bytes(b"other")
    return found


@pytest.mark.parametrize("shards", [1, 2])
def test_only_what_a_model_is_read_from_is_fetched(hub: Hub, shards: int) -> None:
    write_model(hub.repository, shards=shards)
    if shards == 2:
        (hub.repository / "model-00001-of-00003.safetensors").write_bytes(b"of another index")
    assert load_config("owner/model").num_layers == 2
    small = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    index = {"model.safetensors.index.json"} if shards == 2 else set()
    assert set(hub.fetched) == small | index
    source = load_source("owner/model")
    weights = (
        {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)} if shards == 2 else {"model.safetensors"}
    )
    assert set(hub.fetched) == small | index | weights
    assert source.block(0).keys()
    assert source.tokenizer("w5").input_ids
    assert hub.calls == [("owner/model", None), ("owner/model", None), ("owner/model", COMMIT)]


def test_a_text_tower_by_its_index(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(whole_model("model.language_model.", "model."), hub.repository, shards=2)
    out = json.loads(said(capsys, "plan", "owner/model", "--json"))
    assert "vision tower (2 tensors)" in out["notes"][0]
    assert set(hub.fetched) == {"config.json", "model.safetensors.index.json"}


def test_packed_models(hub: Hub, tmp_path: Path) -> None:
    source = packed_source("llama_untied", tmp_path / "hf", (2,))
    export_packed(source, tmp_path / "packed", shard_bytes=10_000)
    shutil.copytree(tmp_path / "packed", hub.repository, dirs_exist_ok=True)
    assert slim_jax.inspect("owner/slim")["layers"]
    assert not any(name.endswith(".safetensors") for name in hub.fetched)
    assert isinstance(open_model("owner/slim"), slim_jax.CheckpointSource)
    shards = json.loads((tmp_path / "packed" / "slim.json").read_text())["files"]
    assert len(shards) > 1
    assert {name for name in hub.fetched if name.endswith(".safetensors")} == set(shards)
    assert slim_jax.load("owner/slim@v1").config == source.config
    assert hub.calls[-2:] == [("owner/slim", "v1"), ("owner/slim", COMMIT)]


def test_folders_of_orbax(hub: Hub, tmp_path: Path) -> None:
    slim_jax.save_source(
        load_source(write_hf(load_golden("llama_untied"), tmp_path / "hf")), tmp_path / "own"
    )
    shutil.copytree(tmp_path / "own", hub.repository, dirs_exist_ok=True)
    assert slim_jax.load("owner/slim").config.num_layers == 3
    assert all(name.startswith(("slim.json", "outer/", "blocks/")) for name in hub.fetched)


def test_a_damaged_index_is_named(hub: Hub) -> None:
    write_model(hub.repository, shards=2)
    (hub.repository / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json has no weight_map"):
        load_source("owner/model")


def test_revisions(hub: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_model(hub.repository)
    out = json.loads(said(capsys, "plan", "owner/model", "--revision", "refs/pr/3", "--json"))
    assert out["parameters"] > 0
    assert hub.calls == [("owner/model", "refs/pr/3")]
    for command in ("convert", "export"):
        hub.calls.clear()
        said(capsys, command, "owner/model", tmp_path / command, "--revision", "v2")
        assert hub.calls == [("owner/model", "v2"), ("owner/model", COMMIT)]
    for command in (
        *(["quantize", tmp_path / "hf", tmp_path / "x"], ["convert", tmp_path / "hf", tmp_path / "x"]),
        *(["eval", tmp_path / "hf", "--text", "t"], ["generate", tmp_path / "hf", "--prompt", "w5"]),
        *(["chat", tmp_path / "hf"], ["inspect", tmp_path / "hf"], ["plan", tmp_path / "hf"]),
        ["export", tmp_path / "hf", tmp_path / "x"],
    ):
        line = (
            refused(capsys, *command, "--revision", "v2") if command[0] != "eval" else "--revision v2 needs"
        )
        assert "--revision v2 needs" in line
    assert not (tmp_path / "x").exists()


def answer(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def offline() -> Exception:
    error = errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot")
    error.__cause__ = errors.OfflineModeIsEnabled("offline")
    return error


def unreachable() -> Exception:
    error = errors.LocalEntryNotFoundError("Got: ConnectError\nplease check")
    error.__cause__ = ConnectionError("name resolution failed\nhere")
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            errors.GatedRepoError("x\ny", response=answer(403)),
            "owner/model is gated on the hub: ask for access",
        ),
        (
            errors.RepositoryNotFoundError("x", response=answer(401)),
            "the hub has no such model, or it is private",
        ),
        (
            errors.RevisionNotFoundError("x", response=answer(404)),
            "owner/model has no revision v9 on the hub",
        ),
        (errors.HfHubHTTPError("x", response=answer(403)), "gives no access to owner/model (HTTP 403)"),
        (errors.HfHubHTTPError("503: down\nnow", response=answer(503)), "the hub did not give it: 503: down"),
        (offline(), "HF_HUB_OFFLINE is set"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (unreachable(), "the hub cannot be reached: name resolution failed"),
        (ConnectionError("refused"), "the hub cannot be reached: refused"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_what_failed_is_said(
    error: Exception,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(name: str, **_: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for command in (
        ["plan", "owner/model"],
        ["convert", "owner/model", tmp_path / "x"],
        ["inspect", "owner/model"],
    ):
        line = refused(capsys, *command, "--revision", "v9")
        assert "owner/model@v9 is not a local path, and " in line
        assert expected in line
        assert "checkpoint" not in line
    assert not (tmp_path / "x").exists()
