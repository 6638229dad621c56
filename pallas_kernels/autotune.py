"""Kernel configurations that ``python -m bench.tune`` measured on a device.

They are in two files: ``tuned.json`` next to this module, which is never written, and the user's
(:func:`user_table`), whose entries win. The kernel's heuristic decides for all others.
"""

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any

PACKAGED = Path(__file__).with_name("tuned.json")

Table = dict[str, dict[str, dict[str, Any]]]
"""Kernel -> :func:`key` -> fields of its ``Config``."""


def user_table() -> Path:
    """Path of the user's file: in ``$SLIM_JAX_CACHE``, else in ``slim-jax`` in the cache folder (XDG)."""
    folder = os.environ.get("SLIM_JAX_CACHE")
    if not folder:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(cache, "slim-jax")
    return Path(folder) / "tuned.json"


def row_bucket(m: int) -> int:
    """Bucket of row counts that share a configuration: the next power of two."""
    return 1 << (m - 1).bit_length()


def key(device_kind: str, m: int, k: int, n: int, bits: float, group_size: int) -> str:
    """Key of a product ``[m, k] @ [k, n]`` in a kernel's part of the table.

    The mean width is rounded to a whole number, because a search over a whole model gives each layer its own.
    """
    return f"{device_kind}/{row_bucket(m)}x{k}x{n}/{round(bits)}bit-g{group_size}"


def read_table(path: Path) -> Table:
    """Reads the entries of a file; none if there is no such file.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}), expected a table that bench.tune wrote") from None
    entries = content.values() if isinstance(content, dict) else [None]
    if not all(isinstance(of_kernel, dict) for of_kernel in entries):
        raise ValueError(f"{path} is not a table that bench.tune wrote: expected kernel -> product -> fields")
    return content


@functools.cache
def _tables(*paths: Path) -> tuple[Table, ...]:
    """Reads the tables of all files that can be read; a broken one raises a warning, not an error."""
    tables = []
    for path in paths:
        try:
            tables.append(read_table(path))
        except (OSError, ValueError) as error:
            warnings.warn(f"tuned configurations are ignored: {error}", stacklevel=3)
    return tuple(tables)


def forget() -> None:
    """Makes the next traced product read the files again."""
    _tables.cache_clear()


def tuned[C](
    kernel: str, config: type[C], device_kind: str, m: int, k: int, n: int, bits: float, group_size: int
) -> C | None:
    """The best measured ``config``, or None if there is none with the fields of this version."""
    if m == 0:
        return None
    name = key(device_kind, m, k, n, bits, group_size)
    for table in _tables(user_table(), PACKAGED):
        fields = table.get(kernel, {}).get(name)
        if fields is not None:
            try:
                return config(**fields)
            except (TypeError, ValueError) as error:
                warnings.warn(f"a tuned configuration is ignored, {kernel} {name}: {error}", stacklevel=2)
    return None
