"""Estimated time of a TPU for one token of Llama-2-7B, from the compiler's report on every operation."""

from typing import Any

from bench import aot_tpu
from bench.aot_decoder import LLAMA_2_7B, tpu_products
from pallas_kernels.chips import BY_SHORT_NAME

STEP = "bench.aot_decoder:decode_step"
ARGUMENTS = {"implementation": "mosaic_tpu"}


def token_us(target: str, whole: dict[str, Any], slots: int = 4096) -> dict[str, float] | None:
    """Microseconds of a decode step: the sum over operations of the larger of compute and memory time.

    Products are compiled alone, with constant segment sizes, because the compiler does not estimate loops
    over data. All other operations have estimated cycles, counted once per layer if they are in a loop; the
    largest of those in the loop is attention's read of the cache. Copies that XLA makes to VMEM ahead of use
    are counted as if nothing overlapped them.

    Args:
      target: a key of `bench.aot_tpu.TARGETS`.
      whole: the fields of the `bench.aot_tpu.Record` of :data:`STEP` on that target.
      slots: size of the cache in tokens.

    Returns:
      Microseconds of products, of attention's read of the cache, of copies to VMEM, and of all others; None
      if the compiler makes no estimate.
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
    """Figures that `bench.aot` prints: the floor of all bytes read, the parts and their sum."""
    bandwidth = BY_SHORT_NAME[aot_tpu.TARGETS[target].device].bandwidth
    assert bandwidth is not None
    parts = token_us(target, whole)
    if parts is None:
        return {}
    floor_us = 1e6 * whole["argument_bytes"] / bandwidth
    return {"floor_us": floor_us, "parts_us": parts, "token_us": sum(parts.values())}
