"""The computations of ``bench.aot`` on compilers' reports; ``tests/test_aot.py`` runs the compilers."""

import jax
import pytest

from bench import aot, aot_gpu, aot_programs, aot_reports, aot_tpu
from pallas_kernels import chips
from pallas_kernels.gpu import kernel

HLO = """
HloModule product

fused { p = bf16[16,8]{1,0} parameter(0)  ROOT r = bf16[8,16]{1,0} transpose(p) }

ENTRY %main (x: bf16[16,8], w: u32[4,8]) -> f32[16,8] {
  %x = bf16[16,8]{1,0} parameter(0)
  %w = u32[4,8]{1,0} parameter(1)
  %fusion.1 = bf16[8,16]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %start = (u32[4,8]{1,0}, u32[4,8]{1,0}) copy-start(%w)
  %done = u32[4,8]{1,0} copy-done(%start)
  ROOT %y = f32[16,8]{1,0} custom-call(%fusion.1, %done), custom_call_target="mosaic_gpu_v2"
}
"""


def test_launches_and_bytes_of_an_hlo_program():
    launches, read, written = aot_reports.kernels_of(HLO)
    x, w, y = 256, 128, 512
    assert launches == 3  # the fusion, the copy and the kernel
    assert read == x + w + 2 * w + (x + w)
    assert written == x + 2 * w + w + y


def test_floor_is_the_larger_of_memory_and_matrix_units():
    """H100, 4096 x 4096: 16 rows are bound by memory, 2048 rows by 989.4 TFLOP/s."""
    h100 = chips.BY_SHORT_NAME["h100"]
    decode = aot.against_floor(h100, 16, 4096, 4096, memory_us=1.5, takes_us=3.0)
    assert decode == {"floor_us": 1.5, "bound": "memory", "ratio": 2.0}
    prefill = aot.against_floor(h100, 2048, 4096, 4096, memory_us=16.4, takes_us=61.3)
    assert prefill["floor_us"] == pytest.approx(2 * 2048 * 4096**2 / 989.4e6)
    assert prefill["bound"] == "matrix units"
    assert prefill["ratio"] == 1.0  # 61 us would beat the chip's peak
    assert aot.against_floor(h100, 16, 64, 64, 1.5, None)["ratio"] is None


@pytest.mark.parametrize("target", aot_gpu.targets())
def test_described_gpus_are_in_the_table(target):
    """XLA's description of a GPU agrees, up to rounding, with the table that kernels and floors use."""
    device = aot_gpu.device(target)
    assert device.compute_capability.split(".")[0] in aot_gpu.described(target, "major")
    assert device.processors == int(aot_gpu.described(target, "core_count"))
    assert float(aot_gpu.described(target, "memory_bandwidth")) == pytest.approx(device.bandwidth, rel=0.05)
    assert int(aot_gpu.described(target, "l2_cache_size")) == pytest.approx(device.l2_bytes, rel=0.01)


@pytest.mark.parametrize("target", aot_tpu.TARGETS)
def test_tpus_are_in_the_table(target):
    assert chips.BY_SHORT_NAME[aot_tpu.TARGETS[target].device].platform == "tpu"


@pytest.mark.parametrize("target", ["h100", "a100", "b200"])
def test_the_gpu_kernel_is_that_of_the_target(target, monkeypatch):
    """Blocks are chosen for the target, by its multiprocessors, not for this machine's CPU."""
    chosen, heuristic = [], kernel.heuristic

    def spy(device_kind, *product):
        chosen.append((device_kind, heuristic(device_kind, *product)))
        return chosen[-1][1]

    monkeypatch.setattr(kernel, "heuristic", spy)
    product, arguments = aot_programs.gpu_product(n=11008)
    with chips.target(aot_gpu.device(target)):
        grids = aot_reports.grids(jax.make_jaxpr(product)(*arguments).jaxpr)
    assert grids == {"mixed_matmul": [[1, 344]]}
    ((name, config),) = chosen
    assert name == aot_gpu.device(target).name
    # All 344 blocks, three per multiprocessor, run at once on 132 multiprocessors, but not on 108.
    assert config.groups_per_step == (2 if target == "a100" else 1)
