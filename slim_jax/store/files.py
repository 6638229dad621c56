"""Atomic file writes (a reader sees the old file or the new one), and folders locked by their one writer."""

import contextlib
import hashlib
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
"""File in a folder that is being written, which names the writing process. The file's lock ends with that
process, however it ends."""


class CheckpointError(ValueError):
    """Raised for a checkpoint that cannot be read, or a folder that must not be written to."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to a folder; in a run of several, the first process takes the lock.

    A missing folder is made, and removed again if it is left empty. On a file system without locks, nothing
    is locked.

    Raises:
      CheckpointError: another process has the lock; the message names that process.
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
        with contextlib.suppress(OSError):  # the first folder that is not empty stays, and those above it
            for path in made:
                path.rmdir()


def _hold(folder: Path) -> int:
    """Locks the folder; returns a descriptor of its lock file. The lock is held until this is closed."""
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
            pass  # its previous owner has just removed it: try again
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
    """Checks that no process is writing to a folder; removes the lock file that a killed process has left.

    Raises:
      CheckpointError: as for :func:`locked`.
    """
    if (folder / LOCK).exists():
        with locked(folder):
            pass


def require_empty(folder: Path, hint: str = "", ours: Collection[str] = ()) -> None:
    """Checks that a folder is missing or empty, so that it can be written to as a new one.

    Args:
      folder: the folder, or a link to one.
      hint: the end of the error message.
      ours: names in the folder that are ignored.

    Raises:
      CheckpointError: the folder is not empty, or is not a folder.
    """
    free = folder.is_dir() and all(path.name in {LOCK, *ours} for path in folder.iterdir())
    if os.path.lexists(folder) and not free:
        raise CheckpointError(f"{folder} exists and is not an empty directory{hint}")


def remove(*paths: Path) -> None:
    """Removes files, and folders with their contents."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(*paths: Path) -> None:
    """Returns once these files, and the names in these folders, are on the disk."""
    for path in paths:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # not everywhere
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def replacing(file: Path, mode: str) -> Iterator[IO[Any]]:
    """Yields a temporary file that replaces ``file`` at the end."""
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
    """Writes a JSON file. If there are several processes, the first one writes."""
    if jax.process_index() != 0:
        return
    with replacing(file, "w") as target:
        json.dump(value, target, indent=1, allow_nan=False)


def json_digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an ``.npz`` file and makes its folder. If there are several processes, the first one writes."""
    if jax.process_index() != 0:
        return
    file.parent.mkdir(exist_ok=True)
    with replacing(file, "wb") as target:
        np.savez(target, **arrays)  # type: ignore[arg-type]
