"""Coordinate-descent passes over solved weights, compared with the gains of single steps, in float64."""

import itertools

import jax.numpy as jnp
import numpy as np
import oracles

from slim_jax.method.gptq import Solution, solve
from slim_jax.method.hessian import Statistics, statistics
from slim_jax.method.refine import refine

G, ZERO_BITS = 32, 4
SETTINGS = {"group_size": G, "zero_bits": ZERO_BITS}


def solved(
    k: int = 96, n: int = 8, dead: tuple[int, ...] = ()
) -> tuple[jnp.ndarray, Statistics, jnp.ndarray, Solution]:
    """Weights with correlated inputs, their statistics, widths 1, 2 and 3, and the GPTQ solution."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, k)) @ (np.eye(k) + 0.15 * rng.normal(size=(k, k)))
    x[:, list(dead)] = 0
    w = jnp.asarray(rng.normal(size=(k, n)) * 0.1, jnp.float32)
    gram = jnp.asarray(x.T @ x, jnp.float32)
    found = statistics(gram, jnp.float32(len(x)), jnp.float32(0.01), group_size=G)
    w = jnp.pad(w, ((0, len(found.alive) - k), (0, 0))) * found.alive[:, None]
    widths = np.resize([1.0, 2.0, 3.0], len(w) // G)
    bits = jnp.asarray(np.broadcast_to(widths[:, None], (len(widths), n)), jnp.float32)
    solution = solve(w, found.u, found.importance, bits, sqc="search", **SETTINGS)
    return w, found, bits, solution


def error(w, found: Statistics, solution: Solution) -> np.ndarray:
    """``diag(D^T H D)``, the error of every output channel, in float64."""
    delta = np.asarray(solution.weight(), np.float64) - np.asarray(w, np.float64)
    return np.sum(delta * (np.asarray(found.damped, np.float64) @ delta), axis=0)


def test_the_damped_hessian():
    k = 96
    rng = np.random.default_rng(2)
    x = rng.normal(size=(200, k))
    x[:, 7] = 0
    gram = jnp.asarray(x.T @ x, jnp.float32)
    ours = statistics(gram, jnp.float32(len(x)), jnp.float32(0.01), group_size=64).damped
    expected = oracles.damped(oracles.hessian(x), 0.01)
    expected[7, 7] = 0
    np.testing.assert_allclose(ours, np.pad(expected, (0, 32)), rtol=1e-4, atol=1e-4)


def test_the_error_falls_from_pass_to_pass():
    w, found, bits, solution = solved()
    errors = [error(w, found, solution)]
    for passes in (1, 2, 4):
        better = refine(w, found.damped, solution, bits, passes=passes, **SETTINGS)
        errors.append(error(w, found, better))
    for before, after in itertools.pairwise(errors):
        assert np.all(after <= before * (1 + 1e-5))
    assert errors[-1].sum() < 0.96 * errors[0].sum()
    assert not np.array_equal(better.scale, solution.scale)


def test_in_the_end_no_single_step_gains():
    """Tries every code, every scale byte and every zero point one step up and down."""
    w, found, bits, solution = solved()
    final = refine(w, found.damped, solution, bits, passes=60, **SETTINGS)
    least = error(w, found, final)
    tolerance = 1e-4 * least
    levels = np.repeat(np.exp2(np.asarray(bits)) - 1, G, axis=0)
    code = np.asarray(final.code, np.int64)
    for j in range(len(w)):
        for by in (-1, 1):
            moved = code.copy()
            moved[j] = np.clip(moved[j] + by, 0, levels[j])
            assert np.all(error(w, found, final._replace(code=jnp.asarray(moved))) >= least - tolerance)
    for i in range(len(bits)):
        for by in (-1, 1):
            scale = (final.scale.astype(jnp.int32).at[i].add(by)).astype(jnp.uint8)
            assert np.all(error(w, found, final._replace(scale=scale)) >= least - tolerance)
        for by in (-1, 1):
            step = jnp.exp2(bits[i] - ZERO_BITS)
            zero = final.zero.at[i].set(jnp.clip(final.zero[i] + by * step, 0, 15 * step))
            assert np.all(error(w, found, final._replace(zero=zero)) >= least - tolerance)


def test_what_is_stored_stays_storable():
    w, found, bits, solution = solved()
    better = refine(w, found.damped, solution, bits, passes=3, **SETTINGS)
    assert (better.code.dtype, better.scale.dtype) == (jnp.uint8, jnp.uint8)
    assert np.all(np.asarray(better.code).reshape(-1, G, w.shape[1]).max(axis=1) < np.exp2(bits))
    zero = np.asarray(better.zero) / np.exp2(np.asarray(bits) - ZERO_BITS)
    assert np.array_equal(zero, np.rint(zero))
    assert zero.min() >= 0
    assert zero.max() < 2**ZERO_BITS


def test_dead_inputs_and_padding_have_no_say():
    w, found, bits, solution = solved(k=80, dead=(3, 40))
    still = [3, 40, *range(80, 96)]
    better = refine(w, found.damped, solution, bits, passes=2, **SETTINGS)
    assert np.array_equal(better.code[np.asarray(still)], solution.code[np.asarray(still)])
    other = solution._replace(code=solution.code.at[np.asarray(still)].set(0))
    again = refine(w, found.damped, other, bits, passes=2, **SETTINGS)
    live = np.setdiff1d(np.arange(96), still)
    assert np.array_equal(again.code[live], better.code[live])
    assert np.array_equal(again.scale, better.scale)
