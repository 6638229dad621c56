"""Hessian, salience, bit search, calibration and solver against float64 oracles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_layout import dequantize

from pallas_kernels import pack, scales
from slim_jax.calibrate.activations import sample_positions
from slim_jax.config import SlimConfig
from slim_jax.method.gptq import solve
from slim_jax.method.hessian import Observation, dampen, gram, inverse_cholesky, statistics
from slim_jax.method.layer import LayerSolver
from slim_jax.method.sba import (
    allocate,
    group_salience,
    load_allocation,
    quantized_at,
    save_allocation,
    scores,
)
from slim_jax.method.scale_search import FITS, fit_min_max, fit_paper, fit_search, stored_grids

G, ZERO_BITS = 32, 4


@pytest.fixture(scope="module")
def layer():
    """Correlated inputs ``[T, K]`` and weights ``[K, N]``, with their factor ``U``, in float64."""
    rng = np.random.default_rng(0)
    k, n, t = 192, 48, 512
    x = (
        rng.normal(size=(t, k))
        @ (np.eye(k) + 0.1 * rng.normal(size=(k, k)))
        * np.exp(rng.normal(size=k) * 0.5)
    )
    w = rng.normal(size=(k, n)) * 0.1
    u = oracles.inverse_cholesky(oracles.damped(oracles.hessian(x), 0.01))
    return x, w, u


def test_gram_is_the_hessian(layer):
    x, _, _ = layer
    ours = gram(jnp.asarray(x, jnp.float32)) * (2.0 / len(x))
    np.testing.assert_allclose(ours, oracles.hessian(x), rtol=1e-4, atol=1e-4)


def test_dead_inputs_and_damping():
    h = np.array([[4.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
    ours, dead = dampen(jnp.asarray(h, jnp.float32), 0.01)
    np.testing.assert_allclose(ours, oracles.damped(h, 0.01), rtol=1e-6)
    assert dead.tolist() == [False, True, False]


def test_inverse_cholesky(layer):
    x, _, u = layer
    h = oracles.damped(oracles.hessian(x), 0.01)
    ours = np.asarray(inverse_cholesky(jnp.asarray(h, jnp.float32)), np.float64)
    assert np.allclose(ours, np.triu(ours))
    np.testing.assert_allclose(ours, u, atol=1e-4 * np.abs(u).max())
    np.testing.assert_allclose(ours.T @ ours @ h, np.eye(len(h)), atol=1e-3)


def test_an_indefinite_hessian_shows():
    assert not np.all(np.isfinite(inverse_cholesky(jnp.asarray([[1.0, 2.0], [2.0, 1.0]]))))


def test_salience(layer):
    _, w, u = layer
    ours = group_salience(jnp.asarray(w, jnp.float32), jnp.asarray(1 / np.diag(u) ** 2, jnp.float32), G)
    np.testing.assert_allclose(ours, oracles.salience(w, u, G), rtol=1e-4)


@pytest.mark.parametrize("sqc", sorted(FITS))
def test_bit_search_equals_the_direct_one(layer, sqc):
    x, w, u = layer
    importance = jnp.asarray(1 / np.diag(u) ** 2, jnp.float32)
    settings = {"group_size": G, "zero_bits": ZERO_BITS, "sqc": sqc}
    w32 = jnp.asarray(w, jnp.float32)
    ours, order = scores(w32, jnp.asarray(x, jnp.float32), importance, bits=2, criterion="kl", **settings)
    by_width = {b: np.asarray(quantized_at(w32, importance, b, **settings), np.float64) for b in (1, 2, 3)}
    assert order.tolist() == np.argsort(oracles.salience(w, u, G), kind="stable").tolist()
    direct = oracles.direct_scores(x, w, by_width, np.asarray(order), 2, G)
    np.testing.assert_allclose(ours, direct, rtol=2e-3)


def test_bit_search_finds_the_groups_that_matter():
    """Among eight groups, two loud ones get the high bits and two silent ones the low bits."""
    rng = np.random.default_rng(1)
    k, n = 8 * G, 32
    loud = np.ones(k)
    loud[1 * G : 2 * G] = loud[6 * G : 7 * G] = 8.0
    loud[3 * G : 4 * G] = loud[4 * G : 5 * G] = 0.01
    x = jnp.asarray(rng.normal(size=(1024, k)) * loud, jnp.float32)
    w = jnp.asarray(rng.normal(size=(k, n)) * 0.1, jnp.float32)
    h, _ = dampen(gram(x) * (2.0 / 1024), 1e-4)
    importance = 1 / jnp.diagonal(inverse_cholesky(h)) ** 2
    score, order = scores(
        w, x, importance, bits=2, group_size=G, zero_bits=ZERO_BITS, sqc="search", criterion="kl"
    )
    bits = allocate(np.asarray(order), int(np.argmin(score)), 2)
    assert bits.mean() == 2
    assert bits[1] == bits[6] == 3
    assert bits[3] == bits[4] == 1


def test_error_criterion_is_the_weighted_error(layer):
    _, w, u = layer
    importance = 1 / np.diag(u) ** 2
    settings = {"group_size": G, "zero_bits": ZERO_BITS, "sqc": "search"}
    w32, i32 = jnp.asarray(w, jnp.float32), jnp.asarray(importance, jnp.float32)
    score, order = scores(w32, jnp.zeros((1, len(w))), i32, bits=3, criterion="error", **settings)
    by_width = {b: np.asarray(quantized_at(w32, i32, b, **settings), np.float64) for b in (2, 3, 4)}
    for p in range(len(score)):
        bits = allocate(np.asarray(order), p, 3)
        w_hat = np.concatenate([by_width[b][i * G : (i + 1) * G] for i, b in enumerate(bits)])
        expected = np.sum((w - w_hat) ** 2 * importance[:, None])
        np.testing.assert_allclose(score[p], expected, rtol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("sqc", sorted(FITS))
def test_grids_can_be_stored(sqc, bits):
    rng = np.random.default_rng(bits)
    w = jnp.asarray(rng.normal(size=(G, 20)) * 0.1, jnp.float32)
    grid = FITS[sqc](w, jnp.ones(G), jnp.full(20, bits, jnp.float32), ZERO_BITS)
    np.testing.assert_array_equal(grid.scale, grid.scale.astype(jnp.bfloat16).astype(jnp.float32))
    code = grid.zero / 2.0 ** (bits - ZERO_BITS)
    np.testing.assert_array_equal(code, jnp.round(code))
    assert np.all(code >= 0)
    assert np.all(code < 2**ZERO_BITS)
    assert np.all(grid.levels == 2**bits - 1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_search_is_near_the_best_grid(bits):
    """Compares with every clip factor and zero code of a fine grid, tried one by one in float64."""
    rng = np.random.default_rng(bits)
    w, importance = rng.normal(size=(G, 6)) * 0.1, np.exp(rng.normal(size=G))
    levels = 2**bits - 1

    def error(scale, zero):
        code = np.clip(np.rint(w / scale + zero), 0, levels)
        return np.sum(importance[:, None] * (w - scale * (code - zero)) ** 2, axis=0)

    spread = (w.max(axis=0) - w.min(axis=0)) / levels
    zeros = np.arange(16) * 2.0 ** (bits - ZERO_BITS)
    best = np.min([error(f * spread, z) for f in np.linspace(0.2, 1.1, 91) for z in zeros], axis=0)
    grid = fit_search(
        jnp.asarray(w, jnp.float32), jnp.asarray(importance, jnp.float32), jnp.full(6, bits, jnp.float32), 4
    )
    found = error(np.asarray(grid.scale, np.float64), np.asarray(grid.zero, np.float64))
    assert np.all(found <= 1.3 * best)
    assert found.sum() <= (1.1 if bits < 4 else 1.15) * best.sum()  # the best grid's scales are not rounded


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_paper_grid_by_hand(bits):
    """Tries the authors' 101 clip factors one by one; scales are compared after rounding to bfloat16."""
    rng = np.random.default_rng(bits)
    w = rng.normal(size=(G, 5)).astype(np.float32) * np.float32(0.1)
    low, high, levels = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0), 2**bits - 1
    best = np.full(5, np.inf)
    for factor in np.concatenate([[1.0], 1 + np.arange(1, 51) * 0.002, 1 - np.arange(1, 51) * 0.002]):
        scale = np.asarray(jnp.asarray(factor * (high - low) / levels, jnp.bfloat16), np.float64)
        zero = np.rint(-low / ((high - low) / levels))
        code = np.clip(np.rint(w / scale + zero), 0, levels)
        best = np.minimum(best, np.sum(np.abs(w - scale * (code - zero)) ** 2.4, axis=0))
    grid = fit_paper(jnp.asarray(w), jnp.ones(G), jnp.full(5, bits, jnp.float32), ZERO_BITS)
    miss = np.abs(w - np.asarray(grid.value(grid.code(jnp.asarray(w))), np.float64))
    np.testing.assert_allclose(np.sum(miss**2.4, axis=0), best, rtol=1e-3)


