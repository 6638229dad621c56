"""8-bit scales: unsigned floats with 4 bits of exponent and 4 bits of mantissa.

The solver chooses codes on the grid of the stored scale. A rounded scale therefore makes the grid at most 3 %
coarser or narrower than the best one, and the solver compensates the rest. Saving one byte per group and
channel pays for an eighth of a bit more in every code, with groups of 64.

A byte ``c`` stands for ``(1 + (c % 16) / 16) * 2**(c // 16 - 13)``. Adding a constant to it and shifting
gives the bits of that number in float32, whose upper half is its bfloat16.
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
    # Shift last: libtpu cannot estimate a kernel in which a float's bits are the direct result of a sum.
    bits = (scale.astype(jnp.uint32) + jnp.uint32(_FIRST >> _SHIFT)) << _SHIFT
    return lax.bitcast_convert_type(bits, jnp.float32)


def encoded(scale: ArrayLike, *, up: bool = False) -> jax.Array:
    """Bytes of positive scales, rounded to nearest or, if ``up``, upwards, and clipped to their range."""
    near = jnp.clip(jnp.asarray(scale, jnp.float32), SMALLEST, LARGEST)
    bits = lax.bitcast_convert_type(near, jnp.int32)
    return ((bits - _FIRST + (_UNIT - 1 if up else _UNIT // 2)) >> _SHIFT).astype(jnp.uint8)


def stored(scale: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """Scales stored as ``dtype``: bfloat16, or uint8 for bytes.

    Raises:
      ValueError: ``dtype`` is neither.
    """
    if jnp.dtype(dtype) not in (jnp.uint8, jnp.bfloat16):
        raise ValueError(f"scale_dtype is {jnp.dtype(dtype)}, expected uint8 or bfloat16")
    return encoded(scale) if jnp.dtype(dtype) == jnp.uint8 else jnp.asarray(scale, jnp.bfloat16)


def rounded(scale: ArrayLike, dtype: DTypeLike = jnp.uint8) -> jax.Array:
    """Scales as read back after being stored as ``dtype``, float32."""
    return decoded(stored(scale, dtype))


def within(scale: jax.Array, share: jax.Array) -> jax.Array:
    """The value at the fraction ``share``, 0 to 1, of the interval that rounds to the bytes ``scale``."""
    offset = ((share * 0.96 - 0.48) * _UNIT).astype(jnp.int32)  # at the ends, logs could change the byte
    bits = lax.bitcast_convert_type(decoded(scale), jnp.int32)
    return lax.bitcast_convert_type(bits + offset, jnp.float32)
