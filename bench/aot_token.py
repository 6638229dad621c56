"""Estimated time of a TPU for one token of Llama-2-7B, from the compiler's report on every operation."""

from bench import aot_tpu
from bench.aot_programs import tpu_products
from bench.models import LLAMA_2_7B
from bench.results import Record

ARGUMENTS = {"implementation": "mosaic_tpu"}


def token_us(target: str, whole: Record, slots: int = 4096) -> dict[str, float] | None:
    """Microseconds of a decode step: the sum over operations of the larger of compute and memory time.

    Products are compiled alone, with constant segment sizes, because the compiler does not estimate loops
    over data. All other operations have estimated cycles, counted once per layer if they are in a loop; the
    largest of those in the loop is attention's read of the cache. Copies that XLA makes to VMEM ahead of use
    are counted as if nothing overlapped them.

    Args:
      target: a key of `bench.aot_tpu.TARGETS`.
      whole: the record of `bench.aot_programs.decode_step` on that target.
      slots: size of the cache in tokens.

    Returns:
      Microseconds of products, of attention's read of the cache, of copies to VMEM, and of all others; None
      if the compiler makes no estimate.
    """
    clock, bandwidth = aot_tpu.TARGETS[target].clock, aot_tpu.bandwidth(target)
    products = 0.0
    for count, arguments in tpu_products().values():
        record = aot_tpu.compile_for(target, "tpu_product", arguments)
        cycles = [k["estimated_cycles"] for name, k in record["kernels"].items() if "matmul" in name]
        if record["error"] or cycles == [] or cycles[0] is None:
            return None
        memory_us = record["memory_us"] / arguments.get("layers", 1)
        products += count * max(1e6 * cycles[0] / clock, memory_us)
    rest = aot_tpu.operations(target, "decode_step", ARGUMENTS)
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
