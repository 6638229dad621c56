"""How long a TPU takes for a token of Llama-2-7B, by what its compiler says of every operation."""

from typing import Any

from bench import aot_tpu
from bench.aot_decoder import LLAMA_2_7B, tpu_products
from pallas_kernels.chips import BY_SHORT_NAME

STEP = "bench.aot_decoder:decode_step"
ARGUMENTS = {"implementation": "mosaic_tpu"}


def token_us(target: str, whole: dict[str, Any], slots: int = 4096) -> dict[str, float] | None:
    """Microseconds of a decode step, one operation after the other, each the larger of cycles and bytes.

    Products are compiled alone, with segment sizes that the compiler knows: loops over data it does not
    estimate. Of all others there are cycles, in loops as often as there are layers; the largest in the loop
    reads the cache. What XLA brings to VMEM ahead is counted as if nothing went on beside it.

    Args:
      target: a key of `bench.aot_tpu.TARGETS`.
      whole: the fields of the `bench.aot_tpu.Record` of :data:`STEP` there.
      slots: of the cache.

    Returns:
      The products, attention's reading of the cache, what is brought, and the rest; None if the compiler
      estimates nothing there.
    """
    clock = aot_tpu.TARGETS[target].clock
    bandwidth = BY_SHORT_NAME[aot_tpu.TARGETS[target].device].bandwidth
    assert bandwidth is not None
    products = 0.0
    for count, arguments in tpu_products().values():
        record = aot_tpu.compile_for(target, "bench.aot_tpu:packed", arguments)
        layers = arguments.get("layers", 1)
        cycles = [k["estimated_cycles"] for name, k in (record.kernels or {}).items() if "matmul" in name]
        if record.memory_seconds is None or cycles == [] or cycles[0] is None:
            return None
        products += count * max(1e6 * cycles[0] / clock, 1e6 * record.memory_seconds / layers)
    rest = aot_tpu.operations(target, STEP, ARGUMENTS)
    rest = {name: 1e6 * cycles / clock for name, cycles in rest.items() if "matmul" not in name}
    looped = {name: us for name, us in rest.items() if name in whole["looped"]}
    reader = max(looped, key=lambda name: looped[name])
    c = LLAMA_2_7B
    cache_bytes = 2 * 2 * slots * c.num_kv_heads * c.head_dim  # of a layer, in bfloat16
    layers = c.num_layers
    others = sum(us * (layers if name in looped else 1) for name, us in rest.items() if name != reader)
    return {
        "products": products,
        "attention": layers * max(looped[reader], 1e6 * cache_bytes / bandwidth),
        "brought": 1e6 * whole["brought_bytes"] / bandwidth,
        "others": others,
    }


def as_row(target: str, whole: dict[str, Any]) -> dict[str, Any]:
    """What `bench.aot` prints of it: the floor of all bytes that are read, the parts and their sum."""
    bandwidth = BY_SHORT_NAME[aot_tpu.TARGETS[target].device].bandwidth
    assert bandwidth is not None
    parts = token_us(target, whole)
    if parts is None:
        return {}
    floor_us = 1e6 * whole["argument_bytes"] / bandwidth
    return {"floor_us": floor_us, "parts_us": parts, "token_us": sum(parts.values())}
