"""Tunable parameters of the TPU kernels, their choice for a device and a product, and supported products."""

import dataclasses
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp

from pallas_kernels.chips import Device, describe

LANES = 128
SUBLANES = 8
UNPACKS = {"int8": 8, "bfloat16": 16}  # strategy: bits of a field
DECODE_ROWS = 32  # with more, prefill.py computes the product
GROUP_SIZES = (32, 64, 128, 256)
GENERATIONS = ("v5e", "v5p", "v6e", "v7x")  # for which the kernels have been compiled
WITHOUT_INT8 = ("v7x",)  # their matrix units do not multiply integers
VMEM_BYTES = 60 << 20  # the most that a kernel requests; the smallest, v5p and v7x, have 64 MiB


_checking = jax.make_user_context(False)  # part of jit's cache key


def checked() -> AbstractContextManager[None]:
    """Makes decode kernels that are traced inside the context check themselves on the device, at some cost.

    They check that they stay within their operands and leave their semaphores at rest.
    """
    return _checking(True)


def checking() -> bool:
    """True if decode kernels are checked, inside :func:`checked`."""
    return bool(_checking.value)


NAME = "mosaic_tpu"
"""Name of the implementation."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunable parameters of the kernels; all but ``vector`` are for decode.

    Attributes:
      strips: columns of an output tile, in units of 128.
      groups: groups in a chunk, all unrolled.
      batch: groups whose channels of x are prepared together; scales of x are computed for twice as many.
      join: strips that share one product; 2 fills a matrix unit 256 wide.
      deep: if True, planes of a code are stacked along K, for matrix units 256 deep; with int8, in three
        groups out of 4.
      unpack: ``"int8"`` or ``"bfloat16"``, the dtype that the matrix unit multiplies.
      digits: number of 8-bit digits of x in int8; 2 or 3.
      ahead: scheduling barrier: strips wait for the result of the product this many products before; 0 for no
        barrier. int8 only.
      cores: cores of a device that divide the columns among them; 2 on v4 and v5p.
      vector: dtype in which prefill scales weights; ``"bfloat16"`` if the vector unit computes in it.
    """

    strips: int = 8
    groups: int = 8
    batch: int = 8
    join: int = 1
    deep: bool = False
    unpack: str = "int8"
    digits: int = 2
    ahead: int = 0
    cores: int = 1
    vector: str = "float32"

    def __post_init__(self) -> None:
        if self.strips < 1 or self.join < 1 or self.strips % self.join:
            raise ValueError(f"strips is {self.strips}, expected a positive multiple of join, {self.join}")
        if self.groups < 1:
            raise ValueError(f"groups is {self.groups}, expected at least 1")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}, expected at least 1")
        if self.digits not in (2, 3):
            raise ValueError(f"digits is {self.digits}, expected 2 or 3")
        if self.ahead < 0:
            raise ValueError(f"ahead is {self.ahead}, expected at least 0")
        if self.cores < 1:
            raise ValueError(f"cores is {self.cores}, expected at least 1")
        if self.vector not in ("float32", "bfloat16"):
            raise ValueError(f"vector is {self.vector!r}, expected 'float32' or 'bfloat16'")
        if self.unpack not in UNPACKS:
            raise ValueError(f"unpack is {self.unpack!r}, expected one of {list(UNPACKS)}")


def heuristic(device_kind: str, m: int, k: int, n: int) -> Config:
    """The configuration for a device (``jax.Device.device_kind``) and a product ``[m, k] @ [k, n]``."""
    del k
    device = describe(device_kind)
    generation = device.compute_capability
    unpack = "bfloat16" if generation in WITHOUT_INT8 else "int8"
    deep, wide = generation == "v6e", generation in ("v6e", "v7x")
    cores = device.processors or 1
    # The matrix unit is idle between two loops, so tiles are wide; but all strips are unrolled.
    widest = (32 if deep else 16 if unpack == "int8" else 8) // (1 if m <= 16 else 2)
    total, join = -(-n // LANES), 2 if wide and n > LANES else 1
    tiles = -(-total // (widest * cores)) * cores
    strips = -(-total // (tiles * join)) * join
    few = m <= SUBLANES
    batch = (32 if few else 16) if deep else 8  # as many as fit the registers; likewise ahead
    ahead = 25 if deep and not few and m <= 16 else 0
    vector = "bfloat16" if wide else "float32"
    return Config(
        strips, batch=batch, join=join, deep=deep, unpack=unpack, ahead=ahead, cores=cores, vector=vector
    )


def check_supported(device: Device, dtype: jnp.dtype, m: int, group_size: int, config: Config) -> None:
    """Checks that the kernels support a product on a device; a device that is no TPU is not itself checked.

    Args:
      device: the target.
      dtype: dtype of x.
      m: rows of x.
      group_size: channels in a group.
      config: the product's configuration.

    Raises:
      NotImplementedError: the product is not supported; the message says why.
    """
    if m == 0:
        raise NotImplementedError("mosaic_tpu has no block for a product without rows")
    if group_size not in GROUP_SIZES:
        raise NotImplementedError(f"mosaic_tpu takes a group size of {GROUP_SIZES}, not {group_size}")
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"mosaic_tpu takes bfloat16 or float32 activations, not {dtype}")
    if device.platform != "tpu":
        return
    if device.scratch_bytes is not None and device.scratch_bytes < VMEM_BYTES:
        raise NotImplementedError(
            f"mosaic_tpu asks for {VMEM_BYTES >> 20} MiB of VMEM, {device.name} has "
            f"{device.scratch_bytes >> 20} MiB"
        )
    if device.compute_capability not in GENERATIONS:
        raise NotImplementedError(f"mosaic_tpu is for TPUs {', '.join(GENERATIONS)}, not for {device.name}")
    if config.unpack == "int8" and m <= DECODE_ROWS and device.compute_capability in WITHOUT_INT8:
        raise NotImplementedError(f"mosaic_tpu unpacks to int8 here, which {device.name} does not multiply")
