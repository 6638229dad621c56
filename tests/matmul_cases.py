"""Tests of ``mixed_matmul`` against float64 NumPy: one body of cases for every back end.

A back end's test file subclasses :class:`MatmulCases` and defines the call (``matmul``), the type to which
the back end rounds ``x`` (``x_dtype``), and its remaining error (``tolerance``).
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_layout import oracle_weight, random_parts

from bench import check
from pallas_kernels import chips, mixed_matmul, pack, scales
from pallas_kernels.gpu import config as gpu_config

MOSAIC_GPU = jax.__version_info__ >= gpu_config.JAX
"""True if this version of JAX can build the GPU kernel."""

ALLOCATIONS = {
    "balanced": lambda g, n: [n - 1] * (g // 3) + [n + 1] * (g // 3) + [n] * (g - 2 * (g // 3)),
    "all-low": lambda g, n: [n - 1] * g,
    "all-high": lambda g, n: [n + 1] * g,
    "unbalanced": lambda g, n: [n - 1] + [n + 1] * (g - 1),
}


def random_weight(k, n, group_size, bits, seed=0, widths=None, scales_in_bytes=True, **kwargs):
    """Returns a packed weight with shuffled groups, and the same weight in float64."""
    parts = random_parts(k, n, group_size, np.random.default_rng(seed).permutation(bits), seed, widths)
    scale = parts["scale"]
    if scales_in_bytes:
        scale = np.asarray(scales.encoded(jnp.asarray(scale, jnp.float32)))
        parts["scale"] = np.asarray(scales.decoded(jnp.asarray(scale)))
    w = pack(**{**parts, "scale": scale}, group_size=group_size, widths=widths, **kwargs)
    return w, oracle_weight(**parts, group_size=group_size, widths=widths).astype(np.float64)


def random_x(*shape, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def slow(*values):
    """Marks a case for `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


SWEPT = {
    "allocation": list(ALLOCATIONS),
    "m": [1, 3, 8, 16, 17, 128],
    "group_size": [32, 64, 128],
    "mean_bits": [2, 3, 4],
    "dtype": ["float32", "bfloat16"],
}


def swept_in_pairs():
    """24 of the 432 combinations of :data:`SWEPT`, in which any two values of two parameters meet."""
    allocations, rows, sizes, means, dtypes = SWEPT.values()
    return [
        (allocations[a], rows[b], sizes[(a + b) % 3], means[(a + 2 * b) % 3], dtypes[(a // 2 + b) % 2])
        for a, b in itertools.product(range(len(allocations)), range(len(rows)))
    ]


class MatmulCases:
    """Cases that hold for every back end; pytest collects them from subclasses named ``Test...``.

    The error is measured relative to ``sum |x| |w|``, the sum of absolute terms, so that cancellation in the
    product does not count, and one bound serves all shapes.
    """

    implementation: str
    x_dtype: type | None = None  # type to which the back end rounds x first; None if it does not
    tolerance = 3e-6  # float32 accumulation of a few hundred terms

    def matmul(self, x, w, **kwargs):
        return jax.jit(partial(mixed_matmul, implementation=self.implementation))(x, w, **kwargs)

    def assert_close(self, found, x, dense, tolerance=None):
        x = x if self.x_dtype is None else jnp.asarray(x, self.x_dtype)
        x = np.asarray(x, np.float64)
        assert found.dtype == jnp.float32
        assert found.shape == (*x.shape[:-1], dense.shape[1])
        error = np.abs(np.asarray(found, np.float64) - x @ dense)
        assert np.max(error / (np.abs(x) @ np.abs(dense) + 1e-9)) < (tolerance or self.tolerance)

    def check(self, m, k, n, group_size, bits, *, seed=0, dtype=jnp.float32, **kwargs):
        w, dense = random_weight(k, n, group_size, bits, seed, **kwargs)
        x = random_x(m, k, dtype=dtype)
        self.assert_close(self.matmul(x, w), x, dense)

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_every_width(self, bits):
        self.check(1, 70, 9, 32, [bits] * 3)

    @pytest.mark.parametrize("bits", [slow(1), 3, slow(4), 8])
    def test_every_width_with_many_rows(self, bits):
        self.check(48, 70, 9, 32, [bits] * 3)

    @pytest.mark.parametrize("m", [1, 48])
    def test_all_widths_at_once(self, m):
        self.check(m, 255, 5, 32, range(1, 9))

    @pytest.mark.parametrize(
        ("allocation", "mean_bits", "m"),
        [
            slow("balanced", 2, 1),
            ("balanced", 3, 17),
            slow("balanced", 4, 1),
            slow("all-low", 2, 17),
            slow("all-high", 3, 1),
            ("all-high", 4, 17),
            ("unbalanced", 2, 1),
            slow("unbalanced", 2, 17),
        ],
    )
    def test_allocations(self, allocation, mean_bits, m):
        bits = ALLOCATIONS[allocation](6, mean_bits)
        widths = (mean_bits - 1, mean_bits, mean_bits + 1)
        self.check(m, 180, 17, 32, bits, seed=mean_bits, widths=widths)

    @pytest.mark.parametrize(
        ("m", "dtype"),
        [
            (1, "bfloat16"),
            slow(3, "float32"),
            slow(8, "bfloat16"),
            slow(16, "float32"),
            (17, "bfloat16"),
            (128, "float32"),
            slow(128, "bfloat16"),
        ],
    )
    def test_rows_and_dtypes(self, m, dtype):
        self.check(m, 90, 24, 32, [1, 2, 3], dtype=jnp.dtype(dtype))

    @pytest.mark.parametrize(
        ("m", "group_size", "n"),
        [slow(1, 64, 24), (16, 64, 130), slow(16, 128, 300), (3, 128, 24), slow(128, 128, 130)],
    )
    def test_group_sizes_and_short_last_group(self, m, group_size, n):
        self.check(m, 5 * group_size - 5, n, group_size, [1, 2, 3, 3, 2])

    @pytest.mark.parametrize("bits", [slow([1, 2, 3]), slow([1, 1, 2, 3, 3, 3]), [1, 1, 1, 2, 2, 3]])
    def test_odd_and_even_segments_of_large_groups(self, bits):
        """Odd numbers of groups: the next segment's first row is not aligned to tiles of eight rows."""
        self.check(16, 128 * len(bits), 128, 128, bits)

    @pytest.mark.parametrize("m", [1, slow(16), slow(128)])
    def test_scales_in_bfloat16(self, m):
        self.check(m, 90, 24, 32, [1, 2, 3], scales_in_bytes=False)

    def test_an_outlier_in_x(self):
        """An outlier channel, a thousand times the rest as in real activations, must not drown the others."""
        w, dense = random_weight(512, 16, 128, [1, 2, 2, 3])
        x = random_x(4, 512).at[1, 77].set(3000.0)
        self.assert_close(self.matmul(x, w), x, dense)

    def test_zeros_in_x(self):
        w, dense = random_weight(256, 16, 128, [2, 3])
        x = random_x(4, 256).at[1].set(0.0)
        found = self.matmul(x, w)
        self.assert_close(found, x, dense)
        assert not np.any(np.asarray(found)[1])

    @pytest.mark.slow
    @pytest.mark.parametrize(list(SWEPT), swept_in_pairs())
    def test_sweep(self, allocation, m, group_size, mean_bits, dtype):
        bits = ALLOCATIONS[allocation](7, mean_bits)
        widths = (mean_bits - 1, mean_bits, mean_bits + 1)
        k = 7 * group_size - 13
        self.check(m, k, 200, group_size, bits, seed=m, dtype=jnp.dtype(dtype), widths=widths)

    def test_segment_sizes_are_data(self):
        traces = []

        @jax.jit
        def product(x, w):
            traces.append(w.words.shape)
            return self.matmul(x, w)

        x = random_x(1, 128)
        for seed, bits in enumerate(([2, 2, 2, 2], [1, 2, 2, 3], [1, 1, 3, 3], [3, 1, 2, 2])):
            w, dense = random_weight(128, 8, 32, bits, seed, widths=(1, 2, 3))
            self.assert_close(product(x, w), x, dense)
        assert len(traces) == 1
        assert product._cache_size() == 1


def on_device(platform):
    """Skips tests of a kernel unless there is a device of its platform, "cuda" or "tpu"."""
    here = chips.of_target()
    return pytest.mark.skipif(
        here.platform != platform,
        reason=f"needs a device of platform {platform}, found {here.name}; run this file on one",
    )


class DeviceCases(MatmulCases):
    """The shared cases on a device, with the shapes and configurations of real products (`bench.check`)."""

    @pytest.mark.parametrize(
        "weight",
        list(dict.fromkeys(case.weight for case in check.CASES)),
        ids=lambda weight: "x".join(map(str, weight)),
    )
    def test_real_products(self, weight):
        cases = [case for case in check.CASES if case.weight == weight]
        records = list(check.check(cases, implementation=self.implementation))
        assert records
        assert [record for record in records if not record["ok"]] == []
