"""Calibration activations in files, for those that do not fit in memory."""

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


class OnDisk:
    """A list of arrays of which each is in a file; the files go with it.

    Args:
      arrays: what it holds at first; taken one by one.
      folder: where the files go, in a folder of their own.
    """

    def __init__(self, arrays: Iterable[jax.Array], folder: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._kinds: list[tuple[np.dtype, tuple[int, ...]]] = []
        for array in arrays:
            self._kinds.append((np.dtype(array.dtype), array.shape))
            self[len(self) - 1] = array

    def __len__(self) -> int:
        return len(self._kinds)

    def __getitem__(self, index: int) -> jax.Array:
        dtype, shape = self._kinds[index]
        return jnp.asarray(np.fromfile(self._file(index), dtype).reshape(shape))

    def __setitem__(self, index: int, array: jax.Array) -> None:
        np.asarray(array).tofile(self._file(index))
        self._kinds[index] = (np.dtype(array.dtype), array.shape)

    def __iter__(self) -> Iterator[jax.Array]:
        return (self[index] for index in range(len(self)))

    def _file(self, index: int) -> Path:
        return self._folder / f"{index:06}"


Batches = list[jax.Array] | OnDisk
"""Activations ``[B, T, K]`` of all batches."""
