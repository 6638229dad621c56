"""The TPU kernels in the TPU interpreter; memory starts as NaN, so that uninitialised reads show.

The interpreter takes seconds per case, so a few cases cover the essentials, and the shared cases of all back
ends are marked slow. Race detection needs two CPU cores: on one, the interpreter of jax 0.12 deadlocks.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from matmul_cases import DeviceCases, MatmulCases, on_device, random_weight, random_x, slow
from test_layout import dequantize

from pallas_kernels.tpu import decode as kernel
from pallas_kernels.tpu import gather, layers
from pallas_kernels.tpu.decode import Config, heuristic

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan")
RACES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")
TWO_CPUS = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="deadlocks on one CPU core")


class TpuCases(MatmulCases):
    """Base of both strategies' cases; chunks are minimal, so that there is less to unroll and compile."""

    config: Config
    prefill_tolerance = 4e-3  # weights rounded to bfloat16

    def assert_close(self, found, x, dense, tolerance=None):
        if tolerance is None and x.shape[0] > kernel.DECODE_ROWS:
            x, tolerance = x.astype(jnp.bfloat16), self.prefill_tolerance
        super().assert_close(found, x, dense, tolerance)

    def matmul(self, x, w, interpret=INTERPRET, digits=2, **kwargs):
        config = dataclasses.replace(self.config, digits=digits)
        product = jax.jit(
            lambda x, w: kernel.mixed_matmul(x, w, config=config, interpret=interpret, **kwargs)
        )
        return product(x, w)


class Bfloat16(TpuCases):
    config = Config(strips=2, groups=2, join=2, unpack="bfloat16", vector="bfloat16")
    x_dtype = jnp.bfloat16
    tolerance = 2e-5  # float32 sums of x * (128 + q); 128 * sum(x) is subtracted

    def test_an_outlier_in_x(self):
        """The sums temporarily contain 128 times the outlier, which costs the rest seven bits of float32."""
        w, dense = random_weight(512, 16, 128, [1, 2, 2, 3])
        x = random_x(4, 512).at[1, 77].set(3000.0)
        self.assert_close(self.matmul(x, w), x, dense, tolerance=1e-4)


class Int8(TpuCases):
    config = Config(strips=1, groups=2, deep=True, unpack="int8", vector="bfloat16")
    tolerance = 1e-4  # fixed point of x, see the module's docstring

    def test_an_outlier_in_x(self):
        """Two digits next to an outlier are as exact as rounding x to bfloat16, and three are more exact."""
        w, dense = random_weight(512, 16, 128, [1, 2, 2, 3])
        x = random_x(4, 512).at[1, 77].set(3000.0)
        self.assert_close(self.matmul(x, w), x, dense, tolerance=2.0**-9)
        self.assert_close(self.matmul(x, w, digits=3), x, dense)


class Joined(Int8):
    config = Config(strips=2, groups=2, unpack="int8")


INT8 = pytest.mark.parametrize("cases", [Int8()], ids=["int8"])


@pytest.mark.parametrize(
    ("cases", "m", "k", "n", "group_size", "bits"),
    [
        # Odd segments, so that groups are not aligned to registers of 8 rows; a short last group; a tile past
        # N.
        (Int8(), 1, 635, 300, 128, [1, 3, 2, 1, 3]),
        (Bfloat16(), 17, 380, 130, 128, [1, 2, 3]),
        (Int8(), 17, 127, 40, 32, [5, 6, 7, 8]),
        slow(Joined(), 3, 384, 300, 128, [1, 2, 3]),
        slow(Bfloat16(), 1, 255, 40, 32, range(1, 9)),
    ],
    ids=["int8-odd", "bfloat16", "int8-wide", "joined", "bfloat16-all"],
)
def test_values(cases, m, k, n, group_size, bits):
    cases.check(m, k, n, group_size, list(bits))


@INT8
@pytest.mark.parametrize(
    ("m", "group_size", "bits", "widths"),
    [slow(16, 64, [1, 3, 3, 3], (1, 2, 3)), (3, 256, [1, 2], (1, 2)), slow(8, 128, [4, 4], (2, 3, 4))],
)
def test_group_sizes_and_empty_segments(cases, m, group_size, bits, widths):
    cases.check(m, group_size * len(bits), 130, group_size, bits, widths=widths, dtype=jnp.bfloat16)


@pytest.mark.parametrize(  # for Config.vector bfloat16 and float32
    ("cases", "m", "group_size", "bits"),
    [
        (Int8(), 40, 32, [1, 3, 6, 8]),
        slow(Joined(), 40, 32, [1, 3, 6, 8]),
        slow(Int8(), 48, 32, [1, 2, 3, 4]),
        slow(Joined(), 48, 32, [1, 2, 3, 4]),
        slow(Int8(), 128, 128, [1, 3, 2]),
        (Joined(), 128, 128, [1, 3, 2]),
        (Int8(), 48, 64, [2, 4]),
        slow(Joined(), 48, 64, [2, 4]),
        slow(Int8(), 40, 256, [1, 4]),
        (Joined(), 40, 256, [1, 4]),
    ],
)
def test_prefill(cases, m, group_size, bits):
    cases.check(m, group_size * len(bits) - 5, 130, group_size, list(bits))


