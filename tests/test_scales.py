"""Eight-bit scales: the values of the bytes, rounding, and weights packed with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layout import random_parts

from pallas_kernels import pack, scales

BYTES = np.arange(256, dtype=np.uint8)


def value(code: int) -> float:
    """Value of a byte by the formula of the module's docstring."""
    return (1 + code % 16 / 16) * 2.0 ** (code // 16 - 13)


def test_every_byte():
    found = np.asarray(scales.decoded(jnp.asarray(BYTES)))
    np.testing.assert_array_equal(found, np.array([value(int(c)) for c in BYTES], np.float32))
    assert (found[0], found[-1]) == (scales.SMALLEST, scales.LARGEST)
    np.testing.assert_array_equal(scales.encoded(jnp.asarray(found)), BYTES)
    np.testing.assert_array_equal(scales.encoded(jnp.asarray(found), up=True), BYTES)


def test_rounding_is_to_the_nearest_or_up():
    every = np.array([value(int(c)) for c in BYTES])
    drawn = np.exp(np.random.default_rng(0).uniform(np.log(every[0]), np.log(every[-1]), 4096))
    given = jnp.asarray(drawn, jnp.float32)
    nearest = np.abs(every[None] - np.asarray(given, np.float64)[:, None]).argmin(axis=1)
    np.testing.assert_array_equal(scales.encoded(given), nearest)
    above = scales.decoded(scales.encoded(given, up=True))
    np.testing.assert_array_equal(scales.encoded(given, up=True), np.searchsorted(every, np.asarray(given)))
    assert np.all(above >= given)


@pytest.mark.parametrize("up", [False, True])
def test_what_is_out_of_reach_becomes_the_nearest(up):
    found = scales.encoded(jnp.asarray([0.0, 1e-30, 1e-5, 100.0, jnp.inf]), up=up)
    assert found.tolist() == [0, 0, 0, 255, 255]


def test_values_within_a_byte_are_spread_and_rounded_to_it():
    shares, one = jnp.linspace(0.0, 1.0, 33), scales.decoded(jnp.asarray(BYTES))[None]
    found = jax.vmap(lambda share: scales.within(jnp.asarray(BYTES), jnp.full(256, share)))(shares)
    np.testing.assert_array_equal(scales.encoded(found), np.broadcast_to(BYTES, (33, 256)))
    assert np.all(np.diff(np.asarray(found), axis=0) > 0)
    again = one * jnp.exp(jnp.log(found / one))
    np.testing.assert_array_equal(scales.encoded(again), np.broadcast_to(BYTES, (33, 256)))


def test_other_types_are_refused():
    assert scales.stored(jnp.ones(3), jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="scale_dtype is float16, expected uint8 or bfloat16"):
        scales.stored(jnp.ones(3), jnp.float16)


def test_a_weight_with_bytes_for_scales():
    """The weight equals one that stores the bytes' values in bfloat16, with half the bytes for scales."""
    parts = random_parts(96, 8, 32, [1, 3, 2])
    parts["scale"] = np.asarray(scales.encoded(jnp.asarray(parts["scale"], jnp.float32)))
    short = pack(**parts, group_size=32)
    long = pack(**{**parts, "scale": np.asarray(scales.decoded(jnp.asarray(parts["scale"])))}, group_size=32)
    assert (short.scale.dtype, long.scale.dtype) == (jnp.uint8, jnp.bfloat16)
    assert long.nbytes - short.nbytes == 3 * 8
    for name in ("scales", "dequantize", "codes", "zero_points"):
        np.testing.assert_array_equal(getattr(short, name)(), getattr(long, name)())
    np.testing.assert_array_equal(short.columns(jnp.array([5, 1])), long.columns(jnp.array([5, 1])))
