"""Chips: a table of datasheet values, and the device that a program is compiled for.

Kernels choose by it what they support and how, `bench` compares measurements with it, `slim_jax.plan` takes
memory sizes from it. A JAX device is half a chip on TPU v7x, so its values are half the datasheet's; NVIDIA's
operations per second are those of dense products with float32 sums.

A program may be compiled for a device that is not present. Name it then:

    with chips.target("NVIDIA H100 80GB HBM3"):
        jax.jit(program).lower(...)
"""

import dataclasses
import re
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp

GIB, MIB, KIB = 2**30, 2**20, 2**10


@dataclasses.dataclass(frozen=True)
class Device:
    """A device as JAX counts devices. None means unknown, or nonexistent.

    Attributes:
      name: ``jax.Device.device_kind``.
      platform: "cuda", "rocm", "tpu" or "cpu": the platform that a program for it is lowered for.
      short: short name, for command lines.
      memory_bytes: size of its memory.
      bandwidth: bandwidth of that memory, bytes per second.
      bfloat16_flops: operations per second of dense bfloat16 products.
      l2_bytes: size of the last cache before memory; None on TPUs, which have none.
      scratch_bytes: fast memory that a kernel can use: shared memory of a block on a GPU, VMEM of a core on a
        TPU.
      compute_capability: NVIDIA's ("9.0"), AMD's architecture ("gfx942"), a TPU's generation ("v6e").
      processors: multiprocessors of a GPU, cores of a TPU.
    """

    name: str
    platform: str
    short: str = ""
    memory_bytes: int | None = None
    bandwidth: float | None = None
    bfloat16_flops: float | None = None
    l2_bytes: int | None = None
    scratch_bytes: int | None = None
    compute_capability: str | None = None
    processors: int | None = None


def _tpu(
    name: str, short: str, memory: int, gb_per_s: float, teraflops: float, vmem: int, cores: int
) -> Device:
    return Device(
        name=name,
        platform="tpu",
        short=short,
        memory_bytes=memory * GIB,
        bandwidth=gb_per_s * 1e9,
        bfloat16_flops=teraflops * 1e12,
        scratch_bytes=vmem * MIB,
        compute_capability=short,
        processors=cores,
    )


