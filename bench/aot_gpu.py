"""The GPU compilers on a machine without a GPU, and their reports on each kernel.

XLA compiles for a GPU that is only described (``bench/targets/*.txtpb``). Pallas Mosaic GPU and XLA write
their PTX to a folder; ``ptxas -v`` reports registers, spills and shared memory, and ``nvdisasm`` lists the
instructions, which are counted per innermost loop. The compiled program is the one that the device would run:
the kernels choose their blocks for the target (:func:`pallas_kernels.chips.target`).

Needs ``jax[cuda13-local] nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-nvdisasm``.
"""

import collections
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.aot_process import compiled
from bench.results import Record
from pallas_kernels.chips import Device, find

TARGETS = Path(__file__).parent / "targets"

# One line of nvdisasm: a label, or an instruction (its guard is skipped) with its operands.
SASS_LINE = re.compile(
    r"^(\.L\w+):|^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE
)
TENSOR_CORE = re.compile(r"(HMMA|IMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b")


def targets() -> list[str]:
    """Names of the GPUs that have a description."""
    return sorted(path.stem for path in TARGETS.glob("*.txtpb"))


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
    target: str, program: str, arguments: Record | None = None, timeout: float = 900, *, details: bool = True
) -> Record:
    """Compiles a program of `bench.aot_programs` for a target.

    Args:
      target: a name in :func:`targets`.
      program: name of a function in `bench.aot_programs`.
      arguments: its keyword arguments, as JSON values.
      timeout: limit in seconds.
      details: if True, each kernel is analysed, which takes most of the time of a program with many.

    Returns:
      A record of JSON values. ``error`` is one line, or None if the program compiled; in that case
      ``kernels`` has the reports of ``ptxas`` and the disassembler on each kernel, by name;
      ``argument_bytes`` and ``output_bytes`` are the program's, ``temp_bytes`` those of its intermediates,
      ``read_bytes`` and ``written_bytes`` those that all its kernels read and write (``bytes`` is their sum),
      ``registers`` the most of a kernel, ``spills`` (bytes) and ``matrix_ops`` sums over kernels,
      ``launches`` is the number of kernels, ``grids`` has the grids of the Pallas kernels by name,
      ``memory_us`` is the time of ``argument_bytes + output_bytes`` at full bandwidth, and
      ``lane_instructions_per_us`` is the issue rate of all multiprocessors.

    Raises:
      ValueError: the target is unknown.
    """
    if target not in targets():
        raise ValueError(f"target is {target!r}, expected one of {targets()}")
    with tempfile.TemporaryDirectory(prefix="aot_gpu_") as folder:
        flags = {
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_emitter_re=.*",
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_TO": folder,
        }
        topology = {"platform": "cuda", "topology_name": "", "topology": "1x1x1"}
        topology["target_config"] = (TARGETS / f"{target}.txtpb").read_text()
        request = {"topology": topology, "program": program, "arguments": arguments or {}}
        record = {"target": target, **compiled(request, folder, flags if details else {}, timeout)}
        if record["error"]:
            return record
        try:
            kernels = _kernels(Path(folder)) if details else {}
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            return record | {"error": str(error).splitlines()[0]}
    moved = record["argument_bytes"] + record["output_bytes"]
    lanes = int(described(target, "core_count")) * 4 * 32  # of four warps in each multiprocessor
    found = kernels.values()
    return record | {
        "bytes": record["read_bytes"] + record["written_bytes"],
        "kernels": kernels,
        "registers": max((kernel["registers"] for kernel in found), default=0),
        "spills": sum(kernel["spill_bytes"] for kernel in found),
        "matrix_ops": sum(sum(kernel["tensor_core"].values()) for kernel in found),
        "memory_us": round(moved / device(target).bandwidth * 1e6, 3),
        "lane_instructions_per_us": lanes * float(described(target, "clock_rate_ghz")) * 1e3,
    }


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
