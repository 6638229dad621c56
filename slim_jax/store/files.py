"""Files that are written whole, then renamed: a reader sees the old or the new one. Folders of one writer."""

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""In a folder that is being written: which process does. Its lock goes with that process, however it ends."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or a folder that must not be written to."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to a folder. Of several processes of one run the first one does.

    The folder is made where it is missing, and goes again where it was left empty. On a file system that
    has no locks nothing is locked.

    Raises:
      CheckpointError: another process has it; the message names that process.
      OSError: the folder cannot be made, or cannot be written to.
    """
    if jax.process_index() != 0:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = None if fcntl is None else _hold(folder)
        try:
            yield
        finally:
            if descriptor is not None:
                (folder / LOCK).unlink(missing_ok=True)
                os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):  # the first that holds something stays, and those above it
            for path in made:
                path.rmdir()


def _hold(folder: Path) -> int:
    """A descriptor of the folder's lock file; the lock is held until it is closed."""
    while True:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _try_lock(folder, descriptor)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                here = f"process {os.getpid()} on {socket.gethostname()}"
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"{here} since {time.strftime('%Y-%m-%d %H:%M')}".encode(), 0)
                return descriptor
        except FileNotFoundError:
            pass  # who had it has just removed it: once more
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(folder: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
        raise CheckpointError(f"{folder} is being written by {holder}: wait, or stop it") from None
    except OSError:
        pass  # no locks on this file system


def refuse_if_locked(folder: Path) -> None:
    """Asks whether somebody writes to a folder; what a killed process has left of a lock is removed.

    Raises:
      CheckpointError: as :func:`locked`.
    """
    if (folder / LOCK).exists():
        with locked(folder):
            pass


def require_empty(folder: Path, hint: str = "", ours: Collection[str] = ()) -> None:
    """Asks whether a folder can be written to as a new one: it is missing or empty.

    Args:
      folder: or a link to one.
      hint: what the message is to end with.
      ours: names in the folder that count for nothing.

    Raises:
      CheckpointError: it holds something, or is no folder.
    """
    free = folder.is_dir() and all(path.name in {LOCK, *ours} for path in folder.iterdir())
    if os.path.lexists(folder) and not free:
        raise CheckpointError(f"{folder} exists and is not an empty directory{hint}")


def remove(*paths: Path) -> None:
    """Removes files, and folders with what is in them."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(*paths: Path) -> None:
    """Returns once these files, and the names in these folders, are on the disk."""
    for path in paths:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # some cannot
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def replacing(file: Path, mode: str) -> Iterator[IO[Any]]:
    """What is written takes the file's place at the end."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open(mode) as target:
            yield target
            target.flush()
            os.fsync(target.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    sync(file.parent)


def write_json(file: Path, value: Any) -> None:
    """A JSON file. Of several processes the first one writes."""
    if jax.process_index() != 0:
        return
    with replacing(file, "w") as target:
        json.dump(value, target, indent=1, allow_nan=False)


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An ``.npz`` file, in a folder that is made for it. Of several processes the first one writes."""
    if jax.process_index() != 0:
        return
    file.parent.mkdir(exist_ok=True)
    with replacing(file, "wb") as target:
        np.savez(target, **arrays)  # type: ignore[arg-type]