_SHARED = {"7.5": 64, "8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227, "10.0": 227, "12.0": 99}
"""KiB of shared memory that a block can use, by compute capability (CUDA guide)."""


def _nvidia(
    name: str,
    short: str,
    capability: str,
    processors: int,
    memory: int,
    gb_per_s: float,
    teraflops: float | None,
    l2: int,
) -> Device:
    return Device(
        name=f"NVIDIA {name}" if name != "Tesla T4" else name,
        platform="cuda",
        short=short,
        memory_bytes=memory * GIB,
        bandwidth=gb_per_s * 1e9,
        bfloat16_flops=None if teraflops is None else teraflops * 1e12,
        l2_bytes=l2 * MIB,
        scratch_bytes=_SHARED[capability] * KIB,
        compute_capability=capability,
        processors=processors,
    )


# TPUs: cloud.google.com/tpu/docs; VMEM as in jax._src.tpu_info. GPUs: the vendors' datasheets.
DEVICES = (
    _tpu("TPU v4", "v4", 32, 1228, 275, vmem=16, cores=2),
    _tpu("TPU v5 lite", "v5e", 16, 819, 197, vmem=128, cores=1),
    _tpu("TPU v5", "v5p", 95, 2765, 459, vmem=64, cores=2),
    _tpu("TPU v6 lite", "v6e", 32, 1640, 918, vmem=128, cores=1),
    _tpu("TPU7x", "v7x", 192 // 2, 7380 / 2, 2307 / 2, vmem=64, cores=1),
    _nvidia("Tesla T4", "t4", "7.5", 40, 16, 320, None, l2=4),
    _nvidia("L4", "l4", "8.9", 58, 24, 300, 121, l2=48),
    _nvidia("L40S", "l40s", "8.9", 142, 48, 864, 362, l2=96),
    _nvidia("GeForce RTX 3090", "rtx3090", "8.6", 82, 24, 936, 71, l2=6),
    _nvidia("GeForce RTX 4090", "rtx4090", "8.9", 128, 24, 1008, 165.2, l2=72),
    _nvidia("GeForce RTX 5090", "rtx5090", "12.0", 170, 32, 1792, 209.5, l2=96),
    _nvidia("A10", "a10", "8.6", 72, 24, 600, 125, l2=6),
    _nvidia("A100-SXM4-40GB", "a100-40", "8.0", 108, 40, 1555, 312, l2=40),
    _nvidia("A100-SXM4-80GB", "a100-80", "8.0", 108, 80, 2039, 312, l2=40),
    _nvidia("A100 80GB PCIe", "a100-80-pcie", "8.0", 108, 80, 1935, 312, l2=40),
    _nvidia("H100 80GB HBM3", "h100", "9.0", 132, 80, 3350, 989.4, l2=50),
    _nvidia("H100 PCIe", "h100-pcie", "9.0", 114, 80, 2000, 756, l2=50),
    _nvidia("H200", "h200", "9.0", 132, 141, 4800, 989.4, l2=50),
    _nvidia("B200", "b200", "10.0", 148, 180, 8000, 2250, l2=126),
    _nvidia("GB200", "gb200", "10.0", 148, 186, 8000, 2500, l2=126),
    Device(
        name="AMD Instinct MI300X",
        platform="rocm",
        short="mi300x",
        memory_bytes=192 * GIB,
        bandwidth=5300e9,
        bfloat16_flops=1307e12,
        l2_bytes=256 * MIB,
        scratch_bytes=64 * KIB,
        compute_capability="gfx942",
        processors=304,
    ),
)

BY_SHORT_NAME = {device.short: device for device in DEVICES}

# Words in a name that identify a chip, if they are not those of its device_kind.
_WORDS = {
    "v5e": ("tpu v5 lite", "tpu v5e"),
    "v5p": ("tpu v5", "tpu v5p"),
    "v6e": ("tpu v6 lite", "tpu v6e"),
    "v7x": ("tpu7x", "tpu v7x"),
    "t4": ("t4",),
    "a100-40": ("a100",),
    "a100-80": ("a100 80gb",),
    "h100": ("h100",),
    "mi300x": ("mi300x",),
}
# A device whose name has one of these is another chip with a similar name, or a part of a chip.
_OTHERS = {"laptop", "mobile", "mig", "nvl", "ti", "d"}


def find(device_kind: str) -> Device | None:
    """The device of that name (``jax.Device.device_kind``, or a short one), or None if it is unknown.

    Words that do not identify the chip may differ: ``"NVIDIA H100 80GB HBM3"``, ``"NVIDIA H100 SXM5 80GB"``
    and ``"h100"`` are one device, ``"NVIDIA H100 PCIe"`` is another.
    """
    if device_kind.lower() in BY_SHORT_NAME:
        return BY_SHORT_NAME[device_kind.lower()]
    words = set(re.findall(r"[a-z0-9]+", device_kind.lower()))
    best, most = None, 0
    for device in DEVICES:
        plain = re.sub(r"nvidia|geforce|-", " ", device.name.lower())
        for name in _WORDS.get(device.short, (plain,)):
            known = set(name.split())
            if known <= words and len(known) > most:
                best, most = device, len(known)
    return None if words & _OTHERS else best


def describe(device: Device | jax.Device | str) -> Device:
    """The table's record of a device, or what JAX reports of the device if the table has none."""
    if isinstance(device, Device):
        return device
    if isinstance(device, str):
        unknown = Device(device, "tpu" if device.lower().startswith("tpu") else "cuda")
        return find(device) or unknown
    capability = getattr(device, "compute_capability", None)
    platform = device.platform
    if platform == "gpu":  # JAX's name for both vendors; AMD's architectures, if known, begin with gfx
        amd = str(capability).startswith("gfx") or device.device_kind.startswith("AMD")
        platform = "rocm" if amd else "cuda"
    found = find(device.device_kind)
    if found is not None and found.platform == platform:
        return found
    return Device(
        name=device.device_kind,
        platform=platform,
        scratch_bytes=getattr(device, "shared_memory_per_block_optin", None),
        compute_capability=capability,
        processors=getattr(device, "core_count", getattr(device, "num_cores", None)),
    )


_target = jax.make_user_context(None)


def target(device: Device | jax.Device | str) -> AbstractContextManager[None]:
    """Compiles programs that are traced inside the context for this device instead of JAX's default one.

    The target is part of the cache key of `jax.jit`: a function is traced again for another target.

    Args:
      device: a record, a JAX device, or a name that :func:`find` knows.

    Raises:
      ValueError: no device has that name.
    """
    if isinstance(device, str) and find(device) is None:
        raise ValueError(f"device is {device!r}, expected one of {', '.join(BY_SHORT_NAME)}")
    return _target(describe(device))


def of_target() -> Device:
    """The device that the program being traced is compiled for.

    It is the device of :func:`target`; else that of the abstract mesh (`jax.sharding.use_abstract_mesh`);
    else JAX's default device.
    """
    if _target.value is not None:
        return _target.value
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        here = (d for d in jax.local_devices() if d.device_kind == abstract.device_kind)
        return describe(next(here, abstract))  # a real device reports more
    chosen = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        chosen = jax.local_devices(backend=chosen)[0]
    return describe(chosen)


def product_dtype() -> jnp.dtype:
    """Returns the dtype of products with packed weights: float32 on CPUs, else bfloat16.

    Matrix units take bfloat16. A model that was just quantized and one that is loaded use the same dtype.
    """
    return jnp.dtype(jnp.float32 if of_target().platform == "cpu" else jnp.bfloat16)
