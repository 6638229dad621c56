"""Writes a checkpoint block by block: locks its folder, and resumes what an interrupted run left there."""

import dataclasses
import json
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import Params
from slim_jax.placement import ONE_DEVICE, Placement
from slim_jax.report import BlockReport, LayerReport, Report, TuningReport
from slim_jax.store.entries import barrier, load_params, save_params, verify_entry
from slim_jax.store.files import locked, refuse_if_locked, remove, require_empty, write_json
from slim_jax.store.manifest import (
    MANIFEST,
    Block,
    CheckpointError,
    Entry,
    Manifest,
    Outer,
    OuterReport,
    is_checkpoint,
    layer_reports,
    read_manifest,
    summary,
)
from slim_jax.store.source import SAMPLED


def require_new(path: Path, hint: str = "") -> None:
    """Checks that a new checkpoint can be written to a folder.

    It can if the folder is missing or empty, or holds only what is started anew in any case: an unfinished
    conversion, or a run without any finished entry.

    Raises:
      CheckpointError: it cannot, or another process writes there.
    """
    refuse_if_locked(path)
    ours = []
    if is_checkpoint(path) and _worthless(read_manifest(path, complete=False)):
        ours = [own.name for own in _own(path)]
    require_empty(path, hint, ours)


def _worthless(manifest: Manifest) -> bool:
    return not manifest.complete and (manifest.quantization is None or not manifest.entries)


def _own(path: Path) -> list[Path]:
    """Paths that an unfinished run has written to its folder, the manifest last."""
    names = ("outer", "blocks", "tokenizer", "drafts", "activations.*", "*.tmp", MANIFEST)
    return [own for name in names for own in path.glob(name)]


