"""Cutting a tokenized text into windows, to calibrate on or to measure."""

import math

import numpy as np
from jaxtyping import Int32


def draw_windows(
    tokens: np.ndarray, samples: int, length: int, seed: int
) -> Int32[np.ndarray, "samples length"]:
    """Windows at random places of a text ``int[T]``, which may overlap; equal seeds give equal windows.

    Raises:
      ValueError: the text is shorter than one window.
    """
    if len(tokens) < length:
        raise ValueError(f"the text has {len(tokens)} tokens, expected at least one window of {length}")
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length + 1, samples)
    return np.asarray(tokens, np.int32)[starts[:, None] + np.arange(length)]


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
