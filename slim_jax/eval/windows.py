"""Windows of a tokenized text, for calibration or evaluation."""

import math

import numpy as np
from jaxtyping import Int32


def draw_windows(
    tokens: np.ndarray, samples: int, length: int, seed: int
) -> Int32[np.ndarray, "samples length"]:
    """Draws windows at random places of a text ``int[T]``; equal seeds give equal windows.

    Windows do not overlap as long as the text has enough of them: it is cut into windows from a random place
    on, and from another place if these are too few.

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
    """Returns windows ``[W, window]`` of a text without the remainder, or at most ``max_windows`` of them.

    These are then every ``ceil(total / max_windows)``-th of the ``total`` windows.

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
