"""Compiles the kernels for devices that are not present, and estimates the cost of each program.

    python -m bench.aot --target v5e,v6e,h100 --shapes llama-2-7b --rows 16,2048
    python -m bench.aot --target v5e,h100 --decoder      # a whole decode step of Llama-2-7B

Nothing here is a measured time. The cost of a program is the compiler's estimate of cycles on a TPU, and on a
GPU the number of instructions that a thread spends on one weight (and 16 rows of x) in the main loops; both
rank variants of a kernel. The floor, which no program can beat, is the larger of two times: the bytes of all
arguments and results over the datasheet's bandwidth, and the product's operations over the datasheet's peak
for bfloat16. The ratio to the floor uses the estimated cycles, or the time in which all multiprocessors could
issue the instructions; it is 1 where memory or matrix units take longer. For a GPU kernel, the bytes that its
blocks read and write together are printed too: most of them come from the L2 cache, whose bandwidth no
datasheet states, so they are not part of the floor. ``pip install 'slim-jax[aot]'`` installs the compilers,
which run on any x86-64 Linux.
"""

import argparse
import dataclasses
import json
from typing import Any

from bench import aot_gpu, aot_token, aot_tpu
from bench.shapes import SHAPES
from pallas_kernels.chips import BY_SHORT_NAME, Device
from pallas_kernels.layout import group_count

Row = dict[str, Any]
WIDTHS = (1, 2, 3)

LAUNCH_US = 3.0
"""Assumed microseconds per launch, in a program of a thousand launches."""


def quarters(k: int, group_size: int) -> tuple[int, int, int]:
    """Number of groups at 1, 2 and 3 bits: a quarter, half, a quarter."""
    groups = group_count(k, group_size)
    return groups // 4, groups - 2 * (groups // 4), groups // 4


def tpu_row(target: str, product: str, m: int, k: int, n: int, group_size: int) -> Row:
    """Record of a packed or dense product on a TPU."""
    if product == "packed":
        builder = "bench.aot_tpu:decode"
        # The compiler cannot estimate loops over data: segment sizes are constants here, and only here.
        extra = {"group_size": group_size, "segments": quarters(k, group_size), "constant": True}
    else:
        builder, extra = "bench.aot_tpu:dense", {}
    record = aot_tpu.compile_for(target, builder, {"m": m, "k": k, "n": n, **extra})
    cycles, device = record.estimated_cycles, BY_SHORT_NAME[aot_tpu.TARGETS[target].device]
    memory_us = None if record.memory_seconds is None else 1e6 * record.memory_seconds
    takes_us = None if cycles is None else 1e6 * cycles / aot_tpu.TARGETS[target].clock
    return {
        "error": record.error,
        "bytes": record.bytes,
        "argument_bytes": record.argument_bytes,
        "memory": None if record.vmem_bytes is None else f"{record.vmem_bytes / 2**20:.1f} MiB VMEM",
        "spills": record.spills,
        "matrix_instructions": record.matrix_ops,
        "cost": None if cycles is None else f"{cycles:,} cycles",
        "bundles": record.bundles,
        "l2_bytes": None,
        "launches": record.launches,
        **against_floor(device, m, k, n, memory_us, takes_us),
        "record": dataclasses.asdict(record),
    }


