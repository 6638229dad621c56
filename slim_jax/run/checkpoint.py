"""Checkpoints on disk: Orbax folders, one per block, and a manifest `slim.json` that vouches for them.

    out/slim.json      what is here, how it was made, a digest of every file
    out/outer/         embeddings, last norm, head
    out/blocks/007/    one block
    out/tokenizer/     the tokenizer's own files
    out/drafts/        until all is done: what the sweep found, blocks that tuning is going to replace

A finished checkpoint is also read from safetensors files, which people pass on (`slim_jax.run.shards`).

The manifest is rewritten, whole, after every block, so a folder whose manifest says
``"complete": false`` is a run that can be resumed.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from slim_jax.devices import ONE_DEVICE, Placement
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import Params
from slim_jax.report import BlockReport, LayerReport, Report, TuningReport
from slim_jax.run.files import write_json
from slim_jax.run.hub import JSON_FILES, find
from slim_jax.run.manifest import (
    MANIFEST,
    layer_reports,
    listed,
    new_manifest,
    stored_arrays,
    stored_params,
    summary,
)
from slim_jax.run.manifest import CheckpointError as CheckpointError
from slim_jax.run.manifest import is_checkpoint as is_checkpoint
from slim_jax.run.manifest import read_manifest as read_manifest
from slim_jax.run.shards import Shards, digest, verify
from slim_jax.run.source import DecoderSource, FiniteSource, Source, read_decoder


def _barrier(name: str) -> None:
    """Every process of a distributed run waits here for all others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _remove(folder: Path) -> None:
    """Removes what was written, or half written, of an Orbax folder."""
    for left in (folder, *folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*")):
        shutil.rmtree(left, ignore_errors=True)


def _save_params(folder: Path, params: Params, placement: Placement) -> dict[str, Any]:
    """Writes one Orbax folder; what the manifest needs to read it back.

    Of several processes each writes what its devices have.

    Raises:
      CheckpointError: it cannot be written.
    """
    arrays, packed = stored_arrays(params)
    arrays |= {name: placement.channels(arrays[name]) for name in arrays.keys() & params.keys()}
    if jax.process_index() == 0:
        _remove(folder)  # of a run that died between this folder and its manifest
    _barrier(f"{folder} is free")
    try:
        ocp.save(folder.absolute(), arrays)
    except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors
        _remove(folder)  # Orbax's threads may still write: what they leave goes with the next attempt
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder} cannot be written: {reason}") from error
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "arrays": listed(arrays),
        "packed": packed,
        "files": {str(path.relative_to(folder)): digest(path) for path in files},
    }


def _load_params(
    path: Path, entry: dict[str, Any], folder_name: str, dtype: jnp.dtype | None, placement: Placement
) -> dict[str, Any]:
    """Reads what :func:`_save_params` wrote, every file's digest compared first."""
    folder = path / entry.get("folder", folder_name)
    for name, expected in entry["files"].items():
        verify(folder / name, expected)
    abstract = {
        name: placement.abstract(tuple(shape), jnp.dtype(kind))
        for name, (shape, kind) in entry["arrays"].items()
    }
    return stored_params(entry["packed"], dict(ocp.load(folder.absolute(), abstract)), dtype)


