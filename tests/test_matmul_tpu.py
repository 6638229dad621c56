"""The TPU kernels in the TPU interpreter, with memory full of NaN, so that reading it uninitialised shows.

Race detection takes seconds a case, and needs two CPU cores: confined to one, the interpreter of jax 0.12
deadlocks. So a few cases run with it, on two simulated cores.
"""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from matmul_cases import MatmulCases, random_weight, random_x

from pallas_kernels import mosaic_tpu
from pallas_kernels.mosaic_tpu import Config, heuristic

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan")
RACES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan")


class TestTpuBfloat16(MatmulCases):
    unpack = "bfloat16"
    x_dtype = jnp.bfloat16
    tolerance = 2e-5  # float32 sums of x * (128 + q), from which 128 * sum(x) is taken again
    prefill_tolerance = 4e-3  # weights rounded to bfloat16
    most_bits = 8

    def assert_close(self, found, x, dense, tolerance=None):
        if tolerance is None and x.shape[0] > mosaic_tpu.DECODE_ROWS:
            x, tolerance = x.astype(jnp.bfloat16), self.prefill_tolerance
        super().assert_close(found, x, dense, tolerance)

    def matmul(self, x, w, **kwargs):
        if max(w.widths) > self.most_bits:
            pytest.skip("widths above 4 are for the bfloat16 strategy")
        config = Config(strips=2, join=2, unpack=self.unpack)
        return jax.jit(
            lambda x, w: mosaic_tpu.mixed_matmul(x, w, config=config, interpret=INTERPRET, **kwargs)
        )(x, w)

    @pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="deadlocks on one CPU core")
    @pytest.mark.parametrize("m", [3, 40])
    def test_no_races(self, m):
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call

        w, dense = random_weight(384, 300, 128, [1, 2, 3])
        x = random_x(m, 384, dtype=jnp.bfloat16)
        config = Config(strips=1, unpack=self.unpack)
        found = jax.jit(lambda x, w: mosaic_tpu.mixed_matmul(x, w, config=config, interpret=RACES))(x, w)
        self.assert_close(found, x, dense, tolerance=self.prefill_tolerance if m > 32 else None)
        assert not interpret_pallas_call.races.races_found

    def test_bias(self):
        w, dense = random_weight(96, 6, 32, [1, 2, 3])
        x, bias = random_x(3, 96, dtype=jnp.bfloat16), random_x(6)
        found = self.matmul(x, w, bias=bias)
        self.assert_close(found - jnp.broadcast_to(bias, (3, 6)), x, dense, tolerance=1e-4)


class TestTpuInt8(TestTpuBfloat16):
    unpack = "int8"
    x_dtype = None
    tolerance = 2e-4  # fixed point of x, see the module's docstring
    most_bits = 4


def test_int8_refuses_wide_codes():
    w, _ = random_weight(96, 6, 32, [1, 2, 5])
    with pytest.raises(NotImplementedError, match="widths up to 4"):
        mosaic_tpu.mixed_matmul(random_x(2, 96), w, config=Config(unpack="int8"))


@pytest.mark.parametrize(
    "kwargs", [{"strips": 0}, {"strips": 3, "join": 2}, {"groups": 12}, {"groups": 4}, {"unpack": "int4"}]
)
def test_config_rejects(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        Config(**kwargs)


@pytest.mark.parametrize(
    ("kind", "unpack"),
    [("TPU v5 lite", "int8"), ("TPU v5", "int8"), ("TPU v6 lite", "int8"), ("TPU7x", "bfloat16")],
)
def test_heuristic(kind, unpack):
    for m in (1, 16, 32, 2048):
        for n in (100, 128, 4096, 11008):
            assert heuristic(kind, m, 4096, n).unpack == unpack
