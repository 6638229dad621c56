"""Compiles a function with the GPU compilers on a machine without a GPU, and reports on each kernel.

``python -m bench.aot_gpu h100 bench.aot_gpu:matmul '{"bits": [1, 2, 3], "m": 16}'`` prints one JSON record.

XLA compiles for a GPU that is only described (``bench/targets/*.txtpb``). Pallas Mosaic GPU and XLA write
their PTX to a directory; ``ptxas -v`` reports registers, spills and shared memory, and ``nvdisasm`` lists the
instructions, which are counted per innermost loop. Nothing here is a measured time: ``memory_us`` is bytes
over the datasheet's bandwidth, which no kernel can beat. The compiled program is the one that the device
would run: the kernels choose their blocks for the target (:func:`pallas_kernels.chips.target`).

Needs ``jax[cuda13-local] nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-nvdisasm``. Every
compilation runs in its own process, because XLA reads its flags once per process.
"""

import argparse
import collections
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.hlo import kernels_of
from pallas_kernels import chips
from pallas_kernels.chips import Device, find

TARGETS = Path(__file__).parent / "targets"
Record = dict[str, Any]

# One line of nvdisasm: a label, or an instruction (its guard is skipped) with its operands.
SASS_LINE = re.compile(
    r"^(\.L\w+):|^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE
)
TENSOR_CORE = re.compile(r"(HMMA|IMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b")


def targets() -> list[str]:
    """Names of the GPUs that have a description."""
    return sorted(path.stem for path in TARGETS.glob("*.txtpb"))


