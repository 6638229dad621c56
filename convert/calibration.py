"""Calibration windows: from files, from text that the model writes, or from a built-in mixture.

A model that was quantized to two bits forgets what its calibration text did not show. The mixture needs no
file and no network and covers much: text that the model writes, articles, fiction, a manual, programs and
many languages (`convert/texts/README.md`).
"""

import hashlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from slim_jax.eval.windows import draw_windows

SELF, MIX = "self", "mix"

SHARES = {SELF: 0.3, "articles": 0.18, "fiction": 0.07, "manual": 0.09, "code": 0.11, "languages": 0.25}
"""Each part's share of the mixture's windows."""

WriteText = Callable[[int, int, int], np.ndarray]
"""``write(samples, length, seed)`` returns tokens that the model writes, ``int32[samples, length]``."""


class Part(NamedTuple):
    """One part of the calibration.

    Attributes:
      name: "self", one of the texts of the mixture, or a file's path.
      share: this part's share of the windows, relative to the sum of all shares.
      text: the text that the windows are cut from; None where the model writes them.
    """

    name: str
    share: float
    text: str | None


def parts(given: Sequence[str]) -> list[Part]:
    """Parses `--calibration`: ``mix``, ``self`` or files, each with an optional share after a colon.

    Raises:
      ValueError: a share is not a positive number, or a file is not UTF-8 text.
      OSError: a file cannot be read.
    """
    found = []
    for item in given or [MIX]:
        name, share = _share(item)
        if name == MIX:
            found += [Part(part, share * size, _shipped(part)) for part, size in SHARES.items()]
        else:
            found.append(Part(name, share, None if name == SELF else read_text(Path(name))))
    return found


def _share(item: str) -> tuple[str, float]:
    name, colon, tail = item.rpartition(":")
    try:
        share = float(tail)
    except ValueError:
        return item, 1.0  # the colon belongs to the path
    if not colon:
        return item, 1.0
    if not 0 < share < float("inf"):
        raise ValueError(f"--calibration {item}: the share is {tail}, expected a positive number")
    return name, share


def _shipped(name: str) -> str | None:
    if name == SELF:
        return None
    return (resources.files("convert") / "texts" / f"{name}.txt").read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    """Returns a file's text.

    Raises:
      ValueError: it is not UTF-8.
      OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def counts(given: Sequence[Part], samples: int) -> list[int]:
    """Number of the ``samples`` windows that each part gives, as near to its share as whole numbers allow."""
    exact = np.asarray([part.share for part in given]) * samples / sum(part.share for part in given)
    whole = np.floor(exact).astype(int)
    for index in np.argsort(whole - exact, kind="stable")[: samples - whole.sum()]:
        whole[index] += 1
    return whole.tolist()


def written(given: Sequence[Part], samples: int) -> int:
    """Number of the ``samples`` windows that the model writes."""
    return sum(count for part, count in zip(given, counts(given, samples)) if part.text is None)


def recipe(given: Sequence[Part], *numbers: int) -> list[Any]:
    """Everything that determines what :func:`draw` returns, as JSON values; texts by their SHA-256."""
    texts = [None if p.text is None else hashlib.sha256(p.text.encode()).hexdigest() for p in given]
    return [*zip(texts, (part.share for part in given)), *numbers]


def draw(
    given: Sequence[Part],
    encode: Callable[[str], Any] | None,
    write: WriteText,
    samples: int,
    length: int,
    seed: int,
) -> Int32[np.ndarray, "samples length"]:
    """Returns the windows of all parts, shuffled by ``seed``; a single part's windows keep their order.

    Args:
      given: see :func:`parts`.
      encode: maps a text to its tokens; None where there is no tokenizer.
      write: returns windows that the model writes.
      samples: number of windows.
      length: tokens per window.
      seed: the same seed gives the same windows.

    Raises:
      ValueError: a part is text but there is no tokenizer, or a text is shorter than one window.
    """
    windows = []
    for index, (part, count) in enumerate(zip(given, counts(given, samples))):
        if not count:
            continue
        if part.text is None:
            windows.append(np.asarray(write(count, length, seed), np.int32))
            continue
        if encode is None:
            raise ValueError(f"{part.name} needs the model's tokenizer, and it has none: try self")
        tokens = np.asarray(encode(part.text), np.int32)
        if part.name in SHARES and len(tokens) < length:  # a short text is repeated to fill a long window
            tokens = np.resize(tokens, length)
        if len(tokens) < length:
            raise ValueError(f"{part.name} has {len(tokens)} tokens, expected at least {length} (--length)")
        windows.append(draw_windows(tokens, count, length, seed + index))
    if len(windows) == 1:
        return windows[0]
    return np.concatenate(windows)[np.random.default_rng(seed).permutation(samples)]
