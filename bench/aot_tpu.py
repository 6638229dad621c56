"""The real TPU compiler on a machine without a TPU, and its report on the cost of a program.

Estimates are static: they rank variants well, but are too optimistic about memory. Use the larger of
``estimated_cycles`` and the time that the bandwidth allows. Needs ``jax[tpu]``, on any x86-64 Linux.
"""

import dataclasses
import os
import tempfile
from typing import Any

from bench.aot_process import compiled
from bench.aot_reports import tpu_kernels
from bench.results import Record
from pallas_kernels.chips import BY_SHORT_NAME


@dataclasses.dataclass(frozen=True)
class Target:
    """A TPU generation: its names in the compiler, and its datasheet.

    Attributes:
      topology: the smallest topology that libtpu has for it.
      options: further arguments of ``get_topology_desc``.
      device: its short name in :mod:`pallas_kernels.chips`.
      clock: Hz, derived from the peak FLOP/s and the size of the matrix units.
      estimates: True if libtpu estimates cycles for it (otherwise libtpu aborts).
    """

    topology: str
    options: dict[str, Any]
    device: str
    clock: float
    estimates: bool = True


ONE_CHIP = {"chips_per_host_bounds": (1, 1, 1)}
# https://cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e, .../tpu7x. v7x: one device is half a chip.
TARGETS = {
    "v5e": Target("v5e:1x1", ONE_CHIP, "v5e", 1.5e9),
    "v5e-4": Target("v5e:2x2", {"chips_per_host_bounds": (2, 2, 1)}, "v5e", 1.5e9),
    "v5p": Target("v5p:2x2x1", {}, "v5p", 1.75e9),
    "v6e": Target("v6e:1x1", ONE_CHIP, "v6e", 1.75e9),
    "v7x": Target("tpu7x:2x2x1", {}, "v7x", 2.2e9, estimates=False),
}


def compile_for(
    target: str, program: str, arguments: Record | None = None, timeout: float = 600, *, details: bool = True
) -> Record:
    """Compiles a program for a target, as `bench.aot_gpu.compile_for`.

    Args:
      target: a key of ``TARGETS``.
      program: name of a function in `bench.aot_programs`.
      arguments: its keyword arguments.
      timeout: limit in seconds.
      details: if True, cycles are estimated too, which takes another compilation, and more VMEM: a whole
        model may then not fit.

    Returns:
      A record with the same fields; ``bytes`` are HBM bytes from the compiler's cost analysis (for a Pallas
      call, from its cost estimate); ``alias_bytes`` the results that reuse donated arguments; a loop counts
      as one of the ``launches``, and ``looped`` has the names of the operations in loops; ``brought_bytes``
      are bytes that XLA copies to VMEM ahead of use, in one iteration of a loop; ``vmem_bytes`` is the
      largest VMEM use of a kernel; ``spills``, ``bundles``, ``matrix_ops`` and ``estimated_cycles`` are sums
      over kernels, in which what is in a loop counts once. Values that the compiler does not report are None.

    Raises:
      ValueError: the target is unknown.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}, expected one of {list(TARGETS)}")
    request = target, program, arguments or {}, timeout
    estimated = None
    if details and TARGETS[target].estimates:
        estimated = _compiled(*request, estimating=True)
        if estimated["error"] and not estimated["aborted"]:  # an exception, unlike an abort, would recur
            return estimated
    plain = _compiled(*request, estimating=False)
    if estimated is None or estimated["error"]:
        return plain
    # With estimates, libtpu leaves kernels out of its bytes.
    return estimated if plain["error"] else estimated | {"bytes": plain["bytes"]}


def operations(target: str, program: str, arguments: Record, timeout: float = 1800) -> dict[str, int]:
    """Estimated cycles of a program's operations, even if the program does not fit while estimating."""
    kernels = _compiled(target, program, arguments, timeout, estimating=True)["kernels"]
    found = {name: kernel["estimated_cycles"] for name, kernel in kernels.items()}
    return {name: cycles for name, cycles in found.items() if cycles is not None}


def _compiled(target: str, program: str, arguments: Record, timeout: float, estimating: bool) -> Record:
    chip = TARGETS[target]
    topology = {"platform": "tpu", "topology_name": chip.topology, **chip.options}
    request = {"topology": topology, "program": program, "arguments": arguments}
    with tempfile.TemporaryDirectory(prefix="aot_tpu_") as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_pass_label_regex=final.*"
        if estimating:
            os.mkdir(f"{folder}/profile")
            flags += f" --xla_jf_dump_static_llo_profile_to={folder}/profile"
        environment = {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": flags,
        }
        record = {"target": target, **compiled(request, folder, environment, timeout)}
        record["kernels"] = kernels = tpu_kernels(folder)
    if record["error"]:
        return record
    for name in ("spills", "bundles", "estimated_cycles"):
        known = [kernel[name] for kernel in kernels.values() if kernel.get(name) is not None]
        record[name] = sum(known) if known else None
    record["matrix_ops"] = sum(kernel.get("operations", {}).get("MXU", 0) for kernel in kernels.values())
    moved = record["argument_bytes"] + record["output_bytes"]
    return record | {"memory_us": 1e6 * moved / bandwidth(target)}


def bandwidth(target: str) -> float:
    """Memory bandwidth of a target in bytes per second."""
    found = BY_SHORT_NAME[TARGETS[target].device].bandwidth
    assert found is not None
    return found
