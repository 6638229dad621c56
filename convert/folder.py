"""Folders that appear whole or not at all, and the shards of safetensors in them."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from convert.errors import ConvertError, first_line
from convert.hf import INDEX, SINGLE

SHARD_BYTES = 2 << 30


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write to; it takes that name at the end, and goes where something fails.

    Raises:
      ConvertError: ``out`` holds something, or nothing can be written there.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConvertError(f"{out} exists and is not an empty directory")
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield temporary
        temporary.chmod(0o755)  # mkdtemp and save_file keep theirs to the owner
        for file in temporary.iterdir():
            file.chmod(0o644)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise ConvertError(f"{out} cannot be written: {first_line(error)}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file as people read it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tensors(
    tensors: Iterator[tuple[str, np.ndarray]], directory: Path, shard_bytes: int = SHARD_BYTES
) -> dict[str, int]:
    """Writes one safetensors file, or shards of about a size and their index; one shard is in memory.

    Args:
      tensors: names and values, which must lie in memory as they are to be stored.
      directory: where.
      shard_bytes: a shard has no more, but for a tensor that is larger.

    Returns:
      Bytes of each dtype.
    """
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}

    def flush() -> None:
        save_file(pending, directory / f"{len(shards)}.part", metadata={"format": "pt"})
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
