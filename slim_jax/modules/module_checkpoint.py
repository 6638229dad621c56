"""Keeps the quantized layers of a module in a folder, from which an interrupted run is resumed."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from safetensors import SafetensorError, safe_open
from safetensors.flax import save

from pallas_kernels import MixedTensor
from slim_jax.modules.capture import digest
from slim_jax.report import LayerReport
from slim_jax.store.files import replacing, write_json
from slim_jax.store.manifest import CheckpointError, PackedLayer, stored_arrays, stored_params
from slim_jax.store.records import from_json

RUN = "run.json"

Finished = dict[str, tuple[MixedTensor, LayerReport]]
"""Packed weight and report of each layer, by its path."""


class Kept:
    """Folder with a file for every finished stage.

    Args:
      folder: a new or empty folder, or that of an earlier run with the same settings.
      settings: values that the runs must share, as JSON values.

    Raises:
      CheckpointError: the folder holds something else, or a run with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, file = folder, folder / RUN
        wanted = json.loads(json.dumps(settings))
        if not file.is_file():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise CheckpointError(f"{folder} has no {RUN}, expected a new folder or one of the same run")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, wanted)
            return
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise CheckpointError(f"{file} is not valid JSON: {error}") from None
        differ = sorted(
            name for name in wanted if not isinstance(found, dict) or found.get(name) != wanted[name]
        )
        if differ:
            raise CheckpointError(f"{folder} is of a run with other {' and '.join(differ)}")

    def _file(self, stage: int) -> Path:
        return self.folder / f"stage-{stage:04d}.safetensors"

    def read(self, stage: int) -> Finished | None:
        """Reads the layers of a stage; None if it is not finished.

        Raises:
          CheckpointError: the stage's file is damaged.
        """
        file = self._file(stage)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="flax") as stored:
                said = stored.metadata()
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            packed = from_json(dict[str, PackedLayer], json.loads(said["packed"]), "packed")
            tensors = stored_params(packed, arrays)
            reports = from_json(list[LayerReport], json.loads(said["reports"]), "reports")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged, remove it to do its stage again: {error}") from None
        return {report.name: (tensors[report.name], report) for report in reports}

    def write(self, stage: int, finished: Finished) -> None:
        """Writes the layers of a finished stage."""
        arrays, packed = stored_arrays({path: tensor for path, (tensor, _) in finished.items()})
        reports = [dataclasses.asdict(report) for _, report in finished.values()]
        told = {path: dataclasses.asdict(static) for path, static in packed.items()}
        said = {"packed": json.dumps(told), "reports": json.dumps(reports)}
        with replacing(self._file(stage), "wb") as target:
            target.write(save(arrays, said))


def digest_of(values: Sequence[Any]) -> str:
    """Returns a SHA-256 of all arrays in trees."""
    return hashlib.sha256(b"".join(map(digest, jax.tree.leaves(values)))).hexdigest()
