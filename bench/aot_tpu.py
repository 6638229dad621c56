"""Compiles a function with the real TPU compiler on a machine without a TPU, and reports its cost.

``compile_for("v5e", function, arguments)`` runs libtpu's compiler in a child process (it reads its flags once
per process, and aborts on failure) and returns a :class:`Record`. The function is named, not passed:
``"module:name"`` of a builder that is called with keyword arguments and returns the function to compile
(jitted if it donates arguments) and its arguments as ``jax.ShapeDtypeStruct`` trees. A builder with a
parameter ``mesh`` receives the mesh of all the target's devices.

    python -m bench.aot_tpu v6e bench.aot_tpu:decode '{"m": 16, "k": 4096, "n": 4096}'

Estimates are static: they rank variants well, but are too optimistic about memory. Use the larger of
``estimated_cycles`` and the time that the bandwidth allows. Needs ``jax[tpu]``, on any x86-64 Linux.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

import numpy as np

from bench import llo
from bench.hlo import brought_bytes, kernels_of, looped
from pallas_kernels.chips import BY_SHORT_NAME
from pallas_kernels.chips import target as target_of_program


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


@dataclasses.dataclass
class Record:
    """The compiler's report on one program for one target; fields that it does not report are None.

    Attributes:
      target: a key of ``TARGETS``.
      error: one line, if the program did not compile; all other fields are then None.
      device_kind: ``jax.Device.device_kind``.
      bytes: HBM bytes from the compiler's cost analysis; for a Pallas call, from its cost estimate.
      argument_bytes: size of all arguments, the least that must be read.
      output_bytes: size of the results.
      temp_bytes: HBM that the program needs in addition to both.
      alias_bytes: size of the results that reuse donated arguments.
      launches: operations of the program, including Pallas kernels; a loop counts as one.
      brought_bytes: bytes that XLA copies to VMEM ahead of use; of a loop, one iteration is counted.
      looped: names of the operations in loops.
      vmem_bytes: the largest VMEM use of a kernel.
      spills: register spills of all kernels.
      bundles: instruction bundles of all kernels; a bundle in a loop counts once.
      matrix_ops: matrix unit instructions of all kernels; one in a loop counts once.
      estimated_cycles: the compiler's own estimate, summed over all kernels.
      kernels: the same numbers for each kernel.
      memory_seconds: ``(argument_bytes + output_bytes) / bandwidth``, which no program can beat.
    """

    target: str
    error: str | None = None
    device_kind: str | None = None
    bytes: float | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None
    temp_bytes: int | None = None
    alias_bytes: int | None = None
    launches: int | None = None
    brought_bytes: int | None = None
    looped: list[str] | None = None
    vmem_bytes: int | None = None
    spills: int | None = None
    bundles: int | None = None
    matrix_ops: int | None = None
    estimated_cycles: int | None = None
    kernels: dict[str, dict[str, Any]] | None = None
    memory_seconds: float | None = None


def compile_for(
    target: str,
    builder: str,
    arguments: dict[str, Any] | None = None,
    timeout: float = 600.0,
    *,
    estimate: bool = True,
) -> Record:
    """Compiles ``builder(**arguments)`` for ``target`` and reads what the compiler reports.

    Args:
      target: a key of ``TARGETS``.
      builder: ``"module:name"``, returns ``(function, its arguments)``; see the module's docstring.
      arguments: keyword arguments of the builder, as JSON values.
      timeout: limit in seconds.
      estimate: if True, cycles are estimated too, which takes another compilation, and more VMEM: a whole
        model may then not fit.

    Raises:
      ValueError: the target is unknown.
    """
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}, expected one of {list(TARGETS)}")
    request = {"target": target, "builder": builder, "arguments": arguments or {}}
    error = "libtpu left no report"
    estimated: Record | None = None
    for estimating in (True, False) if estimate and TARGETS[target].estimates else (False,):
        try:
            child, kernels = _compiled(request, timeout, estimating)
        except subprocess.TimeoutExpired:
            return Record(target, error=f"the compiler took more than {timeout:.0f} s")
        if found := re.search(r"^@@(.*)$", child.stdout, re.M):
            record = _record(target, json.loads(found[1]), kernels)
            if estimated is not None:  # with estimates, libtpu leaves kernels out of its bytes
                return dataclasses.replace(estimated, bytes=record.bytes)
            if not estimating:
                return record
            estimated = record
            continue
        error = _reason(child.stderr)
        if child.returncode >= 0:  # an exception, not an abort, would recur
            break
    return estimated or Record(target, error=error)


def operations(
    target: str, builder: str, arguments: dict[str, Any], timeout: float = 1800.0
) -> dict[str, int]:
    """Estimated cycles of a program's operations, even if the program does not fit while estimating."""
    request = {"target": target, "builder": builder, "arguments": arguments}
    found = {
        name: kernel["estimated_cycles"] for name, kernel in _compiled(request, timeout, True)[1].items()
    }
    return {name: cycles for name, cycles in found.items() if cycles is not None}


