"""The GPU back end in interpret mode: the shared cases, and the kernel's own limits and tiles.

Interpret mode uses ``jnp.dot`` for the tensor cores and has no registers: ``tests/test_gpu_registers.py``
tests these.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_cases import DeviceCases, MatmulCases, on_device, random_weight, random_x, slow
from test_layout import dequantize

from pallas_kernels import InputNorm, mixed_matmul
from pallas_kernels.gpu import joined, kernel
from pallas_kernels.gpu.kernel import Config
from pallas_kernels.gpu.operands import fields, places
from pallas_kernels.planes import pack_group, pieces

# The interpreted kernel becomes an XLA program, whose compilation takes all the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def small(m: int, n: int) -> Config:
    """The smallest code: no pipelining, few blocks. Steps of several groups have tests of their own."""
    return Config(16 if m <= 32 else 64, 32 if n <= 32 else 128, stages=1, groups_per_step=1)


class TestMosaicGpu(MatmulCases):
    implementation = "mosaic_gpu"
    x_dtype = jnp.bfloat16
    tolerance = 1e-5  # products are summed with 128 + code instead of code

    def matmul(self, x, w, **kwargs):
        kwargs = {"config": small(x.shape[0], w.shape[1]), **kwargs}
        product = partial(kernel.mixed_matmul, interpret=True, **kwargs)
        if isinstance(w.words, jax.core.Tracer):  # compiler options go to the outermost jit
            return product(x, w)
        return jax.jit(product, compiler_options=QUICK)(x, w)

    def test_segment_sizes_are_data(self):
        # The interpreter's first run in a process changes JAX's tracing context, which causes one more trace.
        w, _ = random_weight(32, 8, 32, [1])
        self.matmul(random_x(1, 32), w)
        super().test_segment_sizes_are_data()

    @pytest.mark.parametrize(("split_k", "n"), [slow(1, 72), (2, 72), (4, 40), slow(4, 30)])
    def test_bias_split_and_ragged_columns(self, split_k, n):
        w, dense = random_weight(7 * 32, n, 32, [1, 2, 2, 2, 2, 3, 3])
        x, bias = random_x(3, 7 * 32, dtype=jnp.bfloat16), random_x(n, seed=2)
        config = Config(block_n=32, stages=2, groups_per_step=2, split_k=split_k)
        found = self.matmul(x, w, bias=bias, config=config)
        self.assert_close(found - bias[None], x, dense)

    @pytest.mark.parametrize(("m", "split_k"), [(1, 1), (1, 2), slow(1, 4), (3, 2)])
    def test_what_a_product_is_added_to(self, m, split_k):
        """The kernel itself adds the residual to a single row, and writes one row."""
        w, dense = random_weight(7 * 32, 64, 32, [1, 2, 2, 2, 2, 3, 3])
        x, bias, residual = random_x(m, 7 * 32), random_x(64, seed=2), random_x(m, 64, seed=3)
        config = Config(block_n=32, stages=2, groups_per_step=2, split_k=split_k)
        found = self.matmul(x, w, bias=bias, residual=residual, config=config)
        self.assert_close(found - bias[None] - residual, x, dense)

    @pytest.mark.parametrize(
        "config",
        [
            Config(block_m=64, block_n=128, stages=2, groups_per_step=1),
            slow(Config(block_m=16, block_n=64, stages=3, groups_per_step=4)),
            Config(block_m=16, block_n=64, stages=2, groups_per_step=2, split_k=2),
        ],
    )
    def test_other_tiles(self, config):
        w, dense = random_weight(9 * 64, 136, 64, [1, 1, 1, 2, 2, 2, 2, 2, 3])
        x = random_x(70, 9 * 64)
        self.assert_close(self.matmul(x, w, config=config), x, dense)

    @pytest.mark.parametrize(("groups", "split_k"), [slow(17, 1), slow(33, 1), (33, 2)])
    def test_zero_points_of_many_groups(self, groups, split_k):
        w, dense = random_weight(groups * 32, 32, 32, [2] * groups)
        x = random_x(2, groups * 32) + 1.0  # sums that do not vanish
        config = Config(block_n=32, stages=1, groups_per_step=1, split_k=split_k)
        self.assert_close(self.matmul(x, w, config=config), x, dense)

    @pytest.mark.parametrize(
        ("config", "m"),
        [
            (Config(block_n=64, stages=2, groups_per_step=2), 3),
            slow(Config(block_n=32, stages=2, groups_per_step=2, split_k=4), 1),
            (Config(block_n=32, stages=1, groups_per_step=1, split_k=2), 3),
            slow(Config(block_n=32, stages=1, groups_per_step=1, split_k=2), 20),
        ],
    )
    def test_weights_side_by_side(self, config, m):
        """Joined weights with other widths, orders and numbers of columns.

        One fills several tiles; blocks are narrower than a tile, or would be wider.
        """
        bits = [2] * 12 + [3] * 6, [2] * 9 + [3] * 8 + [4], [2] * 18
        kinds = zip((128, 32, 64), bits, ((2, 3), (2, 3, 4), (2,)))
        cases = [
            random_weight(18 * 32, n, 32, own, i, widths=widths) for i, (n, own, widths) in enumerate(kinds)
        ]
        w = jax.jit(joined.join)([w for w, _ in cases])
        assert (w.shape, w.tiles, w.widths) == ((18 * 32, 224), (4, 1, 2), (2, 3, 4))
        x = random_x(m, 18 * 32, dtype=jnp.bfloat16) + 0.5
        dense = np.concatenate([dense for _, dense in cases], axis=1)
        self.assert_close(self.matmul(x, w, config=config), x, dense)
        np.testing.assert_array_equal(dequantize(w), np.float32(dense))

    @pytest.mark.parametrize(
        ("config", "m"),
        [
            (Config(block_n=32, stages=2, groups_per_step=1, split_k=4), 1),
            (Config(block_n=32, stages=1, groups_per_step=1, split_k=1), 20),
            slow(Config(block_m=32, block_n=64, stages=2, groups_per_step=2), 40),
        ],
    )
    def test_a_norm_before_weights_side_by_side(self, config, m):
        """Rows of very different size; the last group is short."""
        k = 17 * 32 + 16
        cases = [random_weight(k, 64, 32, [2] * 10 + [3] * 8, seed, widths=(2, 3)) for seed in range(2)]
        size = 10.0 ** np.linspace(-2, 3, m)[:, None]
        x = jnp.asarray(random_x(m, k) * size, jnp.float32)
        norm = InputNorm(1 + random_x(k, seed=3) / 4, 1e-5)
        w = joined.join([w for w, _ in cases]).behind(norm)
        dense = np.concatenate([dense for _, dense in cases], axis=1)
        bias = random_x(128, seed=4)
        found = np.asarray(self.matmul(x, w, bias=bias, config=config) - bias[None], np.float64)
        wide = np.asarray(x, np.float64)
        factor = 1 / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + norm.eps)
        rounded = np.asarray((x * norm.scale[None]).astype(jnp.bfloat16), np.float64) * factor
        assert np.max(np.abs(found - rounded @ dense) / (np.abs(rounded) @ np.abs(dense))) < 2e-5
        exact = wide * np.asarray(norm.scale, np.float64)[None] * factor
        np.testing.assert_allclose(norm(x), exact, rtol=1e-5)
        by_xla = mixed_matmul(x, w, implementation="xla")  # as with many rows
        assert np.max(np.abs(by_xla - exact @ dense) / (np.abs(exact) @ np.abs(dense))) < 4e-3

    def test_a_product_with_a_norm_in_it_has_no_gradient(self):
        w, _ = random_weight(64, 32, 32, [2, 3], widths=(2, 3))
        normed = joined.join([w]).behind(InputNorm(jnp.ones(64), 1e-5))
        with pytest.raises(NotImplementedError, match="no gradient"):
            jax.grad(lambda x: mixed_matmul(x, normed, implementation="xla").sum())(jnp.ones((1, 64)))

    def test_stacked_layers_share_one_program(self):
        allocations = [1, 2, 3], [2, 2, 2], [3, 2, 1]
        layers = [random_weight(96, 32, 32, bits, i, widths=(1, 2, 3)) for i, bits in enumerate(allocations)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(w for w, _ in layers))
        x = random_x(2, 96)
        product = partial(kernel.mixed_matmul, x, config=small(2, 32), interpret=True)
        run = jax.jit(lambda ws: jax.lax.scan(lambda _, w: (None, product(w)), None, ws))
        _, found = run(stacked)
        for y, (_, dense) in zip(found, layers):
            self.assert_close(y, x, dense)


@pytest.mark.parametrize("widths", [(1, 2, 3), (2, 4), (5, 6), (7, 8)])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_fields_read_the_layout(widths, group_size):
    """Masked words hold the codes of channels ``8 t ...``, at the same place for all widths."""
    g, place = group_size, places(widths, group_size)
    for bits in widths:
        codes = np.random.default_rng(bits).integers(0, 2**bits, (g, 1)).astype(np.uint32)
        words = pack_group(codes, bits)[:, 0]
        for piece in pieces(bits):
            found = np.zeros((g // 16, 8), np.uint32)
            for n, shift in piece:
                plane = words[g * shift // 32 : g * (shift + n) // 32]
                repeats = max(1, 8 // len(plane))
                tiles = np.concatenate([plane >> np.uint32(i * n) for i in range(repeats)]).reshape(-1, 8)
                for t, field in enumerate(fields(n, shift, g, place)):
                    by, tile = np.uint32(abs(field.by)), tiles[field.tile]
                    found[t] |= (tile >> by if field.by > 0 else tile << by) & np.uint32(field.mask)
            width = sum(n for n, _ in piece)
            assert max(place) + width <= 7
            expected = codes.reshape(2, g // 16, 8) >> np.uint32(piece[0][1]) & np.uint32(2**width - 1)
            for half in range(2):
                value = found >> np.uint32(16 * half) & np.uint32(0xFFFF)
                np.testing.assert_array_equal(value, expected[half] << place.astype(np.uint32)[:, None])


def test_refuses_what_it_cannot_do():
    w, _ = random_weight(256, 32, 256, [2])
    with pytest.raises(NotImplementedError, match="groups of 32, 64 or 128"):
        kernel.mixed_matmul(jnp.zeros((1, 256)), w, interpret=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"block_m": 8},
        {"block_n": 100},
        {"stages": 0},
        {"groups_per_step": 0},
        {"split_k": 3},
        {"split_k": 2, "block_m": 32},
    ],
)
def test_config_is_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)


@pytest.mark.parametrize("m", [1, 16, 33, 2048])
@pytest.mark.parametrize("n", [192, 576, 4096, 11008])
@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA B200", "other"])
def test_heuristic_fits(device, m, n):
    config = kernel.heuristic(device, m, 4096, n)
    assert config.block_n <= max(n, 128)
    assert config.block_m == (16 if m <= 64 else 64)


@on_device("cuda")
class TestMosaicGpuOnDevice(DeviceCases):
    implementation = "mosaic_gpu"
    x_dtype = jnp.bfloat16
    tolerance = 1e-4
