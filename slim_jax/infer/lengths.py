"""Lengths that programs are compiled for: few, and not much longer than what is asked."""

import math

LENGTH_STEP = 128
"""Lengths are powers of two up to this, then multiples of it, rarer when long."""


def round_up(length: int) -> int:
    """Rounds ``length`` up to a size that is compiled for: by an eighth at most where it is long."""
    power = 1 << (length - 1).bit_length()
    if length <= LENGTH_STEP:
        return max(16, power)
    step = max(LENGTH_STEP, power // 16)
    return math.ceil(length / step) * step


def cache_sizes(length: int) -> list[int]:
    """Returns the sizes of the growing cache of a text: attention reads all slots, empty ones too."""
    return [*range(LENGTH_STEP, length, LENGTH_STEP), length]
