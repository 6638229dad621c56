"""Calibration activations in files, for when they do not fit in memory."""

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np


class OnDisk:
    """List of arrays, each kept in a file; the files are deleted with the list.

    Args:
      arrays: the initial arrays; consumed one by one.
      folder: the files are written to a new folder in this one.
    """

    def __init__(self, arrays: Iterable[jax.Array], folder: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._kinds: list[jax.ShapeDtypeStruct] = []
        for array in arrays:
            self.append(array)

    def __len__(self) -> int:
        return len(self._kinds)

    def __getitem__(self, index: int) -> jax.Array:
        kind = self._kinds[index]
        local = np.fromfile(self._file(index), kind.dtype).reshape(-1, *kind.shape[1:])
        return jax.make_array_from_process_local_data(kind.sharding, local, kind.shape)

    def __setitem__(self, index: int, array: jax.Array) -> None:
        # With several processes, each keeps the samples on its own chips.
        pieces = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)]).tofile(self._file(index))
        self._kinds[index] = _kind(array)

    def append(self, array: jax.Array) -> None:
        """Appends an array."""
        self._kinds.append(_kind(array))
        self[len(self) - 1] = array

    def __iter__(self) -> Iterator[jax.Array]:
        return (self[index] for index in range(len(self)))

    def _file(self, index: int) -> Path:
        return self._folder / f"{index:06}"


def _kind(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


Batches = list[jax.Array] | OnDisk
"""Activations ``[B, T, K]`` of every batch."""
