"""Layers whose scales no byte holds: one large weight, small siblings, weights far from those of models.

The loss of a column is computed in float64, and compared with rounding to nearest on float64 grids.
"""

import itertools

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_layout import dequantize

from pallas_kernels import scales
from slim_jax.calibrate.embeddings import quantize_table
from slim_jax.config import SlimConfig
from slim_jax.method.hessian import Observation
from slim_jax.method.layer import LayerSolver

G, K, N, SIGMA = 64, 128, 12, 0.02
COLUMN = 5
"""The column with the large weight."""

METHODS = {"rtn": {"method": "rtn"}, "gptq": {"method": "gptq"}, "slim": {"method": "slim", "asymmetric": 0}}


@pytest.fixture(scope="module")
def data():
    """Inputs ``[T, K]`` and two layers' weights ``[2, K, N]``."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, K)) @ (np.eye(K) + 0.05 * rng.normal(size=(K, K)))
    return x.astype(np.float32), (SIGMA * rng.normal(size=(2, K, N))).astype(np.float32)


def solved(x, weights, method, bits):
    """Packs the layers; returns the tensors and their reports."""
    solver = LayerSolver(
        SlimConfig(bits=min(bits, 7), group_size=G, **METHODS[method]).resolved(),
        {str(i): [bits] * (K // G) for i in range(len(weights))},
        widths=(bits,),
    )
    x32 = jnp.asarray(x)
    seen = Observation(x32.T @ x32, x32[:64], len(x))
    return zip(*solver.solve([str(i) for i in range(len(weights))], list(weights), seen))


def losses(x, w, w_hat):
    """Root of every column's squared error over its squared output, in float64."""
    x, w, w_hat = (np.asarray(a, np.float64) for a in (x, w, w_hat))
    return np.sqrt(np.sum((x @ (w - w_hat)) ** 2, axis=0) / np.sum((x @ w) ** 2, axis=0))


def check(x, w, method, bits, outlier, ratio, usual):
    """Asserts that untouched columns, and a sibling layer, lose no more than without the large weight."""
    first, second = w
    damaged, sibling = first.copy(), second * np.float32(ratio)
    if outlier:
        damaged[3, COLUMN] = outlier
    tensors, reports = solved(x, [damaged, sibling], method, bits)
    others = np.arange(N) != COLUMN
    for tensor, weight, expected, columns in zip(tensors, (damaged, sibling), usual, (others, others | True)):
        found = losses(x, weight, dequantize(tensor))[columns]
        assert found.max() <= 1.25 * expected[columns].max()
        assert np.mean(found) <= 1.05 * np.mean(expected[columns])
    for report, tensor, weight in zip(reports, tensors, (damaged, sibling)):
        assert report.worst == pytest.approx(losses(x, weight, dequantize(tensor)).max() ** 2, rel=0.05)
    return [tensor.scale.dtype for tensor in tensors]


def sweep(data, method, widths, outliers, ratios):
    x, w = data
    for bits in widths:
        # The layer alone, at a size whose scales fit well into bytes.
        usual = [losses(x, 10 * one, dequantize(next(solved(x, [10 * one], method, bits))[0])) for one in w]
        for outlier, ratio in itertools.product(outliers, ratios):
            dtypes = check(x, w, method, bits, outlier, ratio, usual)
            if outlier > scales.LARGEST * (2**bits - 1):
                assert dtypes[0] == jnp.bfloat16
            if outlier == 0 and bits <= 6:
                assert dtypes[0] == jnp.uint8


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_large_weight_and_a_small_sibling(data, method):
    sweep(data, method, (4, 8), (0.0, 1000.0), (0.1,))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_large_weights_and_siblings_of_all_sizes(data, method):
    sweep(data, method, range(2, 9), (0.0, 10.0, 100.0, 1000.0), (0.1, 1.0, 100.0))


@pytest.mark.parametrize("size", [1e-8, 1e-5, 100.0])
def test_weights_far_from_those_of_models(data, size):
    """Compares with rounding to nearest on float64 grids."""
    x, w = data
    w = w[0] / np.float32(SIGMA) * np.float32(size)
    ((tensor, report),) = zip(*solved(x, [w], "rtn", 4))
    blocks = w.astype(np.float64).reshape(-1, G, N)
    low, high = np.minimum(blocks.min(axis=1), 0), np.maximum(blocks.max(axis=1), 0)
    scale = ((high - low) / 15)[:, None]
    zero = np.rint(-low[:, None] / scale)
    exact = scale * (np.clip(np.rint(blocks / scale + zero), 0, 15) - zero)
    expected = losses(x, w, exact.reshape(K, N))
    assert tensor.scale.dtype == jnp.bfloat16
    np.testing.assert_allclose(losses(x, w, dequantize(tensor)), expected, rtol=0.1)
    assert report.error == pytest.approx(np.mean(expected**2), rel=0.2)


def test_a_flattened_column_shows_in_the_report(data):
    """A column flattened to its largest weight hardly changes the mean error, but shows in ``worst``."""
    x, w = data
    w = w[0].copy()
    w[3, COLUMN] = 1000.0
    (tensor,), (report,) = solved(x, [w], "rtn", 4)
    assert report.error < 1e-3
    assert 0.003 < report.worst < 0.03
    assert tensor.scale.dtype == jnp.bfloat16


def test_costs_of_bits_are_those_of_a_layer_of_another_size(data):
    x, w = data
    x32 = jnp.asarray(x)
    seen = Observation(x32.T @ x32, x32[:64], len(x))
    solver = LayerSolver(SlimConfig(bits=2.5, group_size=G, asymmetric=0).resolved(), None)
    costs = solver.errors({"near": w[0], "far": w[0] * np.float32(1e-6)}, seen)
    np.testing.assert_allclose(costs["near"], costs["far"] * 1e12, rtol=0.05)


def test_a_table_with_a_large_weight(monkeypatch):
    """Chunks whose scales are stored in different dtypes form one embedding, in bfloat16."""
    monkeypatch.setattr("slim_jax.method.layer.CHUNK", 16)
    rng = np.random.default_rng(0)
    table = (SIGMA * rng.normal(size=(32, 64))).astype(np.float32)
    settings = SlimConfig(embedding_bits=4, embedding_group_size=32).resolved()
    plain, _ = quantize_table("embed", table, None, settings)
    table[20, 1] = 1000.0
    found, report = quantize_table("embed", table, None, settings)
    assert (plain.scale.dtype, found.scale.dtype) == (jnp.uint8, jnp.bfloat16)
    np.testing.assert_array_equal(dequantize(found)[:, :16], dequantize(plain)[:, :16])
    others = np.arange(32) != 20
    miss = np.asarray(dequantize(found), np.float64).T - table
    assert np.sqrt(np.mean(miss[others] ** 2)) < 0.15 * SIGMA
    assert report.worst < 0.1


def test_codes_beside_a_large_weight_are_those_of_the_oracle(data):
    """The codes are those of GPTQ in float64 on the stored grids."""
    x, w = data
    w = w[0].copy()
    w[3, COLUMN] = 100.0
    (tensor,), _ = solved(x, [w], "gptq", 3)
    u = oracles.inverse_cholesky(oracles.damped(oracles.hessian(x.astype(np.float64)), 0.01))
    scale, zero = (np.asarray(a, np.float64) for a in (tensor.scales(), tensor.zero_points()))
    grids = [(scale[i], zero[i], np.full(N, 7)) for i in range(K // G)]
    codes, _ = oracles.gptq(w.astype(np.float64), u, grids, G)
    assert np.mean(codes == np.asarray(tensor.codes())) > 0.99
