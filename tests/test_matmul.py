"""``mixed_matmul`` against float64, one body of cases for every back end: subclass it and name yours."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layout import oracle_weight, random_parts

from pallas_kernels import mixed_matmul, pack

ALLOCATIONS = {
    "balanced": lambda g, n: [n - 1] * (g // 3) + [n + 1] * (g // 3) + [n] * (g - 2 * (g // 3)),
    "all-low": lambda g, n: [n - 1] * g,
    "all-high": lambda g, n: [n + 1] * g,
    "unbalanced": lambda g, n: [n - 1] + [n + 1] * (g - 1),
}


def random_weight(k, n, group_size, bits, seed=0, **kwargs):
    """A packed weight with its groups shuffled, and the same weight in float64."""
    parts = random_parts(k, n, group_size, np.random.default_rng(seed).permutation(bits), seed)
    w = pack(**parts, group_size=group_size, **kwargs)
    return w, oracle_weight(**parts, group_size=group_size).astype(np.float64)


def random_x(*shape, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(found, x, dense):
    """Within float32 rounding of the float64 product, measured by the sum of absolute terms."""
    x = np.asarray(x, np.float64)
    assert found.dtype == jnp.float32
    error = np.abs(np.asarray(found, np.float64) - x @ dense)
    assert np.max(error / (np.abs(x) @ np.abs(dense) + 1e-9)) < 3e-6


class TestXla:
    implementation = "xla"

    def matmul(self, x, w, **kwargs):
        return jax.jit(partial(mixed_matmul, implementation=self.implementation))(x, w, **kwargs)

    @pytest.mark.parametrize("bits", range(1, 9))
    @pytest.mark.parametrize("m", [1, 16])
    def test_every_width(self, bits, m):
        w, dense = random_weight(70, 9, 32, [bits] * 3)
        x = random_x(m, 70)
        assert_close(self.matmul(x, w), x, dense)

    def test_all_widths_at_once(self):
        w, dense = random_weight(255, 5, 32, range(1, 9))
        x = random_x(1, 255)
        assert_close(self.matmul(x, w), x, dense)

    @pytest.mark.parametrize("allocation", ALLOCATIONS)
    @pytest.mark.parametrize("mean_bits", [2, 3, 4])
    @pytest.mark.parametrize("m", [1, 17])
    def test_allocations(self, allocation, mean_bits, m):
        w, dense = random_weight(180, 17, 32, ALLOCATIONS[allocation](6, mean_bits), seed=mean_bits)
        x = random_x(m, 180)
        assert_close(self.matmul(x, w), x, dense)

    @pytest.mark.parametrize("m", [1, 3, 8, 16, 17, 128])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_rows_and_dtypes(self, m, dtype):
        w, dense = random_weight(90, 24, 32, [1, 2, 3])
        x = random_x(m, 90, dtype=dtype)
        assert_close(self.matmul(x, w), x, dense)

    @pytest.mark.parametrize("m", [1, 17])
    @pytest.mark.parametrize("group_size", [64, 128])
    def test_group_sizes(self, m, group_size):
        k = 3 * group_size - 5
        w, dense = random_weight(k, 24, group_size, [1, 2, 3])
        x = random_x(m, k)
        assert_close(self.matmul(x, w), x, dense)

    def test_dense_product_when_rows_are_many(self):
        w, _ = random_weight(130, 24, 32, [1, 2, 3, 2, 2], dtype=jnp.bfloat16)
        x = random_x(64, 130)
        dense = jnp.dot(x.astype(jnp.bfloat16), jax.jit(w.dequantize)(), preferred_element_type=jnp.float32)
        np.testing.assert_array_equal(np.asarray(self.matmul(x, w)), np.asarray(dense))

    @pytest.mark.parametrize("shape", [(96,), (2, 96), (2, 3, 96), (0, 96), (4, 5, 96)])
    def test_leading_axes_and_bias(self, shape):
        w, dense = random_weight(96, 6, 32, [1, 2, 3])
        x, bias = random_x(*shape), random_x(6)
        found = self.matmul(x, w, bias=bias)
        np.testing.assert_allclose(found, np.asarray(x) @ dense + np.asarray(bias), rtol=1e-4, atol=1e-5)
        assert found.shape == (*shape[:-1], 6)

    @pytest.mark.parametrize("m", [2, 20])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_gradient_is_the_dense_one(self, m, dtype):
        w, dense = random_weight(96, 6, 32, [1, 2, 3])
        dense = jnp.asarray(dense, jnp.float32)
        x, bias = random_x(m, 96, dtype=dtype), random_x(6)

        def loss(x, bias, product):
            return jnp.sum(jnp.sin(product(x) + jnp.broadcast_to(bias, (m, 6))))

        grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
        found = grad(x, bias, lambda x: self.matmul(x, w))
        expected = grad(x, bias, lambda x: x.astype(jnp.float32) @ dense)
        for a, b in zip(found, expected):
            assert a.dtype == b.dtype
            tolerance = 2e-2 if a.dtype == jnp.bfloat16 else 1e-4
            np.testing.assert_allclose(
                np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=tolerance, atol=tolerance / 10
            )

    def test_weight_is_a_constant_of_the_gradient(self):
        w, _ = random_weight(96, 6, 32, [1, 2, 3])
        grad = jax.grad(lambda w: self.matmul(random_x(2, 96), w).sum(), allow_int=True)(w)
        assert not np.any(np.asarray(grad.scale, np.float32))
        assert grad.words.dtype == jax.dtypes.float0

    @pytest.mark.parametrize("m", [1, 12])
    def test_vmap(self, m):
        w, dense = random_weight(96, 6, 32, [1, 2, 3])
        x = random_x(3, m, 96)
        assert_close(jax.vmap(lambda x: self.matmul(x, w))(x), x, dense)

    @pytest.mark.parametrize("m", [1, 12])
    def test_scan_over_stacked_layers(self, m):
        allocations = [1, 2, 3], [2, 2, 2], [3, 2, 1]
        layers = [random_weight(96, 96, 32, bits, i, widths=(1, 2, 3)) for i, bits in enumerate(allocations)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(w for w, _ in layers))
        x = random_x(m, 96)
        found, _ = jax.jit(lambda x, ws: jax.lax.scan(lambda x, w: (self.matmul(x, w), None), x, ws))(
            x, stacked
        )
        expected = np.asarray(x, np.float64)
        for _, dense in layers:
            expected = expected @ dense
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())

    def test_segment_sizes_are_data(self):
        traces = []

        @jax.jit
        def product(x, w):
            traces.append(w.words.shape)
            return self.matmul(x, w)

        x = random_x(1, 128)
        for seed, bits in enumerate(([2, 2, 2, 2], [1, 2, 2, 3], [1, 1, 3, 3], [3, 1, 2, 2])):
            w, dense = random_weight(128, 8, 32, bits, seed, widths=(1, 2, 3))
            assert_close(product(x, w), x, dense)
        assert len(traces) == 1
        assert product._cache_size() == 1


@pytest.mark.parametrize(
    ("x_shape", "kwargs", "message"),
    [
        ((3, 95), {}, r"x has shape \(3, 95\), expected \[\.\.\., 96\]"),
        ((3, 96), {"bias": jnp.zeros(5)}, "bias has shape"),
        ((3, 96), {"implementation": "triton"}, "implementation is 'triton'"),
        ((3, 96), {"implementation": ("xla", "cuda")}, "expected one or more of"),
        ((3, 96), {"implementation": ()}, "expected one or more of"),
    ],
)
def test_rejects_what_the_caller_got_wrong(x_shape, kwargs, message):
    w, _ = random_weight(96, 6, 32, [1, 2, 3])
    with pytest.raises(ValueError, match=message):
        mixed_matmul(jnp.zeros(x_shape), w, **kwargs)


def test_rejects_integers_scalars_and_stacked_weights():
    w, _ = random_weight(96, 6, 32, [1, 2, 3])
    for x in (jnp.zeros((3, 96), jnp.int32), jnp.float32(1)):
        with pytest.raises((ValueError, TypeError)):  # TypeError from the annotations, checked in tests
            mixed_matmul(x, w)
    with pytest.raises(ValueError, match="scan over stacked"):
        mixed_matmul(jnp.zeros((3, 96)), jax.tree.map(lambda leaf: leaf[None], w))


@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
def test_a_missing_back_end_says_so_or_gives_way(name):
    w, dense = random_weight(96, 6, 32, [1, 2, 3])
    x = random_x(2, 96)
    with pytest.raises(NotImplementedError, match=name):
        mixed_matmul(x, w, implementation=name)
    assert_close(mixed_matmul(x, w, implementation=(name, "xla")), x, dense)
