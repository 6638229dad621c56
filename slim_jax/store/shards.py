"""Names, verifies and reads the arrays of a checkpoint in safetensors files.

    out/slim.json          as in an Orbax checkpoint; ``files`` has the digests of the shards
    out/model.safetensors  or model-00001-of-00002.safetensors …
    out/tokenizer.json     and the other files of a Hugging Face model, for the hub and its users

Such a folder is for sharing and loading. `convert.writers.packed` writes it; no run writes to one.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from slim_jax.store.manifest import MANIFEST, CheckpointError


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: str) -> None:
    """Compares a file with the digest in the manifest.

    Raises:
      CheckpointError: the file is missing, or its digest differs.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, though {MANIFEST} lists it")
    if digest(path) != expected:
        raise CheckpointError(f"{path} is damaged: its content is not what {MANIFEST} vouches for")


def array_name(index: int | None, name: str) -> str:
    """Name in the files of array ``name`` of block ``index``; None stands for outside the blocks."""
    return name if index is None else f"blocks.{index}.{name}"


class Shards:
    """The safetensors files of a checkpoint. Each is verified before the first array is read from it.

    Args:
      folder: the checkpoint's folder.
      digests: the manifest's ``files``: SHA-256 by file name.

    Raises:
      CheckpointError: a file is missing, truncated, not a safetensors file, or not in the folder itself.
    """

    def __init__(self, folder: Path, digests: dict[str, str]) -> None:
        self._digests = {folder / name: value for name, value in digests.items()}
        self._verified: set[Path] = set()
        self._places: dict[str, Path] = {}
        for path in self._digests:
            if path.parent != folder:
                raise CheckpointError(f"{folder / MANIFEST} names {path}, expected a file in that folder")
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, though {MANIFEST} lists it")
            try:
                with safe_open(path, framework="numpy") as file:
                    self._places |= dict.fromkeys(file.keys(), path)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from None

    def read(
        self, index: int | None, arrays: Mapping[str, tuple[tuple[int, ...], str]]
    ) -> dict[str, np.ndarray]:
        """Reads the arrays of one entry of the manifest.

        Args:
          index: index of the block, or None for the parameters outside the blocks.
          arrays: the entry's ``arrays``: shape and dtype by name.

        Raises:
          CheckpointError: a file is damaged, or its arrays are not as the manifest lists them.
        """
        places = {name: self._place(array_name(index, name)) for name in arrays}
        found: dict[str, np.ndarray] = {}
        for path in dict.fromkeys(places.values()):
            if path not in self._verified:
                verify(path, self._digests[path])
                self._verified.add(path)
            with safe_open(path, framework="numpy") as file:  # opening parses the whole header
                here = [name for name, place in places.items() if place == path]
                found |= {name: file.get_tensor(array_name(index, name)) for name in here}
        for name, (shape, kind) in arrays.items():
            value = found[name]
            if value.shape != shape or value.dtype != jnp.dtype(kind):
                is_now, stored = f"{value.dtype}{list(value.shape)}", array_name(index, name)
                raise CheckpointError(
                    f"{places[name]}: {stored} is {is_now}, {MANIFEST} lists {kind}{list(shape)}"
                )
        return found

    def _place(self, stored: str) -> Path:
        if stored not in self._places:
            raise CheckpointError(f"no file has {stored}, though {MANIFEST} lists it")
        return self._places[stored]
