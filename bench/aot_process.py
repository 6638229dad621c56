"""Compilation in a process of its own: compilers read their flags once per process, and may abort."""

import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.aot_reports import brought_bytes, grids, kernels_of, looped
from bench.results import Record
from pallas_kernels import chips

TELLING = re.compile(r"LLVM ERROR|[\w.]*(Error|Exception|Exit)\b|F\d{4} ")
"""Beginnings of lines that state the reason in a traceback, or in a compiler's last words."""


def compiled(request: Record, folder: str, environment: dict[str, str], timeout: float) -> Record:
    """Runs :func:`compile_here` on the request in a process.

    Args:
      request: its arguments, as JSON values.
      folder: for files.
      environment: variables of the process, in addition to this one's.
      timeout: limit in seconds.

    Returns:
      The record, and ``error``: None, or one line if the process failed; ``aborted`` is then True if a
      signal ended it.
    """
    call = [sys.executable, "-c", "from bench.aot_process import child; child()", folder, json.dumps(request)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled after {timeout:.0f} s", "aborted": False}
    result = Path(folder, "result.json")
    if result.exists():
        return {"error": None, **json.loads(result.read_text())}
    return {"error": _reason(done), "aborted": done.returncode < 0}


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    died = f"the compiler died (signal {-done.returncode}): " if done.returncode < 0 else ""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
    if any("No module named 'libtpu'" in line or "libtpu.so" in line for line in lines):
        return "libtpu is not installed: pip install 'jax[tpu]'"
    return died + ([line for line in lines if TELLING.match(line)] or lines)[-1][:400]


def child() -> None:
    """Compiles what the command line asks for, and writes the record to the folder."""
    folder, request = sys.argv[1:]
    Path(folder, "result.json").write_text(json.dumps(compile_here(**json.loads(request))))


def compile_here(topology: Record, program: str, arguments: Record) -> Record:
    """Compiles a program of `bench.aot_programs` in this process.

    Args:
      topology: arguments of ``get_topology_desc``.
      program: name of the function.
      arguments: its keyword arguments.

    Returns:
      The common part of the records of `bench.aot_gpu.compile_for` and `bench.aot_tpu.compile_for`.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, SingleDeviceSharding, use_abstract_mesh

    from bench import aot_programs

    devices = topologies.get_topology_desc(**topology).devices
    device: Any = devices[0]
    build = getattr(aot_programs, program)
    over_all = "mesh" in inspect.signature(build).parameters
    mesh = Mesh(np.array(devices if over_all else [device]), ("devices",))
    with chips.target(device):
        function, shapes = build(**arguments, **({"mesh": mesh} if over_all else {}))
    place = SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding or place), shapes
    )
    with contextlib.ExitStack() as inside:
        if topology["platform"] == "tpu":
            # Pallas takes the chip that it lowers for from the mesh, and without one from this machine's CPU;
            # our kernels do the same, but a program may enter its own mesh.
            inside.enter_context(use_abstract_mesh(mesh.abstract_mesh))
        else:  # Mosaic reads the default device's compute capability, and assumes sm_90 without one
            inside.enter_context(jax.default_device(device))
        inside.enter_context(chips.target(device))
        traced = (function if hasattr(function, "trace") else jax.jit(function)).trace(*shapes)
        made = traced.lower().compile()
    memory: Any = made.memory_analysis()
    launches, read, written = kernels_of(hlo := made.as_text() or "")
    return {
        "device": device.device_kind,
        "bytes": (made.cost_analysis() or {}).get("bytes accessed"),
        **{f"{name}_bytes": getattr(memory, f"{name}_size_in_bytes") for name in MEMORY},
        "launches": launches,
        "read_bytes": read,
        "written_bytes": written,
        "grids": grids(traced.jaxpr.jaxpr),
        "brought_bytes": brought_bytes(hlo),
        "looped": looped(hlo),
        "vmem_bytes": max(map(int, re.findall(VMEM, hlo)), default=None),
    }


MEMORY = ("argument", "output", "temp", "alias")
VMEM = r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
