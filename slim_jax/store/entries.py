"""Writes, verifies and reads the entries of the manifest on disk: Orbax folders, one per block."""

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
    """Waits until every process of a distributed run has arrived here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _remove(folder: Path) -> None:
    """Removes an Orbax folder, and the temporary ones that an unfinished write has left."""
    remove(folder, *folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*"))


def save_params(folder: Path, params: Params, placement: Placement) -> dict[str, Any]:
    """Writes one Orbax folder; returns the fields of its `slim_jax.store.manifest.Entry`.

    If there are several processes, each writes the data on its own chips.

    Raises:
      CheckpointError: the folder cannot be written.
    """
    arrays, packed = stored_arrays(params)
    arrays |= {name: placement.channels(arrays[name]) for name in arrays.keys() & params.keys()}
    if jax.process_index() == 0:
        _remove(folder)  # left by a run that died before the manifest named it
    barrier(f"{folder} is free")
    try:
        ocp.save(folder.absolute(), arrays)
    except (OSError, ValueError) as error:  # TensorStore's errors are ValueErrors
        _remove(folder)  # Orbax's threads may still write: the next attempt removes what they leave
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
    """Compares every file of an entry with its digest; returns the folder of the files.

    Raises:
      CheckpointError: a file is missing or damaged, or the entry lists none.
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
    """Verifies and reads what :func:`save_params` wrote."""
    folder = verify_entry(path, entry, folder_name)
    abstract = {
        name: placement.abstract(shape, jnp.dtype(kind)) for name, (shape, kind) in entry.arrays.items()
    }
    return stored_params(entry.packed, dict(ocp.load(folder.absolute(), abstract)), dtype)