class CheckpointSink:
    """Writes a run to a checkpoint, block by block; a killed run leaves all finished blocks readable.

    It is a context manager: inside the ``with`` block it keeps other processes from the folder. At the end it
    removes an unfinished conversion, and a run without a finished entry, unless that has a finished gradient
    sweep or was interrupted and has kept its calibration windows.

    Args:
      path: the folder.
      placement: the chips that hold the arrays.
      notify: called with a message for each part of the folder that is damaged and made again.
    """

    def __init__(
        self,
        path: Path,
        placement: Placement = ONE_DEVICE,
        notify: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.path, self._placement, self._notify = Path(path), placement, notify
        self._first = ""
        self._begun: Manifest | None = None

    def __enter__(self) -> "CheckpointSink":
        """Locks the folder.

        Raises:
          CheckpointError: another process writes to it.
          OSError: the folder cannot be made.
        """
        self._lock = locked(self.path)
        self._lock.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        try:
            failed = kind is not None and issubclass(kind, Exception)  # an interrupted run may be resumed
            dear = "drafts/sweep.npz" if failed else "drafts/*.npz"
            begun = self._begun is not None and jax.process_index() == 0
            if begun and _worthless(self._manifest) and not any(self.path.glob(dear)):
                remove(*_own(self.path))
        finally:
            self._lock.__exit__(None, None, None)

    def begin(
        self,
        config: DecoderConfig,
        origin: dict[str, Any],
        quantization: dict[str, Any] | None,
        *,
        resume: bool = False,
        drafts: bool = False,
    ) -> None:
        """Prepares the folder, which must be empty unless ``resume``; nothing can be written before.

        Args:
          config: the decoder's config.
          origin: the source's origin.
          quantization: settings that a resumed run must share, as JSON values; None for dense weights.
          resume: if True, a run that was interrupted in this folder is continued.
          drafts: if True, the blocks are drafts, which :meth:`write_tuned` replaces.

        Raises:
          CheckpointError: the folder holds something else, or a run with other settings.
        """
        self._first = "drafts/" if drafts else ""
        wanted = Manifest(config, *json.loads(json.dumps([origin, quantization])))
        if jax.process_index() == 0:
            self._open(wanted, resume)
        barrier(f"{self.path} is there")
        found = read_manifest(self.path, complete=False)
        _check_same(self.path, found, wanted)
        self._begun = found

    @property
    def _manifest(self) -> Manifest:
        assert self._begun is not None, "begin comes first"
        return self._begun

    def _open(self, wanted: Manifest, resume: bool) -> None:
        """Prepares the folder: a new one, or that of an interrupted run, without its damaged parts."""
        found = read_manifest(self.path, complete=False) if is_checkpoint(self.path) else None
        anew = not resume or (found is not None and (_is_older(found, wanted) or _differing(found, wanted)))
        if found is not None and anew and _worthless(found):
            remove(*_own(self.path))
            found = None
        if found is None or not resume:
            require_empty(self.path, "" if found is None else ": --resume continues an interrupted run")
            self._write(wanted)
        elif not found.complete:
            _check_same(self.path, found, wanted)
            self._drop_damaged(found)
        over = self.path.glob("drafts") if found is not None and found.complete else ()
        remove(*self.path.glob("activations.*"), *self.path.glob("*.tmp"), *over)  # left by a killed run

    def _drop_damaged(self, found: Manifest) -> None:
        """Removes the first damaged entry, and all after it, from the manifest of an unfinished run."""
        whole = self._undamaged(found.blocks)
        outer = found.outer if whole == len(found.blocks) else None  # calibrated on their output
        if outer is not None and not self._undamaged([outer], "outer"):
            outer = None
        tuned = found.tuned[: min(whole, self._undamaged(found.tuned))]
        self._write(found, blocks=found.blocks[:whole], outer=outer, tuned=tuned)
        for file in self.path.glob("drafts/*.npz"):
            if not _is_sound(file):
                self._notify(f"{file} is damaged: it is made again")
                file.unlink()

    def _undamaged(self, entries: Sequence[Entry], folder: str = "blocks/{:03d}") -> int:
        """Returns the number of entries before the first damaged one."""
        for index, entry in enumerate(entries):
            try:
                verify_entry(self.path, entry, folder.format(index))
            except CheckpointError as error:
                self._notify(f"{error}; what is there from {folder.format(index)} on is made again")
                return index
        return len(entries)

    def _write(self, manifest: Manifest, **changes: Any) -> None:
        """Writes the manifest with some fields changed."""
        self._begun = dataclasses.replace(manifest, **changes)
        write_json(self.path / MANIFEST, self._manifest.to_json())

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Entries of the blocks written so far, by this run or an earlier one."""
        return self._manifest.blocks

    @property
    def reports(self) -> list[BlockReport]:
        """Reports of the blocks written so far; blocks of a conversion have none."""
        return [block.report for block in self.blocks if block.report is not None]

    @property
    def complete(self) -> bool:
        """True if :meth:`finish` was called, by this run or an earlier one."""
        return self._manifest.complete

    @property
    def all_written(self) -> bool:
        """True if all entries are written; they may be drafts."""
        return len(self.blocks) == self._manifest.decoder.num_layers and self._manifest.outer is not None

    def draft(self, name: str) -> Path:
        """Path of a file for the state of the unfinished run."""
        return self.path / "drafts" / name

    @property
    def _outer(self) -> Outer:
        assert self._manifest.outer is not None
        return self._manifest.outer

    def report(self) -> Report:
        """Returns the report of the run so far, including what earlier runs did."""
        sizes, outside = summary(self._manifest), list(layer_reports(self._outer))
        return Report(self.reports, outside, sizes["parameters"], sizes["bytes"], self._manifest.tuning)

    def write_outer(self, params: Params, reports: Sequence[LayerReport] = ()) -> None:
        """Writes the parameters outside the blocks, and the reports of embedding and LM head."""
        outer = Outer(**self._save(f"{self._first}outer", params), report=OuterReport(list(reports)))
        self._write(self._manifest, outer=outer)

    def write_block(self, params: Params, report: BlockReport | None = None) -> None:
        """Writes the next block."""
        block = Block(**self._save(f"{self._first}blocks/{len(self.blocks):03d}", params), report=report)
        self._write(self._manifest, blocks=(*self.blocks, block))

    def read(self, index: int | None) -> dict[str, Any]:
        """Reads back the parameters of a block, or those outside the blocks for None."""
        entry, folder = (
            (self._outer, "outer") if index is None else (self.blocks[index], f"blocks/{index:03d}")
        )
        return load_params(self.path, entry, folder, None, self._placement)

    def write_tuned(self, outer: Params, block: Callable[[int], Params], report: TuningReport) -> None:
        """Writes the fine-tuned parameters, ``outer`` and ``block(index)``, which replace the drafts."""
        for index in range(len(self._manifest.tuned), len(self.blocks)):
            saved = self._save(f"blocks/{index:03d}", block(index))
            tuned = Block(**saved, report=self.blocks[index].report)
            self._write(self._manifest, tuned=(*self._manifest.tuned, tuned))
        last = Outer(**self._save("outer", outer), report=self._outer.report)
        self._begun = dataclasses.replace(
            self._manifest, outer=last, blocks=self._manifest.tuned, tuned=(), tuning=report
        )

    def finish(self) -> Report:
        """Declares the checkpoint complete; returns the report."""
        self._write(self._manifest, complete=True)
        if jax.process_index() == 0:
            remove(self.path / "drafts")
        return self.report()

    def _save(self, folder: str, params: Params) -> dict[str, Any]:
        draft = self._first and folder.startswith(self._first)
        fields = save_params(self.path / folder, params, self._placement)
        return {**fields, "folder": folder if draft else None}


def _is_sound(file: Path) -> bool:
    """True if every array of an ``.npz`` file matches its checksum."""
    try:
        with zipfile.ZipFile(file) as arrays:
            return arrays.testzip() is None
    except Exception:  # damaged bytes may raise anything
        return False


def _is_older(found: Manifest, wanted: Manifest) -> bool:
    return found.version != wanted.version or _is_sampled(found) < _is_sampled(wanted)


def _check_same(path: Path, found: Manifest, wanted: Manifest) -> None:
    if _is_older(found, wanted) and not found.complete:
        raise CheckpointError(f"{path} was begun by an earlier version of slim-jax: start anew elsewhere")
    if changes := _differing(found, wanted):
        raise CheckpointError(f"{path} cannot be resumed with other settings: {', '.join(changes)}")


def _is_sampled(manifest: Manifest) -> bool:
    return manifest.origin.get("fingerprint", "").startswith(SAMPLED)


def _differing(found: Manifest, wanted: Manifest) -> list[str]:
    """Differences between two runs, a line each; of the model's origin only the fingerprint counts."""
    changes = []
    for old, new in (
        (found.decoder.to_json(), wanted.decoder.to_json()),
        (found.quantization or {}, wanted.quantization or {}),
    ):
        differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        changes += [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in differing]
    was, now = ([run.origin.get(key) for key in ("kind", "fingerprint")] for run in (found, wanted))
    if was != now and _is_sampled(found) == _is_sampled(wanted):
        changes.append("the model is another, its weights or its files differ")
    return changes
