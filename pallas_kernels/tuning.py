"""Configurations that were measured on a device: ``tuned.json``, filled by ``python -m bench.tune``.

What is not in the table is decided by the kernel's heuristic.
"""

import functools
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("tuned.json")


def row_bucket(m: int) -> int:
    """Numbers of rows that share a configuration: the next power of two."""
    return 1 << (m - 1).bit_length()


def key(device_kind: str, m: int, k: int, n: int) -> str:
    """The key of a product ``[m, k] @ [k, n]`` in a kernel's part of the table."""
    return f"{device_kind}/{row_bucket(m)}x{k}x{n}"


@functools.cache
def read_table() -> dict[str, dict[str, dict[str, Any]]]:
    """Kernel -> :func:`key` -> fields of its ``Config``."""
    return json.loads(TABLE.read_text())


def tuned(kernel: str, device_kind: str, m: int, k: int, n: int) -> dict[str, Any] | None:
    """The fields of the best ``Config`` that was measured, or None if nothing was."""
    return read_table().get(kernel, {}).get(key(device_kind, m, k, n)) if m else None