class CheckpointWriter:
    """Writes a checkpoint block by block; a killed run leaves all finished blocks readable.

    Args:
      path: the folder; must not exist or be empty, unless ``resume``.
      config: the decoder's.
      origin: of the source.
      quantization: settings that a resumed run must share, as JSON values; None for dense weights.
      resume: continue in a folder that an interrupted run left.
      drafts: what is written first will be replaced by :meth:`write_tuned`.
      placement: the devices that have the arrays.

    Raises:
      CheckpointError: the folder holds something else, or a run with other settings.
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
    ) -> None:
        self.path, self._placement, self._first = Path(path), placement, "drafts/" if drafts else ""
        manifest = new_manifest(config, origin, quantization, complete=False)
        if jax.process_index() == 0 and not (resume and is_checkpoint(self.path)):
            self._create(manifest)
        _barrier(f"{self.path} is there")
        self._manifest = read_manifest(self.path, complete=False)
        _check_same(self.path, self._manifest, manifest)

    def _create(self, manifest: dict[str, Any]) -> None:
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            hint = ": --resume continues an interrupted run" if is_checkpoint(self.path) else ""
            raise CheckpointError(f"{self.path} exists and is not an empty folder{hint}")
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / MANIFEST, manifest)

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
        return _load_params(self.path, self._manifest["outer"], "outer", None, self._placement)

    def read_block(self, index: int) -> dict[str, Any]:
        """Reads a finished block back."""
        return _load_params(self.path, self.blocks[index], f"blocks/{index:03d}", None, self._placement)

    def write_tuned(self, outer: Params, block: Callable[[int], Params], report: TuningReport) -> None:
        """Replaces every draft, one after another, by ``outer`` and what ``block(index)`` gives."""
        self._manifest["tuning"] = dataclasses.asdict(report)
        for index, entry in enumerate(self.blocks):
            if "folder" in entry:
                self.blocks[index] = self._save(f"blocks/{index:03d}", block(index), entry["report"])
                write_json(self.path / MANIFEST, self._manifest)
        if "folder" in self._manifest["outer"]:
            self._manifest["outer"] = self._save("outer", outer, self._manifest["outer"]["report"])

    def finish(self) -> None:
        """Declares the checkpoint complete."""
        self._manifest["complete"] = True
        write_json(self.path / MANIFEST, self._manifest)
        if jax.process_index() == 0:
            shutil.rmtree(self.path / "drafts", ignore_errors=True)

    def _save(self, folder: str, params: Params, report: dict[str, Any] | None) -> dict[str, Any]:
        entry = {**_save_params(self.path / folder, params, self._placement), "report": report}
        return {**entry, "folder": folder} if self._first and folder.startswith(self._first) else entry


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if not found["complete"] and found["version"] != wanted["version"]:
        was, now = found["version"], wanted["version"]
        raise CheckpointError(f"{path} was begun in format version {was}, now {now}: start anew elsewhere")
    for part in ("decoder", "origin", "quantization"):
        old, new = found[part] or {}, wanted[part] or {}
        differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if differing:
            changes = ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in differing)
            raise CheckpointError(f"{path} cannot be resumed with other settings: {changes}")


class CheckpointSource:
    """A `slim_jax.run.source.Source` that reads a checkpoint block by block, every file verified.

    Args:
      path: the checkpoint's folder, of Orbax or of safetensors files, or ``owner/model`` on the hub.
      dtype: of dense parameters and of products with packed ones; by default dense ones as they are
        stored, products as `slim_jax.model.linear.product_dtype` says.
      mesh: devices over which the output channels of every weight are cut; the default device has all
        without.

    Attributes:
      path: the folder.
      manifest: what `slim.json` says.

    Raises:
      CheckpointError: on construction as :func:`read_manifest`, or where the hub does not give it; on
        reading, where a file is damaged.
    """

    def __init__(self, path: str | Path, dtype: jnp.dtype | None = None, mesh: Mesh | None = None) -> None:
        self.path, self._dtype, self.placement = find(path), dtype, Placement(mesh)
        self.manifest = read_manifest(self.path)
        self.config = DecoderConfig.from_json(self.manifest["decoder"])
        fingerprint = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()
        self.origin = {"kind": "checkpoint", "path": str(self.path.absolute()), "fingerprint": fingerprint}
        files = self.manifest.get("files")
        self._shards = None if files is None else Shards(self.path, files)

    def outer(self) -> Params:
        """See `Source`."""
        return self._read(self.manifest["outer"], None)

    def block(self, index: int) -> Params:
        """See `Source`."""
        return self._read(self.manifest["blocks"][index], index)

    def _read(self, entry: dict[str, Any], index: int | None) -> Params:
        if self._shards is None:
            folder = "outer" if index is None else f"blocks/{index:03d}"
            return _load_params(self.path, entry, folder, self._dtype, self.placement)
        arrays = self._shards.read(index, entry["arrays"])
        placed = {name: self.placement.channels(value) for name, value in arrays.items()}
        return stored_params(entry["packed"], placed, self._dtype)


def load(path: str | Path, dtype: jnp.dtype | None = None, mesh: Mesh | None = None) -> Decoder:
    """Loads a checkpoint, dense or packed; arguments and errors are those of :class:`CheckpointSource`.

    ``slim_jax.load("out/q2")``, ``slim_jax.load("owner/model")``.
    """
    source = CheckpointSource(path, dtype, mesh)
    return read_decoder(source, source.placement.mesh)


def inspect(path: str | Path) -> dict[str, Any]:
    """Sizes and bits of a checkpoint, local or on the hub, from its manifest alone.

    Returns:
      ``parameters``, ``bytes`` of all arrays, ``packed_bytes`` and ``bits_per_weight`` of the packed
      layers of the blocks (None where there are none), ``quantization``, and a row per packed layer of the
      blocks in ``layers``, for embedding and head in ``ends``: ``name``, ``shape``, ``group_size``, ``bits``
      (groups of each width), ``bits_per_weight``, ``error``, ``mixed``, ``rise``; in ``skipped`` the names of
      linear layers of the blocks that are not packed beside such that are.

    Raises:
      CheckpointError: see :func:`read_manifest`; or the hub does not give it.
    """
    return summary(read_manifest(find(path, JSON_FILES)))


def save_source(source: Source, path: str | Path, on_block: Callable[[int, int], None] | None = None) -> None:
    """Writes any source as a checkpoint, one block in memory at a time.

    Raises:
      CheckpointError: ``path`` exists and is not an empty folder.
      ValueError: a dense parameter is not finite.
    """
    _save(FiniteSource(source), path, None, on_block)


def save(decoder: Decoder, path: str | Path, report: Report | None = None) -> None:
    """Writes a decoder, dense or packed, and the report of its quantization.

    Raises:
      CheckpointError: ``path`` exists and is not an empty folder.
    """
    _save(DecoderSource(decoder), path, report, None)


def _save(
    source: Source, path: str | Path, report: Report | None, on_block: Callable[[int, int], None] | None
) -> None:
    writer, total = CheckpointWriter(Path(path), source.config, source.origin, None), source.config.num_layers
    writer.write_outer(source.outer(), () if report is None else report.ends)
    for index in range(total):
        writer.write_block(source.block(index), None if report is None else report.blocks[index])
        if on_block is not None:
            on_block(index + 1, total)
    writer.finish()