def matmul(
    bits: list[int] = [1, 2, 3],  # noqa: B006 - read only
    m: int = 16,
    k: int = 4096,
    n: int = 4096,
    group_size: int = 128,
    bias: bool = False,
    config: dict[str, int] | None = None,
    weights: int = 0,
) -> tuple[Callable, list]:
    """Builder: ``mixed_matmul`` with a packed weight, and its arguments.

    ``bits`` are the weight's widths: three take a quarter, half and a quarter of the groups, others equal
    parts. ``weights`` joins that many weights into one product; 0 is a single weight that is not prepared.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels.gpu import kernel
    from pallas_kernels.gpu.joined import join
    from pallas_kernels.layout import abstract_tensor, group_count

    groups, widths = group_count(k, group_size), tuple(bits)
    outer = groups // 4 if len(widths) == 3 else 0  # groups at the lowest and highest of three widths
    segments = (outer, groups - 2 * outer, outer) if outer else _even(groups, len(widths))
    weight = abstract_tensor((k, n), widths=widths, segments=segments, group_size=group_size)
    if weights:
        weight = jax.eval_shape(join, [weight] * weights)
    shape: Any = jax.ShapeDtypeStruct
    chosen = kernel.Config(**config) if config else None

    def product(x, w, *bias):
        return kernel.mixed_matmul(x, w, bias=bias[0] if bias else None, config=chosen)

    return product, [
        shape((m, k), jnp.bfloat16),
        weight,
        *([shape(weight.shape[1:], jnp.float32)] if bias else []),
    ]


def _even(groups: int, parts: int) -> tuple[int, ...]:
    return tuple(groups * (i + 1) // parts - groups * i // parts for i in range(parts))


def device(target: str) -> Device:
    """Returns a target's entry in the chip table.

    Raises:
      ValueError: the table lacks the device, its bandwidth or its peak.
    """
    found = find(kind := described(target, "device_description_str"))
    if found is None or found.bandwidth is None or found.bfloat16_flops is None:
        raise ValueError(f"{target}.txtpb describes {kind!r}, expected a device of pallas_kernels.chips")
    return found


def compile_for(
    target: str, builder: str, arguments: dict | None = None, timeout: float = 900, kernels: bool = True
) -> Record:
    """Compiles ``builder(**arguments) -> (function, arguments)`` for a target, in its own process.

    Args:
      target: a name in :func:`targets`.
      builder: ``"module:function"``.
      arguments: keyword arguments of the builder.
      timeout: limit in seconds.
      kernels: if True, each kernel is analysed, which takes most of the time of a program with many.

    Returns:
      A record of JSON values. ``error`` is one line, or None if the function compiled; in that case
      ``kernels`` has the reports of ``ptxas`` and the disassembler on each kernel, by name;
      ``argument_bytes`` and ``output_bytes`` are the program's, ``temp_bytes`` those of its intermediates,
      ``read_bytes`` and ``written_bytes`` those that all its kernels read and write, ``launches`` is the
      number of kernels, ``grids`` has the grids of the Pallas kernels by name, ``memory_us`` is the time of
      ``argument_bytes + output_bytes`` at full bandwidth, and ``lane_instructions_per_us`` is the issue rate
      of all multiprocessors.

    Raises:
      ValueError: the target is unknown.
    """
    if target not in targets():
        raise ValueError(f"target is {target!r}, expected one of {targets()}")
    record: Record = {"target": target, "builder": builder, "arguments": arguments or {}, "error": None}
    with tempfile.TemporaryDirectory(prefix="aot_gpu_") as directory:
        call = [sys.executable, "-m", "bench.aot_gpu", target, builder, json.dumps(arguments or {})]
        call += [] if kernels else ["--no-kernels"]
        try:
            call += ["--child", directory]
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # read where jax is first imported
            child = subprocess.run(call, capture_output=True, text=True, timeout=timeout, env=environment)
        except subprocess.TimeoutExpired:
            return record | {"error": f"not compiled after {timeout:.0f} s"}
        result = Path(directory, "result.json")
        if not result.exists():
            return record | {"error": _reason(child)}
        record |= json.loads(result.read_text())
        try:
            record |= {"kernels": _kernels(Path(directory))} if kernels else {}
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            return record | {"error": str(error).splitlines()[0]}
    moved = record["argument_bytes"] + record["output_bytes"]
    lanes = int(described(target, "core_count")) * 4 * 32  # of four warps in each multiprocessor
    return record | {
        "memory_us": round(moved / device(target).bandwidth * 1e6, 3),
        "lane_instructions_per_us": lanes * float(described(target, "clock_rate_ghz")) * 1e3,
    }


def _child(target: str, builder: str, arguments: dict, directory: str, kernels: bool) -> None:
    """Compiles; writes ``result.json`` and, if ``kernels``, all PTX to the directory."""
    if kernels:
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={directory} --xla_dump_emitter_re=.*"
        os.environ["MOSAIC_GPU_DUMP_PTX"] = "1"
        os.environ["MOSAIC_GPU_DUMP_TO"] = directory
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    module, name = builder.split(":")
    description = (TARGETS / f"{target}.txtpb").read_text()
    gpu: Any = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=description, topology="1x1x1"
    ).devices[0]
    placed = SingleDeviceSharding(gpu)
    with chips.target(gpu):
        function, operands = getattr(importlib.import_module(module), name)(**arguments)
    operands = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed), operands)
    # Mosaic reads the default device's compute capability, and assumes sm_90 without one.
    with jax.default_device(gpu), chips.target(gpu):
        traced = (function if hasattr(function, "trace") else jax.jit(function)).trace(*operands)
        compiled = traced.lower().compile()
    memory: Any = compiled.memory_analysis()
    launches, read, written = kernels_of(compiled.as_text() or "")
    result = {
        "device": gpu.device_kind,
        "compute_capability": gpu.compute_capability,
        "grids": grids(traced.jaxpr.jaxpr),
        "launches": launches,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "read_bytes": read,
        "written_bytes": written,
    }
    Path(directory, "result.json").write_text(json.dumps(result))


def grids(jaxpr: Any) -> dict[str, list[list[int]]]:
    """Distinct grids of the Pallas GPU kernels of a program, by the kernels' names."""
    found: dict[str, list[list[int]]] = collections.defaultdict(list)
    for equation in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        kernels = [(equation.params["name"], [list(mesh.grid)]) for mesh in equation.params.get("meshes", ())]
        for program in inner:
            kernels += grids(program).items() if hasattr(program, "eqns") else []
        for name, of_kernel in kernels:
            found[name] += [grid for grid in of_kernel if grid not in found[name]]
    return dict(found)


def _reason(child: subprocess.CompletedProcess) -> str:
    """Returns in one line why a child process failed."""
    died = f"the compiler died (signal {-child.returncode}): " if child.returncode < 0 else ""
    lines = child.stderr.strip().splitlines() or ["no output"]
    telling = [line for line in lines if re.match(r"LLVM ERROR|[\w.]*(Error|Exception|Exit)\b", line)]
    return died + (telling or lines)[-1][:400]


def described(target: str, field: str) -> str:
    found = re.search(rf'{field}: (?:"([^"]*)"|(\S+))', (TARGETS / f"{target}.txtpb").read_text())
    if found is None:
        raise ValueError(f"{target}.txtpb has no {field}")
    return found[1] or found[2]


