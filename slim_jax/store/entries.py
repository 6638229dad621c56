"""Entries of the manifest on disk: Orbax folders, one per block, written, verified and read."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from slim_jax.model.params import Params
from slim_jax.placement import Placement
from slim_jax.store.files import remove, sync
from slim_jax.store.manifest import MANIFEST, CheckpointError, Entry, listed, stored_arrays, stored_params
from slim_jax.store.shards import digest, verify


def barrier(name: str) -> None:
    """Every process of a distributed run waits here for all others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _remove(folder: Path) -> None:
    """Removes what was written, or half written, of an Orbax folder."""
    remove(folder, *folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*"))


def save_params(folder: Path, params: Params, placement: Placement) -> dict[str, Any]:
    """Writes one Orbax folder; the fields of its `slim_jax.store.manifest.Entry`.

    Of several processes each writes what its devices have.

    Raises:
      CheckpointError: it cannot be written.
    """
    arrays, packed = stored_arrays(params)
    arrays |= {name: placement.channels(arrays[name]) for name in arrays.keys() & params.keys()}
    if jax.process_index() == 0:
        _remove(folder)  # of a run that died between this folder and its manifest
    barrier(f"{folder} is free")
    try:
        ocp.save(folder.absolute(), arrays)
    except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors
        _remove(folder)  # Orbax's threads may still write: what they leave goes with the next attempt
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder} cannot be written: {reason}") from error
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sync(*folder.rglob("*"), folder, folder.parent, folder.parent.parent)  # before the manifest names them
    return {
        "arrays": listed(arrays),
        "packed": packed,
        "files": {str(path.relative_to(folder)): digest(path) for path in files},
    }


def verify_entry(path: Path, entry: Entry, folder_name: str) -> Path:
    """Compares every file of an entry with its digest; returns the folder that they are in.

    Raises:
      CheckpointError: one is missing or damaged.
    """
    folder = path / (entry.folder or folder_name)
    if not entry.files:
        raise CheckpointError(f"{folder} cannot be verified: {MANIFEST} lists no files of it")
    for name, expected in entry.files.items():
        verify(folder / name, expected)
    return folder


def load_params(
    path: Path, entry: Entry, folder_name: str, dtype: jnp.dtype | None, placement: Placement
) -> dict[str, Any]:
    """Reads what :func:`save_params` wrote, verified."""
    folder = verify_entry(path, entry, folder_name)
    abstract = {
        name: placement.abstract(shape, jnp.dtype(kind)) for name, (shape, kind) in entry.arrays.items()
    }
    return stored_params(entry.packed, dict(ocp.load(folder.absolute(), abstract)), dtype)
