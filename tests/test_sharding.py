"""Packed weights sharded over several devices: eight virtual CPUs, see conftest."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matmul_cases import random_weight, random_x, slow
from test_layout import dequantize

from pallas_kernels import matmul, mixed_matmul, mixed_ragged_dot, part, sharded_matmul, stack_parts
from pallas_kernels.layout import stack


def product(parts: int, over: str):
    """Returns a jitted ``x @ w`` over ``parts`` devices."""
    mesh = jax.make_mesh((parts,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x, w):
        y = mixed_matmul(x, part(w))
        return jax.lax.psum(y, "model") if over == "k" else y

    y = P() if over == "k" else P(None, "model")
    x = P(None, "model") if over == "k" else P()
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(x, P("model")), out_specs=y))


@pytest.mark.parametrize("over", ["k", "n"])
@pytest.mark.parametrize(("m", "parts"), [(1, 4), (20, 2)])
def test_sharded_product(over, m, parts):
    w, dense = random_weight(256, 24, 32, [1, 1, 1, 1, 3, 3, 2, 4], widths=(1, 2, 3, 4))
    stacked = stack_parts(w, parts, over=over)
    assert stacked.words.shape[0] == parts
    x = random_x(m, 256)
    found = product(parts, over)(x, stacked)
    np.testing.assert_allclose(found, np.asarray(x) @ dense, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("n", [24, pytest.param(27, marks=pytest.mark.slow)])
def test_product_with_channels_cut_over_a_mesh(n):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    w, dense = random_weight(256, n, 32, [1, 1, 1, 1, 3, 3, 2, 4], widths=(1, 2, 3, 4))
    x = random_x(6, 256).reshape(2, 3, 256)
    y = jax.jit(sharded_matmul, static_argnums=2)(x, w, mesh)
    np.testing.assert_allclose(y, np.asarray(x) @ dense, rtol=1e-4, atol=1e-4)
    assert y.sharding.is_fully_replicated == (n == 27)
    over = dataclasses.replace(w, mesh=mesh)
    np.testing.assert_array_equal(jax.jit(matmul)(x, over), y)
    gradient = jax.grad(lambda x: (sharded_matmul(x, w, mesh) ** 2).sum())(x)
    np.testing.assert_allclose(gradient, 2 * (np.asarray(x) @ dense) @ dense.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("over", ["n", "k"])
def test_rows_over_data_and_channels_over_model(over):
    """The first product of a block's part, over N, and the one that reads it and sums, over K."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    w, dense = random_weight(256, 24, 32, [1, 1, 1, 1, 3, 3, 2, 4], widths=(1, 2, 3, 4))
    x = random_x(4, 256)
    given = w if over == "n" else stack_parts(w, 4, over="k")
    y = jax.jit(lambda x, w: sharded_matmul(x, w, mesh, data="data", over=over))(x, given)
    np.testing.assert_allclose(y, np.asarray(x) @ dense, rtol=1e-4, atol=1e-4)
    assert y.sharding.shard_shape(y.shape) == ((2, 6) if over == "n" else (2, 24))


def test_axes_and_parts_must_fit_the_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    w, _ = random_weight(256, 24, 32, [2] * 8)
    for axes in ({"model": "heads"}, {"data": "model", "model": "model"}):
        with pytest.raises(ValueError, match="the mesh has"):
            sharded_matmul(random_x(4, 256), w, mesh, **axes)
    for given in (w, stack_parts(w, 2, over="k")):
        with pytest.raises(ValueError, match="parts over k, expected 4"):
            sharded_matmul(random_x(4, 256), given, mesh, data="data", over="k")


@pytest.mark.parametrize("over", ["k", "n"])
def test_parts_are_the_weight_in_order(over):
    w, _ = random_weight(256, 24, 32, [3, 1, 2, 1, 3, 3, 2, 1])
    stacked = stack_parts(w, 4, over=over)
    found = [dequantize(part(stacked, i)) for i in range(4)]
    np.testing.assert_array_equal(np.concatenate(found, axis="kn".index(over)), dequantize(w))


def test_gradient_over_input_channels():
    w, dense = random_weight(128, 6, 32, [1, 2, 3, 2])
    sharded = product(4, "k")
    gradient = jax.grad(lambda x: (sharded(x, stack_parts(w, 4, over="k")) ** 2).sum())(random_x(3, 128))
    expected = 2 * (np.asarray(random_x(3, 128)) @ dense) @ dense.T
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-3)


EXPLICIT = {  # rows of x, channels of w
    "rows": (P("data"), P()),
    "channels": (P(), P(None, "model")),
    "both": (P("data"), P(None, "model")),
    "the same": (P("data"), P(None, "data")),
    "K": (P(None, "model"), P()),
}


@pytest.mark.parametrize("m", [4, slow(40)])
@pytest.mark.parametrize("name", [slow("rows"), slow("channels"), "both", slow("the same"), "K"])
def test_explicit_axes_need_nothing_said(name, m):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    w, dense = random_weight(96, 16, 32, [1, 2, 3])
    x, residual, bias = random_x(m, 96), random_x(m, 16, seed=2), random_x(16)
    wanted = np.asarray(x) @ dense + np.asarray(residual) + np.asarray(bias)
    rows, channels = (NamedSharding(mesh, spec) for spec in EXPLICIT[name])
    whole = NamedSharding(mesh, P())
    x, residual = jax.device_put(x, rows), jax.device_put(residual, whole)
    w = jax.tree.map(lambda leaf: jax.device_put(leaf, channels if leaf.ndim == 2 else whole), w)

    @jax.jit
    def both(x, w, residual):
        def loss(x):
            y = mixed_matmul(x, w, residual=residual, bias=bias)
            return (y**2).sum() / 2, y

        return jax.grad(loss, has_aux=True)(x)

    gradient, y = both(x, w, residual)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, wanted @ dense.T, rtol=1e-3, atol=1e-3)
    assert gradient.sharding.is_equivalent_to(rows, 2)


def test_explicit_axes_under_vmap_and_of_experts():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    w, dense = random_weight(96, 16, 32, [1, 2, 3])
    x = jax.device_put(random_x(8, 3, 96), NamedSharding(mesh, P("data")))
    found = jax.jit(jax.vmap(lambda x: mixed_matmul(x, w), in_axes=1, out_axes=1))(x)
    np.testing.assert_allclose(found, np.asarray(x) @ dense, rtol=1e-4, atol=1e-4)
    rows, sizes = x[:, 0], jax.numpy.asarray([3, 5])
    found = jax.jit(mixed_ragged_dot)(rows, stack([w, w]), sizes)
    np.testing.assert_allclose(found, np.asarray(rows) @ dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("over", "parts"), [("k", 3), ("k", 0), ("n", 5), ("n", 0)])
def test_parts_must_be_equal(over, parts):
    w, _ = random_weight(128, 6, 32, [1, 2, 3, 2])
    with pytest.raises(ValueError, match=rf"{over.upper()} is \d+, expected a multiple"):
        stack_parts(w, parts, over=over)