def gpu_row(target: str, product: str, m: int, k: int, n: int, group_size: int) -> Row:
    """Record of a packed or dense product on a GPU."""
    arguments: dict[str, Any] = {"m": m, "k": k, "n": n}
    if product == "packed":
        builder, arguments = "bench.aot_gpu:matmul", arguments | {"group_size": group_size, "bits": WIDTHS}
    else:
        builder = "bench.aot_tpu:dense"
    record = aot_gpu.compile_for(target, builder, arguments)
    kernels = (record.get("kernels") or {}).values()
    done = record["error"] is None
    shares = [size / group_count(k, group_size) for size in quarters(k, group_size)]
    cost = _instructions(kernels, shares if product == "packed" else [1.0])
    issued = cost and cost * k * n * -(-m // 16) / record["lane_instructions_per_us"]
    floor = against_floor(aot_gpu.device(target), m, k, n, record.get("memory_us"), issued)
    return {
        "error": record["error"],
        "bytes": record["read_bytes"] + record["written_bytes"] if done else None,
        "argument_bytes": record.get("argument_bytes"),
        "memory": f"{max((kernel['registers'] for kernel in kernels), default=0)} registers"
        if done
        else None,
        "spills": sum(kernel["spill_bytes"] for kernel in kernels) if done else None,
        "matrix_instructions": sum(sum(kernel["tensor_core"].values()) for kernel in kernels)
        if done
        else None,
        "cost": cost and f"{cost:.2f} instructions",
        "bundles": None,
        "l2_bytes": _block_bytes(record, m, k, n) if done else None,
        "launches": record.get("launches"),
        **floor,
        "record": record,
    }


def _block_bytes(record: Row, m: int, k: int, n: int) -> int | None:
    """Bytes that the blocks of the packed product read and write together.

    Each tile of columns reads all rows of x; each tile of rows reads the whole weight. None if the kernel is
    not in the program.
    """
    if "mixed_matmul" not in record["grids"]:
        return None
    ((row_tiles, column_tiles),) = record["grids"]["mixed_matmul"]
    weight = record["argument_bytes"] - 2 * m * k
    return column_tiles * 2 * m * k + row_tiles * weight + 4 * m * n


def against_floor(
    device: Device, m: int, k: int, n: int, memory_us: float | None, takes_us: float | None
) -> Row:
    """Returns the least time of a product on a device, its bound, and the ratio of a program's time to it.

    Args:
      device: an entry of the chip table that has a peak for bfloat16.
      m: rows of x.
      k: input channels.
      n: output channels.
      memory_us: time of all bytes at full bandwidth; None if the program did not compile.
      takes_us: the program's time by the compiler's estimate; None if there is none.
    """
    if memory_us is None:
        return {"floor_us": None, "bound": None, "ratio": None}
    assert device.bfloat16_flops is not None
    matrix_us = 2e6 * m * k * n / device.bfloat16_flops
    floor_us = max(memory_us, matrix_us)
    return {
        "floor_us": floor_us,
        "bound": "memory" if memory_us >= matrix_us else "matrix units",
        "ratio": None if takes_us is None else max(1.0, takes_us / floor_us),
    }


def _instructions(kernels, shares: list[float]) -> float | None:
    """Instructions per thread, weight and 16 rows in the main loops, weighted by ``shares``.

    Each width has one main loop, followed by loops for its remainder. None if no loop multiplies.
    """
    loops = [loop["per_weight_and_16_rows"] for kernel in kernels for loop in kernel["inner_loops"]]
    costs = [cost for cost in loops if cost is not None]
    if len(costs) < len(shares):
        return None
    return sum(share * cost for share, cost in zip(shares, costs[:: len(costs) // len(shares)]))


def decoder_row(target: str) -> Row:
    """Record of a whole decode step: memory, or the error if it does not compile.

    On a GPU the record also has the launches per block, and the time of a token if every byte is read once at
    the datasheet's bandwidth and each launch costs :data:`LAUNCH_US`; on a TPU the time by `bench.aot_token`.
    These are estimates, not measured times.
    """
    gpu = target in aot_gpu.targets()
    whole = _decoder(target)
    sizes = ("argument_bytes", "output_bytes", "alias_bytes", "temp_bytes")
    row = {"target": target, "error": whole["error"], **{size: whole.get(size) for size in sizes}}
    if whole["error"]:
        return row
    if not gpu:
        return row | (aot_token.as_row(target, whole) if aot_tpu.TARGETS[target].estimates else {})
    bandwidth = aot_gpu.device(target).bandwidth
    assert bandwidth is not None
    floor_us = 1e6 * whole["argument_bytes"] / bandwidth
    return row | {
        "launches": whole["launches"],
        "launches_per_block": _decoder(target, layers=3)["launches"] - _decoder(target, layers=2)["launches"],
        "floor_us": floor_us,
        "token_us": floor_us + LAUNCH_US * whole["launches"],
    }


def _decoder(target: str, **arguments: int) -> Row:
    builder, timeout = "bench.aot_decoder:decode_step", 1800
    if target in aot_gpu.targets():
        wanted = {"implementation": "mosaic_gpu", **arguments}
        return aot_gpu.compile_for(target, builder, wanted, timeout, kernels=False)
    wanted = {"implementation": "mosaic_tpu", **arguments}
    return dataclasses.asdict(aot_tpu.compile_for(target, builder, wanted, timeout, estimate=False))


def _line(row: Row) -> str:
    name = f"{row['target']:5s} M {row['m']:5d}  K {row['k']:5d}  N {row['n']:5d}  {row['product']:6s}"
    if row["error"]:
        return f"{name}  did not compile: {row['error']}"
    lower = "at least " if row["target"] in aot_gpu.targets() else ""  # instructions alone, no latency
    parts = [
        "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f} MB moved",
        "" if row["l2_bytes"] is None else f"{row['l2_bytes'] / 1e6:.1f} MB by all blocks",
        "" if row["launches"] is None else f"{row['launches']} launches",
        row["memory"] or "",
        f"{row['spills']} spills",
        f"{row['matrix_instructions']} matrix instructions",
        "" if row["bundles"] is None else f"{row['bundles']} bundles",
        row["cost"] or "",
        f"floor {row['floor_us']:.1f} us ({row['bound']})",
        "" if row["ratio"] is None else f"{lower}{row['ratio']:.2f} x the floor",
    ]
    return f"{name}  " + ", ".join(part for part in parts if part)


def _decoder_line(row: Row) -> str:
    sizes = [f"{key} {row[key] / 2**30:.2f} GiB" for key in row if key.endswith("bytes") and row[key]]
    if "launches" in row:
        sizes.append(f"{row['launches']} launches, {row['launches_per_block']} a block")
    if "parts_us" in row:
        sizes.append(", ".join(f"{name} {us:.0f} us" for name, us in row["parts_us"].items()))
    if "token_us" in row:
        ratio = row["token_us"] / row["floor_us"]
        sizes.append(f"at least {row['token_us']:.0f} us a token by estimate, {ratio:.2f} x the floor")
    return ", ".join(sizes)


def main() -> None:
    """Prints a line per program; ``--json FILE`` stores all that the compilers reported."""
    known = [*aot_tpu.TARGETS, *aot_gpu.targets()]
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="v5e,v6e,h100,a100", help=f"of {', '.join(known)}")
    parser.add_argument("--shapes", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--rows", default="16,2048", help="rows of x, M")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--decoder", action="store_true", help="a whole decode step of Llama-2-7B instead")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    targets = arguments.target.split(",")
    if unknown := [target for target in targets if target not in known]:
        parser.error(f"--target: {unknown[0]!r} is unknown, expected some of {', '.join(known)}")
    rows: list[Row] = []
    for target in targets:
        if arguments.decoder:
            rows.append(row := decoder_row(target))
            print(f"{target:5s} decode step: {row['error'] or _decoder_line(row)}", flush=True)
            continue
        make = gpu_row if target in aot_gpu.targets() else tpu_row
        for k, n in SHAPES[arguments.shapes]:
            for m in map(int, arguments.rows.split(",")):
                for product in ("packed", "dense"):
                    found = make(target, product, m, k, n, arguments.group_size)
                    rows.append({"target": target, "m": m, "k": k, "n": n, "product": product, **found})
                    print(_line(rows[-1]), flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
