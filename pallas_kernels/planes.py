"""Planes: the layout of one group's codes in 32-bit words.

A ``b``-bit code is the sum of planes of 4, 2 and 1 bits, low bits first (``3 = 2 + 1``:
``code = plane2 + 4 * plane1``). A plane of width ``n`` of one group is ``uint32[g * n / 32, N]`` and
*planar*: slot ``s`` (bits ``n*s .. n*s + n``) of word row ``j`` holds channel ``s * (g * n / 32) + j`` of the
group, so that one shift and mask of a tile of words gives consecutive channels.
"""

import jax
import jax.numpy as jnp
import numpy as np

WORD_BITS = 32
MAX_BITS = 8


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a ``bits``-bit code, low bits first: 3 -> (2, 1), 8 -> (4, 4).

    Raises:
      ValueError: ``bits`` is not in 1..8.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}, expected 1 to {MAX_BITS}")
    widths = [4] * (bits // 4)
    return (*widths, *(n for n in (2, 1) if bits % 4 & n))


def shifted_planes(bits: int) -> list[tuple[int, int]]:
    """Planes of a code, ``(width, shift)``: 7 -> [(4, 0), (2, 4), (1, 6)]."""
    widths = plane_widths(bits)
    return [(n, sum(widths[:i])) for i, n in enumerate(widths)]


def pieces(bits: int) -> list[list[tuple[int, int]]]:
    """:func:`shifted_planes`, grouped into pieces of up to 4 bits: 7 -> [[(4, 0)], [(2, 4), (1, 6)]]."""
    return [found for low in (0, 4) if (found := [p for p in shifted_planes(bits) if p[1] // 4 * 4 == low])]


def pack_plane(codes: np.ndarray, bits: int, word: type = np.uint32) -> np.ndarray:
    """Packs codes ``[R * s, N]`` of 1, 2, 4 or 8 bits into planar words ``[R, N]`` with ``s`` slots each."""
    slots = np.dtype(word).itemsize * 8 // bits
    planar: np.ndarray = codes.reshape(slots, -1, codes.shape[-1]).astype(word)
    shifts: np.ndarray = (np.arange(slots) * bits).astype(word)[:, None, None]
    return np.bitwise_or.reduce(planar << shifts, axis=0)


def unpack_plane(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of :func:`pack_plane`: words ``[R, N]`` -> codes ``[R * s, N]`` of the words' dtype."""
    slots = words.dtype.itemsize * 8 // bits
    if slots == 1:
        return words
    mask = words.dtype.type((1 << bits) - 1)
    return jnp.concatenate([(words >> words.dtype.type(s * bits)) & mask for s in range(slots)], axis=0)


def pack_group(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs one group's codes ``[g, N]`` into its planes, ``uint32[g * bits / 32, N]``."""
    planes = [pack_plane((codes >> shift) & ((1 << n) - 1), n) for n, shift in shifted_planes(bits)]
    return np.concatenate(planes, axis=0)


def unpack_group(words: jax.Array, bits: int) -> jax.Array:
    """The inverse of :func:`pack_group`: ``uint32[g * bits / 32, N]`` -> codes ``uint32[g, N]``."""
    row, code = 0, None
    for n, shift in shifted_planes(bits):
        rows = words.shape[0] * n // bits
        plane = unpack_plane(words[row : row + rows], n) << np.uint32(shift)
        code = plane if code is None else code | plane
        row += rows
    assert code is not None
    return code
