"""Scales in eight bits: a float without sign, of 4 bits of exponent and 4 of mantissa.

The codes are chosen on the grid as it is stored, so a rounded scale makes the grid by at most 3 % coarser or
narrower than it might best be, and the rest is made up for. A byte less for each group and channel buys an
eighth of a bit more for every code in groups of 64.

A byte ``c`` stands for ``(1 + (c % 16) / 16) * 2**(c // 16 - 13)``. Added to a constant and shifted it is the
bits of that float32, and of the bfloat16 that is its upper half.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

MANTISSA_BITS = 4
LOWEST_EXPONENT = -13
SMALLEST = 2.0**LOWEST_EXPONENT
LARGEST = (2 - 2.0**-MANTISSA_BITS) * 2.0 ** (LOWEST_EXPONENT + 15)

_SHIFT = 23 - MANTISSA_BITS
_UNIT = 1 << _SHIFT
_FIRST = (127 + LOWEST_EXPONENT) << 23  # the bits of SMALLEST


def decoded(scale: jax.Array) -> jax.Array:
    """Stored scales, bfloat16 or bytes, as float32."""
    if scale.dtype != jnp.uint8:
        return scale.astype(jnp.float32)
    # The shift last: libtpu estimates no kernel in which a float's bits come straight out of a sum.
    bits = (scale.astype(jnp.uint32) + jnp.uint32(_FIRST >> _SHIFT)) << _SHIFT
    return lax.bitcast_convert_type(bits, jnp.float32)


def encoded(scale: ArrayLike, *, up: bool = False) -> jax.Array:
    """The bytes that are nearest to positive scales, or nearest from above; the smallest and the largest
    beyond these."""
    near = jnp.clip(jnp.asarray(scale, jnp.float32), SMALLEST, LARGEST)
    bits = lax.bitcast_convert_type(near, jnp.int32)
    return ((bits - _FIRST + (_UNIT - 1 if up else _UNIT // 2)) >> _SHIFT).astype(jnp.uint8)


def stored(scale: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """Scales as ``dtype`` holds them: bfloat16, or uint8 for bytes.

    Raises:
      ValueError: it is another dtype.
    """
    if jnp.dtype(dtype) not in (jnp.uint8, jnp.bfloat16):
        raise ValueError(f"scale_dtype is {jnp.dtype(dtype)}, expected uint8 or bfloat16")
    return encoded(scale) if jnp.dtype(dtype) == jnp.uint8 else jnp.asarray(scale, jnp.bfloat16)


def rounded(scale: ArrayLike, dtype: DTypeLike = jnp.uint8) -> jax.Array:
    """What is read back of scales that are stored as ``dtype``, float32."""
    return decoded(stored(scale, dtype))


def within(scale: jax.Array, share: jax.Array) -> jax.Array:
    """Of all that is rounded to the bytes ``scale``, the value a share of the way, 0 to 1, from the least."""
    offset = ((share * 0.96 - 0.48) * _UNIT).astype(jnp.int32)  # at the ends logarithms would round it away
    bits = lax.bitcast_convert_type(decoded(scale), jnp.int32)
    return lax.bitcast_convert_type(bits + offset, jnp.float32)
