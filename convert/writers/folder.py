"""Folders that are written completely or not at all, and the safetensors shards in them."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from convert.errors import ConvertError, first_line
from convert.readers.hf import INDEX, SINGLE
from slim_jax.store.files import locked, refuse_if_locked, remove, require_empty, sync

SHARD_BYTES = 2 << 30


PARTIAL = ".writing"
"""Subfolder of the target that holds an unfinished export, running or killed."""


def require_new(out: Path) -> None:
    """Checks that a folder can be exported to: it is missing, empty, or holds only a killed export.

    Raises:
      CheckpointError: the folder holds something else, or another process writes there.
    """
    refuse_if_locked(out)
    require_empty(out, ours=(PARTIAL,))


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder to write to; its contents move to ``out`` at the end, or are deleted on failure.

    The folder lies inside ``out``, which may be a link, a mount point or the working directory.

    Raises:
      CheckpointError: ``out`` is not empty, or another process writes there.
      ConvertError: nothing can be written there.
    """
    partial, moved = out / PARTIAL, list[Path]()
    try:
        with locked(out):
            require_empty(out, ours=(PARTIAL,))
            try:
                remove(partial)
                partial.mkdir()
                yield partial
                sync(*partial.rglob("*"))
                for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".json"):  # JSON last
                    moved.append(out / path.name)
                    path.rename(moved[-1])
                moved.clear()
            finally:
                remove(partial, *moved)
    except OSError as error:
        raise ConvertError(f"{out} cannot be written: {first_line(error)}") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an indented JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tensors(
    tensors: Iterator[tuple[str, np.ndarray]], directory: Path, shard_bytes: int = SHARD_BYTES
) -> dict[str, int]:
    """Writes one safetensors file, or shards and their index; one shard is in memory at a time.

    Args:
      tensors: names and values, each contiguous in memory as it is to be stored.
      directory: the directory to write to.
      shard_bytes: largest size of a shard, unless one tensor alone is larger.

    Returns:
      Number of bytes of each dtype.
    """
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}

    def flush() -> None:
        part = directory / f"{len(shards)}.part"
        part.touch()
        mode = part.stat().st_mode
        save_file(pending, part, metadata={"format": "pt"})
        part.chmod(mode & 0o777)  # save_file makes its files readable by their owner only
        shards.append(list(pending))
        pending.clear()

    total = pending_bytes = 0
    for name, value in tensors:
        if pending and pending_bytes + value.nbytes > shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = value
        pending_bytes, total = pending_bytes + value.nbytes, total + value.nbytes
        sizes[value.dtype.name] = sizes.get(value.dtype.name, 0) + value.nbytes
    flush()
    if len(shards) == 1:
        (directory / "0.part").rename(directory / SINGLE)
        return sizes
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        (directory / f"{i}.part").rename(directory / file)
    weight_map = {name: file for file, names in zip(files, shards) for name in names}
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return sizes
