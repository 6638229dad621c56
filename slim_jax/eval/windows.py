"""Cutting a tokenized text into windows, to calibrate on or to measure."""

import math

import numpy as np
from jaxtyping import Int32


def draw_windows(
    tokens: np.ndarray, samples: int, length: int, seed: int
) -> Int32[np.ndarray, "samples length"]:
    """Windows at random places of a text ``int[T]``; equal seeds give equal windows.

    None overlap as long as the text has others: it is cut into windows from a random place on, and from
    another where these are not enough.

    Raises:
      ValueError: the text is shorter than one window.
    """
    if len(tokens) < length:
        raise ValueError(f"the text has {len(tokens)} tokens, expected at least one window of {length}")
    rng, last = np.random.default_rng(seed), len(tokens) - length
    starts: list[int] = []
    while len(starts) < samples:
        first = rng.integers(0, min(length - 1, last), endpoint=True)
        starts.extend(rng.permutation(np.arange(first, last + 1, length)))
    return np.asarray(tokens, np.int32)[np.asarray(starts[:samples])[:, None] + np.arange(length)]


def select_windows(tokens: np.ndarray, window: int, max_windows: int | None = None) -> np.ndarray:
    """Windows ``[W, window]`` of a text, the rest dropped; of ``total``, every ``ceil(total / max)``-th.

    Raises:
      ValueError: the text is shorter than one window, or a number is too small.
    """
    if window < 2 or (max_windows is not None and max_windows < 1):
        raise ValueError(f"window is {window} and max_windows {max_windows}, expected at least 2 and 1")
    total = len(tokens) // window
    if not total:
        raise ValueError(f"the text has {len(tokens)} tokens, expected at least one window of {window}")
    step = 1 if max_windows is None else math.ceil(total / max_windows)
    return np.asarray(tokens[: total * window]).reshape(total, window)[::step]