def test_paper_grid_of_one_bit():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(G, 5)), jnp.float32)
    grid = fit_paper(w, jnp.ones(G), jnp.ones(5), ZERO_BITS)
    np.testing.assert_allclose(grid.scale, 2 * jnp.mean(jnp.abs(w), axis=0), rtol=4e-3)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_solver_equals_the_oracle(layer, bits):
    """The solver's grids depend on its own state, so they are passed to the oracle; the codes must agree."""
    _, w, u = layer
    k, n = w.shape
    solution = solve(
        jnp.asarray(w, jnp.float32),
        jnp.asarray(u, jnp.float32),
        jnp.asarray(1 / np.diag(u) ** 2, jnp.float32),
        jnp.full((k // G, n), bits, jnp.float32),
        group_size=G,
        zero_bits=ZERO_BITS,
        sqc="search",
    )
    scale = np.asarray(scales.decoded(solution.scale), np.float64)
    zero = np.asarray(solution.zero, np.float64)
    grids = [(scale[i], zero[i], np.full(n, 2**bits - 1)) for i in range(k // G)]
    codes, _values = oracles.gptq(w, u, grids, G)
    assert np.mean(codes == np.asarray(solution.code)) > 0.999  # ties in float32


@pytest.mark.parametrize("dead", [0.0, 0.15])
@pytest.mark.parametrize("sqc", sorted(FITS))
def test_codes_do_not_depend_on_the_scale_of_the_inputs(layer, sqc, dead):
    x, w, _ = layer
    x = np.where(np.random.default_rng(0).random(x.shape[1]) < dead, 0.0, x)
    x[:, :G] = 0.0 if dead else x[:, :G]  # a whole group, too

    def codes(scale: float) -> np.ndarray:
        total = gram(jnp.asarray(x * scale, jnp.float32))
        found = statistics(total, jnp.float32(len(x)), jnp.float32(0.01), group_size=G)
        alive = jnp.asarray(w, jnp.float32) * found.alive[:, None]
        widths = jnp.asarray(np.resize([1.0, 2.0, 3.0], (len(w) // G, 1)) * np.ones(w.shape[1]), jnp.float32)
        settings = {"group_size": G, "zero_bits": ZERO_BITS, "sqc": sqc}
        return np.asarray(solve(alive, found.u, found.importance, widths, **settings).code)

    whole = codes(1.0)
    np.testing.assert_array_equal(whole, codes(2.0**-7))
    np.testing.assert_array_equal(whole, codes(2.0**9))


@pytest.mark.parametrize("method", ["rtn", "gptq", "slim"])
def test_the_reported_error_is_that_of_the_outputs(layer, method):
    x, w, _ = layer
    x32, w32 = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    seen = Observation(gram(x32), x32, len(x))
    solver = LayerSolver(SlimConfig(bits=2, group_size=G, method=method).resolved(), None)
    ((tensor, report),) = solver.solve(["layer"], [w32], seen)
    miss = x @ (w - np.asarray(dequantize(tensor), np.float64))
    expected = np.sum(miss**2) / np.sum((x @ w) ** 2)
    assert report.error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("length", [512, 2048, 500])
def test_the_search_looks_at_all_positions_alike(length):
    """Stride 16 in windows of a multiple of 16 tokens: the samples favour no position."""
    windows = 4096 // length
    found = sample_positions(windows * length, 16)
    assert len(found) == -(-windows * length // 16)
    assert np.all(np.diff(found) > 0)
    assert found[-1] < windows * length
    starts, quarters = found % length == 0, np.bincount(found % length * 4 // length)
    assert np.sum(starts) <= 1  # of at most 8 windows; a plain stride would hit them all
    assert quarters.max() - quarters.min() <= 0.05 * len(found)
    np.testing.assert_array_equal(sample_positions(640, 1), np.arange(640))


@pytest.mark.parametrize(("own", "at_most"), [(12, 0.6), (48, 0.75), (2048, 1.02)])
def test_an_expert_with_few_tokens_learns_from_those_of_all(layer, own, at_most):
    """Bounds the error on the expert's unseen tokens, relative to calibration on its own tokens alone."""
    _, w, _ = layer
    rng = np.random.default_rng(3)
    k = len(w)
    mixing = np.eye(k) + 0.1 * rng.normal(size=(k, k))
    loud = np.exp(0.4 * rng.normal(size=k))  # scales of the expert's own input channels
    everyone = (rng.normal(size=(4096, k)) @ mixing).astype(np.float32)
    expert = (rng.normal(size=(own + 1024, k)) @ mixing * loud).astype(np.float32)
    seen, unseen = expert[:own], np.asarray(expert[own:], np.float64)
    alone = Observation(gram(jnp.asarray(seen)), jnp.asarray(np.resize(seen, (64, k))), own)
    prior = Observation(gram(jnp.asarray(everyone)), jnp.asarray(everyone[:64]), len(everyone))
    solver = LayerSolver(
        SlimConfig(bits=2, group_size=G, method="gptq", sqc="search", damping=0.01).resolved(), None
    )

    def loss(seen: Observation) -> float:
        ((tensor, report),) = solver.solve(["expert"], [jnp.asarray(w, jnp.float32)], seen)
        assert report.borrowed == pytest.approx(seen.borrowed and k / (k + own))
        return float(np.sum((unseen @ (w - np.asarray(dequantize(tensor), np.float64))) ** 2))

    assert loss(alone.with_prior(prior)) < at_most * loss(alone)


def test_feedback_beats_rounding_to_nearest(layer):
    _, w, u = layer
    k, n = w.shape
    fixed = partial(
        solve,
        jnp.asarray(w, jnp.float32),
        jnp.asarray(u, jnp.float32),
        jnp.asarray(1 / np.diag(u) ** 2, jnp.float32),
        jnp.full((k // G, n), 2.0),
        group_size=G,
        zero_bits=ZERO_BITS,
        sqc="minmax",
    )
    h = np.linalg.inv(u.T @ u)

    def loss(solution):
        scale, zero = (
            np.repeat(np.asarray(a, np.float64), G, axis=0) for a in (solution.scale, solution.zero)
        )
        miss = w - scale * (np.asarray(solution.code, np.float64) - zero)
        return np.einsum("kn,kl,ln->", miss, h, miss)

    assert loss(fixed()) < 0.9 * loss(fixed(feedback=False))


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_channel_does_not_depend_on_those_beside_it(layer, parts):
    """Exact equality: with any number of devices, each channel's result is that of one device."""
    _, w, u = layer
    k, n = len(w), 576
    w = np.random.default_rng(0).normal(size=(k, n)).astype(np.float32)
    solve_part = partial(
        solve,
        u=jnp.asarray(u, jnp.float32),
        importance=jnp.asarray(1 / np.diag(u) ** 2, jnp.float32),
        bits=jnp.full((k // G, n), 2.0),
        group_size=G,
        zero_bits=ZERO_BITS,
        sqc="search",
    )
    whole = solve_part(jnp.asarray(w))
    width = n // parts
    for start in range(0, n, width):
        own = slice(start, start + width)
        found = solve_part(jnp.asarray(w[:, own]), bits=jnp.full((k // G, width), 2.0))
        jax.tree.map(np.testing.assert_array_equal, found, whole.part(own))


def test_stored_is_what_was_calibrated(layer):
    """Unpacked weights equal the solver's bit for bit, and so do the stored grids."""
    _, w, u = layer
    k, n = w.shape
    bits = np.array([1, 2, 3, 2, 3, 1])
    solution = solve(
        jnp.asarray(w, jnp.float32),
        jnp.asarray(u, jnp.float32),
        jnp.asarray(1 / np.diag(u) ** 2, jnp.float32),
        jnp.broadcast_to(jnp.asarray(bits, jnp.float32)[:, None], (k // G, n)),
        group_size=G,
        zero_bits=ZERO_BITS,
        sqc="search",
    )
    zero_code = np.rint(np.asarray(solution.zero) / np.exp2(bits - ZERO_BITS)[:, None]).astype(np.uint8)
    packed = pack(np.asarray(solution.code), np.asarray(solution.scale), zero_code, bits, group_size=G)
    scale = jnp.repeat(scales.decoded(solution.scale), G, axis=0)
    expected = scale * (solution.code.astype(jnp.float32) - jnp.repeat(solution.zero, G, axis=0))
    np.testing.assert_array_equal(jax.device_get(packed.dequantize()), jax.device_get(expected))
    grid = stored_grids(packed)
    np.testing.assert_array_equal(grid.scale, scales.decoded(solution.scale))
    np.testing.assert_array_equal(grid.zero, solution.zero)


def test_min_max_of_a_zero_group():
    grid = fit_min_max(jnp.zeros((G, 3)), jnp.ones(G), jnp.full(3, 2.0), ZERO_BITS)
    np.testing.assert_array_equal(grid.value(grid.code(jnp.zeros((G, 3)))), 0.0)


def test_allocation_files(tmp_path):
    allocation = {"blocks.0.attn.q": [1, 2, 3], "blocks.0.attn.k": [2, 2, 2]}
    save_allocation(allocation, tmp_path / "bits.json")
    assert load_allocation(tmp_path / "bits.json") == allocation


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": [9]}', '{"a": 2}'])
def test_bad_allocation_files(tmp_path, content):
    (tmp_path / "bits.json").write_text(content)
    with pytest.raises(ValueError, match=r"bits\.json"):
        load_allocation(tmp_path / "bits.json")
