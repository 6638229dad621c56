"""Writing a checkpoint: who may write to its folder, what an interrupted run left there, block by block."""

import contextlib
import dataclasses
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from slim_jax.devices import ONE_DEVICE, Placement
from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import Params
from slim_jax.report import BlockReport, LayerReport, Report, TuningReport
from slim_jax.run.entries import barrier, load_params, save_params, verify_entry
from slim_jax.run.files import locked, refuse_if_locked, remove, require_empty, write_json
from slim_jax.run.manifest import (
    MANIFEST,
    CheckpointError,
    is_checkpoint,
    layer_reports,
    new_manifest,
    read_manifest,
    summary,
)
from slim_jax.run.source import SAMPLED


def require_new(path: Path, hint: str = "") -> None:
    """Asks whether a checkpoint can be written to a folder.

    It can where there is nothing, or what begins anew in any case: an unfinished conversion, or a run
    without a finished block.

    Raises:
      CheckpointError: it cannot, or another process writes there.
    """
    refuse_if_locked(path)
    ours = []
    if is_checkpoint(path) and _worthless(read_manifest(path, complete=False)):
        ours = [own.name for own in _own(path)]
    require_empty(path, hint, ours)


def _worthless(manifest: dict[str, Any]) -> bool:
    unfinished = not manifest["complete"]
    return unfinished and (manifest["quantization"] is None or not (manifest["blocks"] or manifest["outer"]))


def _own(path: Path) -> list[Path]:
    """What a run that did not end has written to its folder, the manifest last."""
    names = ("outer", "blocks", "tokenizer", "drafts", "activations.*", "*.tmp", MANIFEST)
    return [own for name in names for own in path.glob(name)]


