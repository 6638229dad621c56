"""Configurations that were measured on a device, filled by ``python -m bench.tune``.

They stand in two files: ``tuned.json`` beside this module, which is never written, and the user's, in
:func:`user_table`, whose entries win. What is in neither is decided by the kernel's heuristic.
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
    """The user's file: in ``$SLIM_JAX_CACHE``, else in ``slim-jax`` of the cache folder (XDG)."""
    folder = os.environ.get("SLIM_JAX_CACHE")
    if not folder:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(cache, "slim-jax")
    return Path(folder) / "tuned.json"


def row_bucket(m: int) -> int:
    """Numbers of rows that share a configuration: the next power of two."""
    return 1 << (m - 1).bit_length()


def key(device_kind: str, m: int, k: int, n: int, bits: float, group_size: int) -> str:
    """The key of a product ``[m, k] @ [k, n]`` in a kernel's part of the table.

    Mean widths count as the nearest whole number: a search over a whole model gives each layer its own.
    """
    return f"{device_kind}/{row_bucket(m)}x{k}x{n}/{round(bits)}bit-g{group_size}"


def read_table(path: Path) -> Table:
    """The entries of a file, none if there is no such file.

    Raises:
      ValueError: it holds something else.
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
    """Those of the files that can be read: a broken cache must not stop a product."""
    tables = []
    for path in paths:
        try:
            tables.append(read_table(path))
        except (OSError, ValueError) as error:
            warnings.warn(f"tuned configurations are ignored: {error}", stacklevel=3)
    return tuple(tables)


def forget() -> None:
    """Reads the files anew before the next product is traced."""
    _tables.cache_clear()


def tuned[C](
    kernel: str, config: type[C], device_kind: str, m: int, k: int, n: int, bits: float, group_size: int
) -> C | None:
    """The best ``config`` that was measured, or None if nothing was, or not by this version's fields."""
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
