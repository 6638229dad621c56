"""Decoders of other libraries' quantized weights: stored arrays in, weights out as the files have them."""

import math

import ml_dtypes
import numpy as np

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of eight whose code AWQ stores in each four bits of a word, low bits first."""

ROWS = 1024
"""Rows of a weight that are dequantized at once."""


def scaled(
    value: np.ndarray,
    scale: np.ndarray,
    block: tuple[int, ...] | None = None,
    zero: np.ndarray | None = None,
) -> np.ndarray:
    """Returns ``(value - zero) * scale`` in float32.

    Args:
      value: codes ``[..., N, K]``.
      scale: a number, one per leading index, or ``[..., N', K']``, an entry per block of the last two axes.
      block: rows and columns of a block; by default ``N / N'`` and ``K / K'``, rounded up.
      zero: zero points, in the shape of ``scale``.
    """

    def spread(part: np.ndarray) -> np.ndarray:
        part = part.astype(np.float32)
        if part.size == 1:
            return part.reshape(())
        part = part.reshape(part.shape + (1,) * (value.ndim - part.ndim))
        for axis in (value.ndim - 2, value.ndim - 1):
            size, blocks = int(value.shape[axis]), int(part.shape[axis])
            if blocks not in (1, size):
                run = block[axis - value.ndim] if block else -(-size // blocks)
                part = np.repeat(part, run, axis).take(range(size), axis)
        return part

    result = value.astype(np.float32)
    if zero is not None:
        result -= spread(zero)
    result *= spread(scale)
    return result


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Decodes MXFP4.

    Args:
      blocks: two codes a byte, low bits first, ``uint8[..., R, G, 16]``.
      scales: exponents plus 127, ``uint8[..., R, G]``.

    Returns:
      ``bfloat16[..., 32 G, R]``, a view: exact, as a code has two significant bits.
    """
    *lead, rows, groups, half = blocks.shape
    result = np.empty((*lead, rows, groups, 2 * half), ml_dtypes.bfloat16)
    factor = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None]
    for at in np.ndindex(*lead):
        result[at][..., 0::2] = FP4[blocks[at] & 15] * factor[at]
        result[at][..., 1::2] = FP4[blocks[at] >> 4] * factor[at]
    return result.reshape(*lead, rows, groups * 2 * half).swapaxes(-1, -2)


def gptq(
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    index: np.ndarray | None = None,
    *,
    bits: int,
    size: int,
    offset: int,
) -> np.ndarray:
    """Decodes GPTQ; see `convert.writers.gptq` for the format.

    Args:
      qweight: codes, ``int32[K b / 32, N]``.
      qzeros: zero points less ``offset``, ``int32[G, N b / 32]``.
      scales: ``[G, N]``.
      index: the group of each input channel, ``int32[K]``; by default runs of ``size``.
      bits: width of the codes.
      size: input channels of a group; -1 for one group.
      offset: 1 in the first version of the format, 0 in the second.

    Returns:
      ``float32[N, K]``, a view.
    """
    codes = unpack_rows(qweight, bits)
    zeros = unpack_rows(np.ascontiguousarray(qzeros.T), bits).T.astype(np.float32) + offset
    return _grouped(codes, zeros, scales.astype(np.float32), index, size)


def awq(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, *, size: int) -> np.ndarray:
    """Decodes AWQ of 4 bits in the order of its "gemm" kernels.

    Args:
      qweight: codes, ``int32[K, N / 8]``.
      qzeros: zero points, ``int32[G, N / 8]``.
      scales: ``[G, N]``.
      size: input channels of a group; -1 for one group.

    Returns:
      ``float32[N, K]``, a view.
    """

    def unpack(words: np.ndarray) -> np.ndarray:
        codes = np.empty((*words.shape, 8), np.uint8)
        for i, column in enumerate(AWQ_ORDER):
            codes[..., column] = (words.view(np.uint32) >> np.uint32(4 * i)) & np.uint32(15)
        return codes.reshape(len(words), -1)

    return _grouped(unpack(qweight), unpack(qzeros).astype(np.float32), scales.astype(np.float32), None, size)


def pack_quantized(
    packed: np.ndarray,
    scale: np.ndarray,
    shape: np.ndarray,
    weight_zero_point: np.ndarray | None = None,
    weight_g_idx: np.ndarray | None = None,
    *,
    bits: int,
) -> np.ndarray:
    """Decodes the format "pack-quantized" of compressed-tensors.

    Args:
      packed: codes plus ``2**(bits - 1)``, ``int32[N, K b / 32]``, low bits first.
      scale: ``[N, G]``, ``[N, 1]`` or ``[1]``.
      shape: ``[N, K]``, as an array.
      weight_zero_point: like the codes, but packed down the rows, ``int32[N b / 32, G]``; or ``int8[N, G]``.
      weight_g_idx: the group of each input channel, ``int32[K]``.
      bits: width of the codes.

    Returns:
      ``float32[N, K]``.
    """
    rows, columns = (int(size) for size in shape)
    half = 1 << (bits - 1)
    codes = unpack_rows(np.ascontiguousarray(packed.T), bits)[:columns].T
    scales = scale.astype(np.float32).reshape(-1, scale.shape[-1] if scale.ndim > 1 else 1)
    scales = np.broadcast_to(scales, (rows, scales.shape[1]))
    zeros = np.full_like(scales, half)
    if weight_zero_point is not None:
        points = weight_zero_point
        zeros = (points.astype(np.float32) + half) if points.dtype == np.int8 else unpack_rows(points, bits)
        zeros = zeros[:rows].astype(np.float32)
    if weight_g_idx is not None and (weight_g_idx < 0).any():
        weight_g_idx = None  # as it is initialized: not used
    return _grouped(codes.T, zeros.T, scales.T, weight_g_idx, -(-columns // scales.shape[1]))


def _grouped(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: np.ndarray | None, size: int
) -> np.ndarray:
    """Returns ``scales * (codes - zeros)``, with the group of each row of ``codes[K, N]``, transposed."""
    if index is None:
        index = np.arange(len(codes)) // (size if size > 0 else len(codes))
    result = np.empty(codes.shape, np.float32)
    for start in range(0, len(codes), ROWS):
        rows = slice(start, start + ROWS)
        result[rows] = (codes[rows] - zeros[index[rows]]) * scales[index[rows]]
    return result.T


def unpack_rows(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpacks streams of codes down the rows of ``int32[R, C]``, low bits first: ``uint8[32 R / bits, C]``.

    The inverse of `convert.writers.gptq.pack_rows`.
    """
    lanes = 32 // math.gcd(32, bits)
    periods = words.view(np.uint32).reshape(-1, lanes * bits // 32, words.shape[1])
    codes = np.empty((len(periods), lanes, words.shape[1]), np.uint8)
    for lane in range(lanes):
        word, shift = divmod(lane * bits, 32)
        code = periods[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            code = code | periods[:, word + 1] << np.uint32(32 - shift)
        codes[:, lane] = code & np.uint32((1 << bits) - 1)
    return codes.reshape(-1, words.shape[1])