def _compiled(request: dict[str, Any], timeout: float, estimating: bool):  # type: ignore[no-untyped-def]
    """Returns the process that compiled, and libtpu's reports on the kernels."""
    with tempfile.TemporaryDirectory(prefix="aot_tpu_") as dump:
        child = subprocess.run(
            [sys.executable, "-m", "bench.aot_tpu", "--child", json.dumps(request)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=_environment(dump, estimating),
        )
        return child, llo.kernels(dump)


def _environment(dump: str, estimate: bool) -> dict[str, str]:
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_pass_label_regex=final.*"
    if estimate:
        os.mkdir(f"{dump}/profile")
        flags += f" --xla_jf_dump_static_llo_profile_to={dump}/profile"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": flags,
    }


def _child(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles; libtpu writes its reports to the directory that its flags name."""
    import inspect

    import jax
    from jax.experimental import topologies
    from jax.sharding import Mesh, SingleDeviceSharding, use_abstract_mesh

    target = TARGETS[request["target"]]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=target.topology, **target.options)
    device = topology.devices[0]
    module, name = request["builder"].split(":")
    builder = getattr(importlib.import_module(module), name)
    arguments = request["arguments"]
    wanted = inspect.signature(builder).parameters
    mesh = Mesh(np.array(topology.devices if "mesh" in wanted else [device]), ("devices",))
    if "mesh" in wanted:
        arguments = {"mesh": mesh} | arguments
    with target_of_program(device):
        function, shapes = builder(**arguments)
    place = SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding or place), shapes
    )
    # Pallas takes the chip that it lowers for from the mesh, and without one from this machine's CPU; our
    # kernels do the same, but a program may enter its own mesh.
    with use_abstract_mesh(mesh.abstract_mesh), target_of_program(device):
        jitted = function if hasattr(function, "lower") else jax.jit(function)
        lowered = jitted.lower(*shapes)
    compiled = lowered.compile()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None
    vmem = re.findall(
        r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"',
        hlo := compiled.as_text() or "",
    )
    return {
        "device_kind": device.device_kind,
        "bytes": (costs or {}).get("bytes accessed"),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "launches": kernels_of(hlo)[0],
        "brought_bytes": brought_bytes(hlo),
        "looped": looped(hlo),
        "vmem_bytes": max(map(int, vmem), default=None),
    }


def _record(target: str, said: dict[str, Any], kernels: dict[str, dict[str, Any]]) -> Record:
    def total(key: str) -> int | None:
        values = [kernel.get(key) for kernel in kernels.values()]
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    record = Record(target, kernels=kernels, **said)
    record.spills, record.bundles = total("spills"), total("bundles")
    record.estimated_cycles = total("estimated_cycles")
    record.matrix_ops = sum(k.get("operations", {}).get("MXU", 0) for k in kernels.values())
    bandwidth = BY_SHORT_NAME[TARGETS[target].device].bandwidth
    assert bandwidth is not None
    record.memory_seconds = (said["argument_bytes"] + said["output_bytes"]) / bandwidth
    return record


def _reason(stderr: str) -> str:
    """Returns the line of a traceback or of libtpu's abort that states the reason."""
    lines = [line for line in stderr.split("\n") if line.strip()]
    if any("No module named 'libtpu'" in line or "libtpu.so" in line for line in lines):
        return "libtpu is not installed: pip install 'jax[tpu]'"
    telling = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b|F\d{4} ", line)]
    return ((telling or lines or ["no message"])[-1])[:600]


def decode(m: int = 16, k: int = 4096, n: int = 4096, **options):
    """Builder: ``mixed_matmul`` on the TPU kernel, with segment sizes as data. See :func:`packed`."""
    return packed(m, k, n, **options)


def packed(
    m: int,
    k: int,
    n: int,
    group_size: int = 128,
    widths: tuple[int, ...] = (1, 2, 3),
    segments: tuple[int, ...] = (8, 16, 8),
    constant: bool = False,
    weights: int = 1,
    layers: int = 1,
    **config,
):
    """Builder: the TPU kernels on an abstract packed weight.

    ``weights`` above 1 prepares that many weights with the same input as one product. ``constant`` makes
    segment sizes constants of the kernel, because loops over data cannot be estimated. ``layers`` above 1
    stacks as many layers, of which the product reads one in place.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels.chips import of_target
    from pallas_kernels.layout import abstract_tensor
    from pallas_kernels.tpu import decode as kernel
    from pallas_kernels.tpu.layers import prepare as prepare_layers

    w = abstract_tensor(
        (k, n), widths=tuple(widths), segments=tuple(segments), group_size=group_size, dtype=jnp.bfloat16
    )
    if weights > 1 or layers > 1:
        prepare = partial(prepare_layers, stacked=layers > 1)
        w = jax.eval_shape(prepare, [[w] * weights] * layers)

    def product(x, w, layer):
        chosen = None
        if config:
            start = kernel.choose(of_target().name, m, k, n, w.mean_width, group_size)
            chosen = dataclasses.replace(start, **config)
        if constant:
            w = dataclasses.replace(w, segments=np.resize(np.array(segments, np.int32), w.segments.shape))
        if layers > 1:
            w = w.at(layer)
        return kernel.mixed_matmul(x, w, config=chosen)

    shape = jax.ShapeDtypeStruct
    return product, (shape((m, k), jnp.bfloat16), w, shape((), jnp.int32))


def sharded(mesh: Any, m: int, k: int, n: int):
    """Builder: the TPU kernels on every device of a target, each for its part of the output channels."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from pallas_kernels import sharded_matmul, use_implementation
    from pallas_kernels.layout import abstract_tensor

    def place(s: jax.ShapeDtypeStruct, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, P(*spec)))

    w = abstract_tensor((k, n), widths=(1, 2, 3), segments=(8, 16, 8), group_size=128, dtype=jnp.bfloat16)
    w = jax.tree.map(lambda s: place(s, None, "devices") if len(s.shape) == 2 else place(s), w)

    def product(x, w):
        with use_implementation("mosaic_tpu"):
            return sharded_matmul(x, w, mesh)

    return product, (place(jax.ShapeDtypeStruct((m, k), jnp.bfloat16)), w)


def dense(m: int, k: int, n: int):
    """Builder: the plain bfloat16 product of the same shape."""
    import jax
    import jax.numpy as jnp

    def product(x, w):
        return jnp.dot(x, w, preferred_element_type=jnp.float32)

    return product, (jax.ShapeDtypeStruct((m, k), jnp.bfloat16), jax.ShapeDtypeStruct((k, n), jnp.bfloat16))


def main() -> None:
    """Prints one record as JSON; exit status 1 if it did not compile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="?", choices=list(TARGETS))
    parser.add_argument("builder", nargs="?", default="bench.aot_tpu:decode")
    parser.add_argument("arguments", nargs="?", type=json.loads, default={})
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("@@" + json.dumps(_child(args.child)))
        return
    if args.target is None:
        parser.error("which target?")
    record = compile_for(args.target, args.builder, args.arguments)
    print(json.dumps(dataclasses.asdict(record), indent=1))
    sys.exit(record.error is not None)


if __name__ == "__main__":
    main()
