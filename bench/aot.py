"""Compiles the kernels for devices that are not present, and estimates the cost of each program.

    python -m bench aot --target v5e,v6e,h100 --shapes llama-2-7b --rows 16,2048
    python -m bench aot --target v5e,h100 --decoder      # a whole decode step of Llama-2-7B
    python -m bench aot --target h100 --program gpu_product --arguments '{"widths": [2], "m": 16}'

Nothing here is a measured time. The cost of a program is the compiler's estimate of cycles on a TPU, and on a
GPU the number of instructions that a thread spends on one weight (and 16 rows of x) in the main loops; both
rank variants of a kernel. The floor, which no program can beat, is the larger of two times: the bytes of all
arguments and results over the datasheet's bandwidth, and the product's operations over the datasheet's peak
for bfloat16. The ratio to the floor uses the estimated cycles, or the time in which all multiprocessors could
issue the instructions (it then is a lower bound, without latency); it is 1 where memory or matrix units take
longer. For a GPU kernel, the bytes that its blocks read and write together are printed too: most of them come
from the L2 cache, whose bandwidth no datasheet states, so they are not part of the floor.

``--program`` compiles one function of `bench.aot_programs`; ``--json`` then has the compiler's whole report.
``pip install 'slim-jax[aot]'`` installs the compilers, which run on any x86-64 Linux.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from bench import aot_gpu, aot_tpu
from bench.aot_programs import segments, tpu_products
from bench.models import LLAMA_2_7B, SHAPES
from bench.results import Record, Results
from pallas_kernels.chips import BY_SHORT_NAME, Device
from pallas_kernels.layout import group_count

WIDTHS = (1, 2, 3)

LAUNCH_US = 3.0
"""Assumed microseconds per launch, in a program of a thousand launches."""


def compile_for(
    target: str, program: str, arguments: Record, timeout: float = 900, **details: bool
) -> Record:
    """Compiles a program by the compiler of the target; see both modules."""
    compiler: Any = aot_gpu if target in aot_gpu.targets() else aot_tpu
    return compiler.compile_for(target, program, arguments, timeout, **details)


def product_row(target: str, product: str, m: int, k: int, n: int, group_size: int) -> Record:
    """Record of a packed or dense product."""
    arguments: Record = {"m": m, "k": k, "n": n}
    packed, gpu = product == "packed", target in aot_gpu.targets()
    if packed:
        # TPUs' compiler cannot estimate loops over data: segment sizes are constants here, and only here.
        arguments |= {"group_size": group_size, **({} if gpu else {"constant": True})}
    program = f"{'gpu' if gpu else 'tpu'}_product" if packed else "dense_product"
    record = compile_for(target, program, arguments)
    if record["error"]:
        return {"error": record["error"], "record": record}
    names = ("bytes", "argument_bytes", "launches", "vmem_bytes", "registers", "spills", "matrix_ops")
    row = {name: record.get(name) for name in (*names, "bundles", "estimated_cycles")}
    if gpu:
        shares = [size / group_count(k, group_size) for size in segments(k, group_size, WIDTHS)]
        row["instructions"] = cost = _instructions(record["kernels"].values(), shares if packed else [1.0])
        row["l2_bytes"] = _block_bytes(record, m, k, n)
        takes_us = cost and cost * k * n * -(-m // 16) / record["lane_instructions_per_us"]
        device = aot_gpu.device(target)
    else:
        cycles, chip = record["estimated_cycles"], aot_tpu.TARGETS[target]
        takes_us = None if cycles is None else 1e6 * cycles / chip.clock
        device = BY_SHORT_NAME[chip.device]
    return {**row, **against_floor(device, m, k, n, record["memory_us"], takes_us), "record": record}


def _block_bytes(record: Record, m: int, k: int, n: int) -> int | None:
    """Bytes that the blocks of the packed product read and write together.

    Each tile of columns reads all rows of x; each tile of rows reads the whole weight. None if the kernel is
    not in the program.
    """
    if "mixed_matmul" not in record["grids"]:
        return None
    ((row_tiles, column_tiles),) = record["grids"]["mixed_matmul"]
    weight = record["argument_bytes"] - 2 * m * k
    return column_tiles * 2 * m * k + row_tiles * weight + 4 * m * n


def against_floor(device: Device, m: int, k: int, n: int, memory_us: float, takes_us: float | None) -> Record:
    """Returns the least time of a product on a device, its bound, and the ratio of a program's time to it.

    Args:
      device: an entry of the chip table that has a peak for bfloat16.
      m: rows of x.
      k: input channels.
      n: output channels.
      memory_us: time of all bytes at full bandwidth.
      takes_us: the program's time by the compiler's estimate; None if there is none.
    """
    assert device.bfloat16_flops is not None
    matrix_us = 2e6 * m * k * n / device.bfloat16_flops
    floor_us = max(memory_us, matrix_us)
    return {
        "floor_us": floor_us,
        "bound": "memory" if memory_us >= matrix_us else "matrix units",
        "ratio": None if takes_us is None else max(1.0, takes_us / floor_us),
    }


def _instructions(kernels: Iterable[Record], shares: list[float]) -> float | None:
    """Instructions per thread, weight and 16 rows in the main loops, weighted by ``shares``.

    Each width has one main loop, followed by loops for its remainder. None if no loop multiplies.
    """
    loops = [loop["per_weight_and_16_rows"] for kernel in kernels for loop in kernel["inner_loops"]]
    costs = [cost for cost in loops if cost is not None]
    if len(costs) < len(shares):
        return None
    return sum(share * cost for share, cost in zip(shares, costs[:: len(costs) // len(shares)]))


def decoder_row(target: str) -> Record:
    """Record of a whole decode step: memory, or the error if it does not compile.

    On a GPU the record also has the launches per block, and the time of a token if every byte is read once at
    the datasheet's bandwidth and each launch costs :data:`LAUNCH_US`; on a TPU that of :func:`token_us`.
    These are estimates, not measured times.
    """
    arguments = {"implementation": "mosaic_gpu" if target in aot_gpu.targets() else "mosaic_tpu"}
    compiled = partial(compile_for, target, "decode_step", timeout=1800, details=False)
    whole = compiled(arguments)
    sizes = ("argument_bytes", "output_bytes", "alias_bytes", "temp_bytes")
    row = {"target": target, "error": whole["error"], **{size: whole.get(size) for size in sizes}}
    if whole["error"]:
        return row
    if target in aot_gpu.targets():
        two, three = (compiled(arguments | {"layers": n})["launches"] for n in (2, 3))
        row |= {"launches": whole["launches"], "launches_per_block": three - two}
        floor_us = 1e6 * whole["argument_bytes"] / aot_gpu.device(target).bandwidth
        takes_us = floor_us + LAUNCH_US * whole["launches"]
    else:
        parts = token_us(target, whole) if aot_tpu.TARGETS[target].estimates else None
        if parts is None:
            return row
        row |= {f"{name}_us": us for name, us in parts.items()}
        floor_us, takes_us = 1e6 * whole["argument_bytes"] / aot_tpu.bandwidth(target), sum(parts.values())
    return row | {"floor_us": floor_us, "token_us": takes_us, "ratio": takes_us / floor_us}


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
    rest = aot_tpu.operations(target, "decode_step", {"implementation": "mosaic_tpu"})
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


def rows(arguments: argparse.Namespace) -> Iterator[Record]:
    """Yields a record for each program that the options ask for."""
    for target in arguments.target:
        if arguments.program:
            yield compile_for(target, arguments.program, arguments.arguments)
            continue
        if arguments.decoder:
            yield decoder_row(target)
            continue
        for k, n in SHAPES[arguments.shapes]:
            for m in map(int, arguments.rows.split(",")):
                for product in ("packed", "dense"):
                    at = {"target": target, "product": product, "m": m, "k": k, "n": n}
                    yield at | product_row(*at.values(), arguments.group_size)


def main(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Shows a row for each program; exit status 1 if one did not compile."""
    known = [*aot_tpu.TARGETS, *aot_gpu.targets()]
    parser.add_argument("--target", default="v5e,v6e,h100,a100", help=f"of {', '.join(known)}")
    parser.add_argument("--shapes", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--rows", default="16,2048", help="rows of x, M")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--decoder", action="store_true", help="a whole decode step of Llama-2-7B instead")
    parser.add_argument("--program", help="a function of bench.aot_programs instead")
    parser.add_argument("--arguments", type=json.loads, default={}, help="of the program, a JSON object")
    arguments = parser.parse_args(given)
    arguments.target = arguments.target.split(",")
    if unknown := [target for target in arguments.target if target not in known]:
        parser.error(f"--target: {unknown[0]!r} is unknown, expected some of {', '.join(known)}")
    found = Results(arguments.json).show("rows", rows(arguments))
    sys.exit(any(row.get("error") for row in found))
