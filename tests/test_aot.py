"""The kernels still compile for devices that are not present, at no higher cost: ``make test-aot``.

Bounds are the measured figures (docs/devices.md has the table) plus a few percent for other compilers.
"""

import math

import pytest

from bench import aot_gpu, aot_tpu
from pallas_kernels.layout import abstract_tensor

pytestmark = pytest.mark.aot

SHAPE = {"m": 16, "k": 4096, "n": 4096}
QUARTERS = abstract_tensor((4096, 4096), widths=(1, 2, 3), segments=(8, 16, 8), group_size=128)
PACKED_BYTES = QUARTERS.nbytes
ACTIVATION_BYTES = 16 * 4096 * (2 + 4)


@pytest.mark.parametrize(("target", "cycles"), [("v5e", 11_000), ("v6e", 9_100)])
def test_tpu_decode(target, cycles):
    record = aot_tpu.compile_for(target, "tpu_product", {**SHAPE, "constant": True})
    assert record["error"] is None
    assert record["estimated_cycles"] <= cycles
    assert record["spills"] <= 1
    assert record["bytes"] <= 1.1 * (PACKED_BYTES + ACTIVATION_BYTES)


@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_tpu_decode_with_segment_sizes_as_data(target):
    record = aot_tpu.compile_for(target, "tpu_product", SHAPE, details=False)
    assert record["error"] is None


def test_tpu_weights_side_by_side():
    """Alone, each weight takes 8,918 cycles; their product adds a start, an end and a wait for the index."""
    arguments = {**SHAPE, "m": 1, "weights": 3, "layers": 2, "constant": True}
    cycles = aot_tpu.operations("v6e", "tpu_product", arguments)
    assert cycles["mixed_matmul_decode.1"] <= 25_200


def test_tpu_decoder_copies_neither_words_nor_cache():
    """Scanned layers are read, and cache slots written, in place.

    A layer's cache has 64 MiB, the embedding 64, and both layers' scales and zeros 4.
    """
    arguments = {"implementation": "mosaic_tpu", "layers": 2}
    record = aot_tpu.compile_for("v5e", "decode_step", arguments, details=False)
    assert record["error"] is None
    assert record["temp_bytes"] <= 4 * 2**20
    assert record["brought_bytes"] <= 3 * 2**20


def test_tpu_over_four_devices():
    record = aot_tpu.compile_for("v5e-4", "sharded_product", SHAPE, details=False)
    assert record["error"] is None
    assert record["argument_bytes"] <= 1.05 * (PACKED_BYTES / 4 + 16 * 4096 * 2)  # x is whole on each device
    assert record["temp_bytes"] <= 2**20  # no device gathers the weight


@pytest.mark.parametrize(("target", "ratio"), [("v5e", 1.1), ("v6e", 1.17)])
def test_tpu_prefill(target, ratio):
    shape = SHAPE | {"m": 2048}
    packed = aot_tpu.operations(target, "tpu_product", {**shape, "constant": True})
    dense = aot_tpu.operations(target, "dense_product", shape)
    assert 0 < sum(packed.values()) <= ratio * sum(dense.values())


@pytest.mark.parametrize("target", ["h100", "a100"])
@pytest.mark.parametrize(("widths", "instructions"), [([2], 1.75), ([1, 2, 3], 2.0)])
def test_gpu_decode(target, widths, instructions):
    record = aot_gpu.compile_for(target, "gpu_product", {**SHAPE, "widths": widths})
    assert record["error"] is None
    assert record["grids"] == {"mixed_matmul": [[1, 128]]}  # not the CPU's choice; timed on an H200
    kernel = record["kernels"]["mixed_matmul_mosaic_gpu_kernel"]
    assert kernel["spill_bytes"] == 0
    assert kernel["tensor_core"]
    costs = [loop["per_weight_and_16_rows"] for loop in kernel["inner_loops"]]
    costs = [cost for cost in costs if cost is not None]
    main = costs[:: len(costs) // len(widths)]  # each main loop is followed by those for the remainder
    shares = [1.0] if len(widths) == 1 else [0.25, 0.5, 0.25]
    assert sum(map(math.prod, zip(shares, main, strict=True))) <= instructions
    moved = record["read_bytes"] + record["written_bytes"]
    # The weight is prepared on every call: zero codes in a byte each, and x in whole chunks of groups.
    assert moved <= 1.27 * (PACKED_BYTES + ACTIVATION_BYTES)


@pytest.mark.parametrize("target", ["h100", "a100"])
def test_gpu_prefill(target):
    record = aot_gpu.compile_for(target, "gpu_product", SHAPE | {"m": 2048})
    assert record["error"] is None
    assert record["kernels"]["mixed_matmul_mosaic_gpu_kernel"]["spill_bytes"] == 0


@pytest.mark.parametrize("m", [16, 2048])
def test_gpu_with_less_shared_memory(m):
    config = {"block_n": 32, "stages": 2, "groups_per_step": 2, "split_k": 4} if m == 16 else None
    record = aot_gpu.compile_for("l4", "gpu_product", SHAPE | {"m": m, "config": config})
    assert record["error"] is None
    assert record["kernels"]["mixed_matmul_mosaic_gpu_kernel"]["spill_bytes"] == 0


def test_gpu_weights_side_by_side():
    record = aot_gpu.compile_for("h100", "gpu_product", {**SHAPE, "weights": 3})
    assert record["error"] is None
    assert record["launches"] <= 3  # preparing x, the kernel, and its magic number, which a decoder has once
    assert record["kernels"]["mixed_matmul_mosaic_gpu_kernel"]["spill_bytes"] == 0


def test_gpu_decoder_launches_few_kernels():
    """q, k, v together and o have two launches each (preparing x, kernel), attention one, the MLP three."""
    arguments = {"implementation": "mosaic_gpu", "layers": 1}
    record = aot_gpu.compile_for("h100", "decode_step", arguments)
    assert record["error"] is None
    assert record["launches"] <= 8 + 8  # a block had 27 launches, then 16, then 10
    for name in ("mixed_matmul_mosaic_gpu_kernel", "mixed_mlp_mosaic_gpu_kernel", "attend"):
        assert record["kernels"][name]["spill_bytes"] == 0