def _tool(name: str) -> str:
    """Finds a program in the CUDA wheels, or on the path."""
    for directory in sys.path:
        for found in Path(directory).glob(f"nvidia/cu*/bin/{name}"):
            return str(found)
    if found_on_path := shutil.which(name):
        return found_on_path
    raise FileNotFoundError(f"{name} not found: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")


def _kernels(directory: Path) -> Record:
    kernels = {}
    for path in sorted(directory.rglob("*.ptx")):
        if entry := re.search(r"\.entry\s+(\w+)", path.read_text()):
            kernels[entry[1]] = _kernel(path)
    return kernels


def _kernel(ptx: Path) -> Record:
    """Reports of ptxas and nvdisasm on one kernel."""
    architecture = re.search(r"^\.target\s+(\w+)", ptx.read_text(), re.MULTILINE)
    assert architecture is not None
    cubin = ptx.with_suffix(".cubin")
    ptxas = [_tool("ptxas"), f"-arch={architecture[1]}", "-v", str(ptx), "-o", str(cubin)]
    report = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
    nvdisasm = [_tool("nvdisasm"), "-c", str(cubin)]
    listing = subprocess.run(nvdisasm, capture_output=True, text=True, check=True).stdout
    instructions, labels = _instructions(listing)

    def total(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, report)))

    return {
        "architecture": architecture[1],
        "registers": total(r"Used (\d+) registers"),
        "spill_bytes": total(r"(\d+) bytes spill"),
        "static_shared_bytes": total(r"(\d+) bytes smem"),
        "instructions": len(instructions),
        "tensor_core": _tensor_core([op for op, _ in instructions]),
        "inner_loops": [_loop(loop) for loop in _inner_loops(instructions, labels)],
    }


def _instructions(listing: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Returns ``[(opcode, operands)]``, and for each label the index of the instruction that follows it."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for label, opcode, operands in SASS_LINE.findall(listing):
        if label:
            labels[label] = len(instructions)
        elif opcode != "NOP":
            instructions.append((opcode, operands))
    return instructions, labels


def _inner_loops(instructions: list[tuple[str, str]], labels: dict[str, int]) -> list[list[str]]:
    """Opcodes of the loops (spans closed by a backward branch) that contain no other loop."""
    spans = []
    for end, (opcode, operands) in enumerate(instructions):
        target = re.search(r"`\((\.L\w+)\)", operands) if opcode.startswith("BRA") else None
        if target and labels.get(target[1], end) < end:
            spans.append((labels[target[1]], end))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[opcode for opcode, _ in instructions[start : end + 1]] for start, end in inner]


def _tensor_core(opcodes: list[str]) -> dict[str, int]:
    return dict(collections.Counter(op for op in opcodes if TENSOR_CORE.match(op)))


def _loop(opcodes: list[str]) -> Record:
    """Counts a loop's instructions, also per thread and weight if it multiplies with ``HMMA.16816``.

    That instruction multiplies 16 rows of x with ``[16, 8]`` weights: 4 weights for each of 32 threads. Codes
    of more than 4 bits are multiplied in two pieces, so their true count is twice the reported one.
    """
    tensor_core = _tensor_core(opcodes)
    products = sum(n for op, n in tensor_core.items() if op.startswith("HMMA.16816"))
    return {
        "instructions": len(opcodes),
        "by_opcode": dict(collections.Counter(op.split(".")[0] for op in opcodes).most_common()),
        "tensor_core": tensor_core,
        "per_weight_and_16_rows": round(len(opcodes) / (4 * products), 3) if products else None,
    }


def main() -> None:
    """Prints the record of one kernel; exit status 1 if it did not compile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=targets())
    parser.add_argument("builder", help="module:function, returns a function and its abstract arguments")
    parser.add_argument("arguments", nargs="?", default="{}", help="of the builder, a JSON object")
    parser.add_argument(
        "--no-kernels", action="store_true", help="launches and bytes alone, nothing of each kernel"
    )
    parser.add_argument("--child", metavar="DIRECTORY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    arguments = json.loads(args.arguments)
    if args.child:
        _child(args.target, args.builder, arguments, args.child, not args.no_kernels)
        return
    record = compile_for(args.target, args.builder, arguments, kernels=not args.no_kernels)
    print(json.dumps(record, indent=1))
    sys.exit(record["error"] is not None)


if __name__ == "__main__":
    main()
