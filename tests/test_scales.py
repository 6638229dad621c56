"""Scales in eight bits: what bytes stand for, rounding, and weights that are packed with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layout import random_parts

from pallas_kernels import pack, scales
from slim_jax.config import SlimConfig
from slim_jax.method.hessian import Observation
from slim_jax.method.layer import LayerSolver

BYTES = np.arange(256, dtype=np.uint8)


def value(code: int) -> float:
    """The formula of the module's docstring."""
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
    """It is the weight whose scales are what the bytes stand for, in half their bytes."""
    parts = random_parts(96, 8, 32, [1, 3, 2])
    parts["scale"] = np.asarray(scales.encoded(jnp.asarray(parts["scale"], jnp.float32)))
    short = pack(**parts, group_size=32)
    long = pack(**{**parts, "scale": np.asarray(scales.decoded(jnp.asarray(parts["scale"])))}, group_size=32)
    assert (short.scale.dtype, long.scale.dtype) == (jnp.uint8, jnp.bfloat16)
    assert long.nbytes - short.nbytes == 3 * 8
    for name in ("scales", "dequantize", "codes", "zero_points"):
        np.testing.assert_array_equal(getattr(short, name)(), getattr(long, name)())
    np.testing.assert_array_equal(short.columns(jnp.array([5, 1])), long.columns(jnp.array([5, 1])))


def test_the_power_that_brings_weights_within_reach():
    assert [scales.exponent(largest) for largest in (0.0, 0.02, 0.5, 9.25, float("nan"))] == [0] * 5
    for largest in (1e-20, 1e-3, 12.0, 3e5):
        assert 0.5 <= largest * 2.0 ** scales.exponent(largest) < 1


@pytest.mark.parametrize("method", ["rtn", "gptq", "slim"])
@pytest.mark.parametrize("power", [-30, 12])
def test_weights_far_off_are_quantized_as_others(method, power):
    """Those of a layer times a power of two: the same codes, scales times that power, costs of bits too."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(256, 96)), (0.1 * rng.normal(size=(96, 8))).astype(np.float32)
    seen = Observation(*(jnp.asarray(a, jnp.float32) for a in (x.T @ x, x[:64])), len(x))
    solver = LayerSolver(SlimConfig(bits=2, group_size=32, method=method).resolved(), None)
    ((near, report),) = solver.solve(["layer"], [w], seen)
    ((far, other),) = solver.solve(["layer"], [w * np.float32(2.0**power)], seen)
    assert (near.scale.dtype, far.scale.dtype) == (jnp.uint8, jnp.bfloat16)
    assert report.error == pytest.approx(other.error, rel=1e-6)
    if method == "slim":
        near_costs, far_costs = (
            solver.errors({"layer": w * np.float32(2.0**p)}, seen)["layer"] for p in (0, power)
        )
        np.testing.assert_allclose(near_costs, far_costs * 4.0**-power, rtol=1e-5)
    np.testing.assert_array_equal(near.codes(), far.codes())
    np.testing.assert_array_equal(near.scales(), far.scales() * np.float32(2.0**-power))
