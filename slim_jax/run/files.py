"""Files that are written whole, then renamed: a reader sees the old one or the new one."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np


@contextlib.contextmanager
def replacing(file: Path, mode: str) -> Iterator[IO[Any]]:
    """What is written takes the file's place at the end."""
    temporary = file.with_suffix(".tmp")
    with temporary.open(mode) as target:
        yield target
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(file)


def write_json(file: Path, value: Any) -> None:
    """A JSON file. Of several processes the first one writes."""
    if jax.process_index() != 0:
        return
    with replacing(file, "w") as target:
        json.dump(value, target, indent=1)


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An ``.npz`` file, in a folder that is made for it. Of several processes the first one writes."""
    if jax.process_index() != 0:
        return
    file.parent.mkdir(exist_ok=True)
    with replacing(file, "wb") as target:
        np.savez(target, **arrays)  # type: ignore[arg-type]
