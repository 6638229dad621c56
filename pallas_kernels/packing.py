"""Packs the codes that a solver chose into a weight; `layout.py` defines the layout."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from pallas_kernels.layout import MixedTensor, group_count, zero_bits
from pallas_kernels.planes import MAX_BITS, WORD_BITS, pack_group, pack_plane


def pack(
    codes: ArrayLike,
    scale: ArrayLike,
    zero_code: ArrayLike,
    bits: ArrayLike,
    *,
    group_size: int,
    widths: tuple[int, ...] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> MixedTensor:
    """Packs codes that a solver chose; ``pack(...).dequantize()`` is ``scale * (codes - zero)`` bit for bit.

    Args:
      codes: ``uint[K, N]``, each below ``2**b`` of its group.
      scale: ``[G, N]``: the bytes of 8-bit scales (`pallas_kernels.scales`), or scales, which are rounded to
        bfloat16.
      zero_code: ``uint[G, N]``, below 16 (below 256 if a width above 4 may occur).
      bits: ``int[G]``, the width of every group.
      group_size: input channels per group, a multiple of 32.
      widths: the widths that may occur, a superset of ``bits``; by default those that do occur.
      dtype: dtype of the dequantized weight.

    Raises:
      ValueError: shapes, widths, the group size, a code or a zero code are not as above.
    """
    codes, zero_code, bits = np.asarray(codes), np.asarray(zero_code), np.asarray(bits)
    k, n = codes.shape
    groups = group_count(k, group_size)
    widths = tuple(sorted({int(b) for b in bits})) if widths is None else tuple(sorted(set(widths)))
    _check_pack(codes, np.shape(scale), zero_code, bits, group_size, widths)

    scale = np.asarray(scale)
    order = np.argsort(bits, kind="stable")
    padded = np.zeros((groups * group_size, n), np.uint32)
    padded[:k] = codes
    words = [pack_group(padded[i * group_size : (i + 1) * group_size], int(bits[i])) for i in order]

    z = zero_bits(widths)
    zeros = zero_code[order].astype(np.uint8)
    if z == 4:
        zeros = pack_plane(np.pad(zeros, ((0, groups % 2), (0, 0))), 4, np.uint8)
    return MixedTensor(
        words=jnp.asarray(np.concatenate(words)),
        scale=jnp.asarray(scale[order], jnp.uint8 if scale.dtype == np.uint8 else jnp.bfloat16),
        zero=jnp.asarray(zeros),
        order=jnp.asarray(order, jnp.int32),
        segments=jnp.asarray([np.sum(bits == b) for b in widths], jnp.int32),
        shape=(k, n),
        group_size=group_size,
        widths=widths,
        dtype=jnp.dtype(dtype),
    )


def _check_pack(codes, scale_shape, zero_code, bits, group_size, widths) -> None:
    k, n = codes.shape
    groups = group_count(k, group_size)
    if group_size < WORD_BITS or group_size % WORD_BITS:
        raise ValueError(f"group_size is {group_size}, expected a positive multiple of {WORD_BITS}")
    if not set(bits.tolist()) <= set(widths) or not set(widths) <= set(range(1, MAX_BITS + 1)):
        raise ValueError(
            f"bits {sorted(set(bits.tolist()))} are not all in widths {widths}, a subset of 1..{MAX_BITS}"
        )
    expected: dict[str, tuple[tuple, tuple]] = {
        "scale": (scale_shape, (groups, n)),
        "zero_code": (zero_code.shape, (groups, n)),
        "bits": (bits.shape, (groups,)),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise ValueError(
                f"{name} has shape {found}, expected {wanted}: codes {codes.shape}, groups of {group_size}"
            )
    if zero_code.size and (zero_code.min() < 0 or zero_code.max() >= 1 << zero_bits(widths)):
        raise ValueError(f"zero_code goes up to {zero_code.max()}, expected below {1 << zero_bits(widths)}")
    limit = np.repeat(1 << bits.astype(np.int64), group_size)[:k, None]
    if np.any(codes < 0) or np.any(codes >= limit):
        raise ValueError("a code does not fit the bit width of its group")
