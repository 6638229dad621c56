"""Facts about a program: from its traced form, its optimized HLO text, and libtpu's files on its kernels."""

import collections
import math
import re
from pathlib import Path
from typing import Any

OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", re.MULTILINE)
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")
"""Operations without any work."""


def kernels_of(hlo: str) -> tuple[int, int, int]:
    """Number of kernels that a program launches, and the bytes that they read and write.

    Every operand of each kernel is counted once. XLA's ``cost_analysis`` reports nothing for a device that is
    not present. This count takes intermediates as memory traffic although most stay in the L2 cache, and a
    loop as one kernel.
    """
    entry = hlo[hlo.index("ENTRY") :]
    entry = entry[: entry.index("\n}")]
    size: dict[str, int] = {}
    launches = read = written = 0
    for name, shape, opcode, operands in OPERATION.findall(entry):
        size[name] = bytes_of(shape)
        if opcode not in FREE:
            launches += not opcode.endswith("-done")  # a "-done" completes a "-start"
            read += sum(size.get(operand, 0) for operand in re.findall(r"%([\w.-]+)", operands))
            written += size[name]
    return launches, read, written


def bytes_of(shape: str) -> int:
    """Number of bytes of all arrays in a shape."""
    return sum(
        math.prod(int(d) for d in dims.split(",") if d) * (int(re.sub(r"\D", "", kind) or 8) // 8)
        for kind, dims in re.findall(r"(pred|[a-z]+\d+)\[([\d,]*)\]", shape)
    )


def looped(hlo: str) -> list[str]:
    """Names of the operations in the bodies of a program's loops."""
    bodies = re.findall(r"body=%?([\w.-]+)", hlo)
    return [
        name
        for body in bodies
        for name, _, opcode, _ in OPERATION.findall(_computation(hlo, body))
        if opcode not in FREE
    ]


def brought_bytes(hlo: str) -> int:
    """Bytes that a TPU's program copies from HBM to VMEM ahead of use, counting one iteration of a loop."""
    done = [row for row in OPERATION.findall(hlo) if row[2] in ("copy-done", "slice-done")]
    return sum(bytes_of(shape) for _, shape, _, _ in done if "S(1)}" in shape)


def _computation(hlo: str, name: str) -> str:
    start = re.search(rf"^%?{re.escape(name)} \(", hlo, re.MULTILINE)
    assert start is not None, f"the program has no computation {name}"
    return hlo[start.start() : hlo.index("\n}", start.start())]


def tpu_kernels(dump: str) -> dict[str, dict[str, Any]]:
    """Bundles, operations by unit, spills and estimated cycles of every kernel, from libtpu's reports."""
    kernels: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(dump).glob("*final_hlo-static-per-bundle-utilization.txt")):
        name = re.sub(r"-\d+-final_hlo.*", "", path.name.split("-", 1)[1])
        if name.startswith(("<late", "TLP")):  # the program around the kernels
            continue
        text = path.read_text()
        header = re.search(r"MXU, .*", text)
        assert header is not None, f"libtpu changed the format of {path}"
        units = [unit.strip() for unit in header[0].split(",")]
        table = text.split("== UTILIZATION:")[1].split("\n")
        rows = [list(map(int, line.split())) for line in table if re.fullmatch(r"[\d ]+", line)]
        used = {unit: sum(row[i] for row in rows) for i, unit in enumerate(units)}
        kernels[name] = {
            "bundles": len(rows),
            "operations": {unit: count for unit, count in used.items() if count},
            "spills": used.get("VSTORE:SPILL", 0),
            "estimated_cycles": None,
        }
    for path in Path(dump).glob("profile/*.textproto"):
        for name, cycles in re.findall(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)', path.read_text()):
            kernels.setdefault(name, {})["estimated_cycles"] = int(cycles)
    return kernels


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