@INT8
def test_an_outlier_in_x(cases):
    cases.test_an_outlier_in_x()


@INT8
def test_zeros_in_x(cases):
    cases.test_zeros_in_x()


@pytest.mark.parametrize(
    ("m", "outlier", "digits", "most"),
    [
        slow(1, False, 2, 1.2e-5),
        slow(16, False, 2, 2e-5),
        slow(1, True, 2, 1.8e-3),
        slow(16, True, 2, 2.2e-3),
        slow(16, True, 3, 4e-5),
    ],
)
def test_error_of_digits(m, outlier, digits, most):
    """The figures of docs/kernels.md, relative to ``sum |x| |w|``; bfloat16 gives 3e-4 for ordinary x."""
    w, dense = random_weight(1024, 256, 128, [1, 1, 2, 2, 2, 2, 3, 3], seed=1)
    x = random_x(m, 1024)
    x = x.at[m // 2, 77].set(3000.0) if outlier else x
    Int8().assert_close(Int8().matmul(x, w, digits=digits), x, dense, tolerance=most)


def test_a_row_that_is_not_finite_harms_no_other():
    cases = Int8()
    w, dense = random_weight(256, 16, 128, [2, 3])
    x = random_x(4, 256).at[1, 3].set(jnp.inf).at[2, 200].set(jnp.nan)
    found = cases.matmul(x, w)
    assert not jnp.any(jnp.isfinite(found[1:3]))
    cases.assert_close(found[::3], x[::3], dense)


@pytest.mark.slow
def test_waiting_for_earlier_results_changes_nothing():
    w, _ = random_weight(512, 512, 128, [1, 2, 2, 3])
    x = random_x(16, 512, dtype=jnp.bfloat16)
    config = Config(strips=4, groups=2, join=2, deep=True)
    found = [
        kernel.mixed_matmul(x, w, config=dataclasses.replace(config, ahead=ahead), interpret=INTERPRET)
        for ahead in (0, 1)
    ]
    np.testing.assert_array_equal(*map(np.asarray, found))


@INT8
@pytest.mark.parametrize("m", [slow(40), 1])
def test_bias(cases, m):
    w, dense = random_weight(96, 6, 32, [1, 2, 3])
    x, bias = random_x(m, 96, dtype=jnp.bfloat16), random_x(6)
    found = cases.matmul(x, w, bias=bias)
    cases.assert_close(found - jnp.broadcast_to(bias, (m, 6)), x, dense, tolerance=1e-2 if m > 32 else 1e-4)


@INT8
def test_segment_sizes_are_data(cases):
    cases.test_segment_sizes_are_data()


@TWO_CPUS
@pytest.mark.parametrize(
    ("cases", "m", "cores"),
    [(Int8(), 3, 1), (Bfloat16(), 3, 2), (Int8(), 40, 1)],
    ids=["int8", "bfloat16-two-cores", "prefill"],
)
def test_no_races(cases, m, cores):
    """Two grid steps per core, so that copies of words overlap with the computation."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    columns = 2 * cores * 128 * cases.config.strips
    w, dense = random_weight(384, columns, 128, [1, 2, 3])
    x = random_x(m, 384, dtype=jnp.bfloat16)
    config = Config(cases.config.strips, 1, unpack=cases.config.unpack, cores=cores)
    found = jax.jit(lambda x, w: kernel.mixed_matmul(x, w, config=config, interpret=RACES))(x, w)
    cases.assert_close(found, x, dense)
    assert not interpret_pallas_call.races.races_found


@TWO_CPUS
@pytest.mark.parametrize("cores", [1, slow(2)])
def test_no_races_side_by_side(cores):
    """A core's first tile may be any of a weight's tiles, and x is prepared again for the next weight."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    made, dense = side_by_side(n=(256, 128, 128))
    x, config = random_x(3, 4 * 128), Config(1, 2, cores=cores)
    w = layers.prepare(made[:1], stacked=False)
    found = jax.jit(lambda w: kernel.mixed_matmul(x, w, config=config, interpret=RACES))(w)
    assert np.all(
        np.abs(found - np.asarray(x, np.float64) @ dense[0]) <= 5e-5 * (np.abs(x) @ np.abs(dense[0]))
    )
    assert not interpret_pallas_call.races.races_found


@pytest.mark.slow
class TestInt8(Int8):
    pass


@pytest.mark.slow
class TestBfloat16(Bfloat16):
    pass


@on_device("tpu")
class TestMosaicTpuOnDevice(DeviceCases):
    implementation = "mosaic_tpu"
    tolerance = 5e-3  # x, and in prefill the weights, rounded to bfloat16


def test_refuses_odd_group_sizes():
    w, _ = random_weight(192, 6, 96, [1, 2])
    with pytest.raises(NotImplementedError, match="group size"):
        kernel.mixed_matmul(random_x(2, 192), w, config=Config())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"strips": 0},
        {"strips": 3, "join": 2},
        {"groups": 0},
        {"batch": 0},
        {"unpack": "int4"},
        {"digits": 1},
        {"vector": "float16"},
        {"ahead": -1},
        {"cores": 0},
    ],
)
def test_config_rejects(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        Config(**kwargs)


@pytest.mark.parametrize(
    ("kind", "unpack", "cores"),
    [("TPU v5 lite", "int8", 1), ("TPU v5", "int8", 2), ("TPU v6 lite", "int8", 1), ("TPU7x", "bfloat16", 1)],
)
def test_heuristic(kind, unpack, cores):
    for m in (1, 16, 32, 2048):
        for n in (100, 128, 4096, 11008):
            config = heuristic(kind, m, 4096, n)
            assert (config.unpack, config.cores) == (unpack, cores)


@pytest.mark.parametrize("m", [2, 40])
def test_layers_are_read_where_they_lie(m):
    """Layers with other segments, orders and rows of words, and with columns that fill no register."""
    bits = [1, 2, 3, 3], [2, 2, 2, 2], [3, 2, 1, 1]
    made = [random_weight(4 * 128, 200, 128, own, i, widths=(1, 2, 3)) for i, own in enumerate(bits)]
    w = layers.prepare([[one] for one, _ in made], stacked=True)
    x, config = random_x(m, 4 * 128), Config(strips=2, groups=2, join=2)
    run = jax.jit(lambda w, i: kernel.mixed_matmul(x, w.at(i), config=config, interpret=INTERPRET))
    for i, (one, dense) in enumerate(made):
        bound = (4e-3 if m > kernel.DECODE_ROWS else 5e-5) * (np.abs(x) @ np.abs(dense))
        assert np.all(np.abs(run(w, jnp.int32(i)) - np.asarray(x, np.float64) @ dense) <= bound)
        np.testing.assert_array_equal(dequantize(w.at(jnp.int32(i))), dequantize(one))


def side_by_side(n=(200, 384, 130)):
    """Two layers of three weights with the same input but different layouts, packed and in float64."""
    bits = [([1, 2, 3, 3], [2, 2, 2, 2], [3, 4, 4, 4]), ([3, 3, 1, 1], [3, 2, 1, 2], [4, 4, 4, 3])]
    widths = (1, 2, 3), (1, 2, 3), (3, 4)
    made = [
        [random_weight(4 * 128, *one, i, widths=own) for one, own in zip(zip(n, [128] * 3, layer), widths)]
        for i, layer in enumerate(bits)
    ]
    return [[w for w, _ in layer] for layer in made], [np.hstack([d for _, d in layer]) for layer in made]


@pytest.mark.parametrize(
    ("m", "config"), [(2, Config(2, 2, join=2)), slow(17, Config(1, 1)), (40, Config(2, 2))]
)
def test_weights_that_read_one_input_are_one_product(m, config):
    """Weights with other widths, segments, orders and rows of words; columns fill no tile or register."""
    made, dense = side_by_side()
    w, x = layers.prepare(made, stacked=True), random_x(m, 4 * 128)
    run = jax.jit(lambda w, i: kernel.mixed_matmul(x, w.at(i), config=config, interpret=INTERPRET))
    for i in range(2):
        bound = (4e-3 if m > kernel.DECODE_ROWS else 5e-5) * (np.abs(x) @ np.abs(dense[i]))
        assert np.all(np.abs(run(w, jnp.int32(i)) - np.asarray(x, np.float64) @ dense[i]) <= bound)
        alone = jnp.concatenate([dequantize(one) for one in made[i]], axis=1)
        np.testing.assert_array_equal(dequantize(w.at(jnp.int32(i))), alone)


def test_a_prepared_table_is_looked_up():
    w, dense = random_weight(256, 200, 64, [2, 3, 4, 2])
    index = jnp.asarray([[0, 199], [7, 128]])
    found = layers.prepare([[w]], stacked=False).columns(index, jnp.float32)
    np.testing.assert_array_equal(found, np.float32(dense).T[np.asarray(index)])
    words = layers.prepare([[w]], stacked=False).words[0]
    found = gather.columns_of(words, index.reshape(-1), interpret=True)
    np.testing.assert_array_equal(found, words[:, index.reshape(-1)])