class CheckpointWriter:
    """Writes a checkpoint block by block; a killed run leaves all finished blocks readable.

    As a context it keeps other processes from the folder, and leaves nothing of a run that ends before its
    first block, nor of an unfinished conversion.

    Args:
      path: the folder; must not exist or be empty, unless ``resume``.
      config: the decoder's.
      origin: of the source.
      quantization: settings that a resumed run must share, as JSON values; None for dense weights.
      resume: continue in a folder that an interrupted run left.
      drafts: what is written first will be replaced by :meth:`write_tuned`.
      placement: the devices that have the arrays.
      notify: told what is damaged in the folder and will be done again.

    Raises:
      CheckpointError: the folder holds something else, a run with other settings, or is being written by
        another process.
      OSError: the folder cannot be made.
    """

    def __init__(
        self,
        path: Path,
        config: DecoderConfig,
        origin: dict[str, Any],
        quantization: dict[str, Any] | None,
        *,
        resume: bool = False,
        drafts: bool = False,
        placement: Placement = ONE_DEVICE,
        notify: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.path, self._placement, self._first = Path(path), placement, "drafts/" if drafts else ""
        wanted = new_manifest(config, origin, quantization, complete=False)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.path))
            if jax.process_index() == 0:
                self._open(wanted, resume, notify)
            barrier(f"{self.path} is there")
            self._manifest = read_manifest(self.path, complete=False)
            _check_same(self.path, self._manifest, wanted)
            self._lock = stack.pop_all()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            swept = any(self.path.glob("drafts/*.npz"))
            if jax.process_index() == 0 and _worthless(self._manifest) and not swept:
                remove(*_own(self.path))

    def _open(self, wanted: dict[str, Any], resume: bool, notify: Callable[[str], None]) -> None:
        """Makes a folder ready: new, or as an interrupted run left it, without what is damaged."""
        found = read_manifest(self.path, complete=False) if is_checkpoint(self.path) else None
        if found is not None and _worthless(found) and not (resume and not _differing(found, wanted)):
            remove(*_own(self.path))
            found = None
        if found is None or not resume:
            require_empty(self.path, "" if found is None else ": --resume continues an interrupted run")
            write_json(self.path / MANIFEST, wanted)
        elif not found["complete"]:
            _check_same(self.path, found, wanted)
            self._drop_damaged(found, notify)
        over = self.path.glob("drafts") if found is not None and found["complete"] else ()
        remove(*self.path.glob("activations.*"), *self.path.glob("*.tmp"), *over)  # of a run that was killed

    def _drop_damaged(self, manifest: dict[str, Any], notify: Callable[[str], None]) -> None:
        """Takes from the manifest of an unfinished run the first damaged entry, and all after it."""
        blocks, tuned = manifest["blocks"], manifest.get("tuned", [])
        whole = self._undamaged(blocks, notify)
        if whole < len(blocks):
            manifest["outer"] = None  # it was quantized for what these blocks gave
            del blocks[whole:]
        if manifest["outer"] is not None and not self._undamaged([manifest["outer"]], notify, "outer"):
            manifest["outer"] = None
        del tuned[min(whole, self._undamaged(tuned, notify)) :]
        write_json(self.path / MANIFEST, manifest)
        for file in self.path.glob("drafts/*.npz"):
            if not _is_sound(file):
                notify(f"{file} is damaged: it is made again")
                file.unlink()

    def _undamaged(
        self, entries: list[dict[str, Any]], notify: Callable[[str], None], folder: str = "blocks/{:03d}"
    ) -> int:
        """The number of entries before the first damaged one."""
        for index, entry in enumerate(entries):
            try:
                verify_entry(self.path, entry, folder.format(index))
            except CheckpointError as error:
                notify(f"{error}; what is there from {folder.format(index)} on is made again")
                return index
        return len(entries)

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The manifest's entries of the blocks written so far; ``["report"]`` is a `BlockReport` or None."""
        return self._manifest["blocks"]

    @property
    def complete(self) -> bool:
        """Whether :meth:`finish` was called, by this run or an earlier one."""
        return self._manifest["complete"]

    @property
    def all_written(self) -> bool:
        """Whether nothing is missing, though what is there may be a draft."""
        return len(self.blocks) == self._manifest["decoder"]["num_layers"] and bool(self._manifest["outer"])

    def report(self) -> Report:
        """What was done so far, by earlier runs too."""
        blocks = [BlockReport.from_json(entry["report"]) for entry in self.blocks]
        ends = [LayerReport.from_json(layer) for layer in layer_reports(self._manifest["outer"])]
        sizes, tuning = summary(self._manifest), self._manifest.get("tuning")
        tuning = None if tuning is None else TuningReport.from_json(tuning)
        return Report(blocks, ends, sizes["parameters"], sizes["bytes"], tuning)

    def write_outer(self, params: Params, ends: Sequence[LayerReport] = ()) -> None:
        """Writes the parameters outside the blocks, and what was done to embedding and head."""
        report = {"layers": [dataclasses.asdict(layer) for layer in ends]}
        self._manifest["outer"] = self._save(f"{self._first}outer", params, report)
        write_json(self.path / MANIFEST, self._manifest)

    def write_block(self, params: Params, report: BlockReport | None = None) -> None:
        """Writes the next block."""
        folder = f"{self._first}blocks/{len(self.blocks):03d}"
        fields = None if report is None else dataclasses.asdict(report)
        self.blocks.append(self._save(folder, params, fields))
        write_json(self.path / MANIFEST, self._manifest)

    def read_outer(self) -> dict[str, Any]:
        """Reads back what stands outside the blocks."""
        return load_params(self.path, self._manifest["outer"], "outer", None, self._placement)

    def read_block(self, index: int) -> dict[str, Any]:
        """Reads a finished block back."""
        return load_params(self.path, self.blocks[index], f"blocks/{index:03d}", None, self._placement)

    def write_tuned(self, outer: Params, block: Callable[[int], Params], report: TuningReport) -> None:
        """Writes ``outer`` and what ``block(index)`` gives; :meth:`finish` puts them in the drafts' place."""
        tuned = self._manifest.setdefault("tuned", [])
        for index in range(len(tuned), len(self.blocks)):
            tuned.append(self._save(f"blocks/{index:03d}", block(index), self.blocks[index]["report"]))
            write_json(self.path / MANIFEST, self._manifest)
        last = self._save("outer", outer, self._manifest["outer"]["report"])
        self._manifest |= {"outer": last, "blocks": tuned, "tuning": dataclasses.asdict(report)}
        del self._manifest["tuned"]

    def finish(self) -> None:
        """Declares the checkpoint complete."""
        self._manifest["complete"] = True
        write_json(self.path / MANIFEST, self._manifest)
        if jax.process_index() == 0:
            remove(self.path / "drafts")

    def _save(self, folder: str, params: Params, report: dict[str, Any] | None) -> dict[str, Any]:
        entry = {**save_params(self.path / folder, params, self._placement), "report": report}
        return {**entry, "folder": folder} if self._first and folder.startswith(self._first) else entry


def _is_sound(file: Path) -> bool:
    """Whether every array of an ``.npz`` file has its checksum."""
    try:
        with zipfile.ZipFile(file) as arrays:
            return arrays.testzip() is None
    except Exception:  # of damaged bytes anything is raised
        return False


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    older = found["version"] != wanted["version"] or _is_sampled(found) < _is_sampled(wanted)
    if older and not found["complete"]:
        raise CheckpointError(f"{path} was begun by an earlier version of slim-jax: start anew elsewhere")
    if changes := _differing(found, wanted):
        raise CheckpointError(f"{path} cannot be resumed with other settings: {', '.join(changes)}")


def _is_sampled(manifest: dict[str, Any]) -> bool:
    return str(manifest["origin"].get("fingerprint")).startswith(SAMPLED)


def _differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """In what two runs differ, a line each; where the model lies and what it is called does not count."""
    changes = []
    for part in ("decoder", "quantization"):
        old, new = found[part] or {}, wanted[part] or {}
        differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        changes += [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in differing]
    was, now = ({**run["origin"], "path": None, "name": None} for run in (found, wanted))
    if was != now and _is_sampled(found) == _is_sampled(wanted):
        changes.append("the model is another, its weights or its files differ")
    return changes
