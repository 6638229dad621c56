"""Tunable parameters of the GPU kernel, their choice for a device and a product, and supported products."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.chips import Device, describe
from pallas_kernels.gpu.operands import ROW_TILE

JAX = (0, 12)
"""Least version of JAX with which the kernel can be built."""

DECODE_ROWS = 64
# For these the kernel has been compiled (tests/test_aot.py); for 12.0 Mosaic of jax 0.12 has failed.
CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0")


NAME = "mosaic_gpu"
"""Name of the implementation."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Division of the product into blocks.

    Attributes:
      block_m: rows of x per block; 16, 32, 64 or 128.
      block_n: columns per block; 32, 64, 128 or 256.
      stages: steps of x that are in flight, or in use, in shared memory.
      groups_per_step: groups of a warp between two waits; also how far ahead words are loaded. If the groups
        of a width are not a multiple of ``groups_per_step * split_k``, the remaining ones are processed one
        group per step.
      split_k: number of K-slices, 1, 2 or 4: each is a part of the groups, for ``4 / split_k`` of a block's
        warps; a warp has ``block_n * split_k / 4`` columns. Above 1 only with a ``block_m`` of 16.

    Raises:
      ValueError: a field is not as above, or ``stages`` or ``groups_per_step`` is not in 1..16.
    """

    block_m: int = 16
    block_n: int = 128
    stages: int = 3
    groups_per_step: int = 4
    split_k: int = 1

    def __post_init__(self) -> None:
        if self.block_m not in (16, 32, 64, 128):
            raise ValueError(f"block_m is {self.block_m}, expected 16, 32, 64 or 128")
        if self.block_n not in (32, 64, 128, 256):
            raise ValueError(f"block_n is {self.block_n}, expected 32, 64, 128 or 256")
        if self.split_k not in (1, 2, 4):
            raise ValueError(f"split_k is {self.split_k}, expected 1, 2 or 4")
        if self.split_k > 1 and self.block_m != ROW_TILE:
            raise ValueError(f"split_k is {self.split_k}, expected 1 where block_m is not {ROW_TILE}")
        for name in ("stages", "groups_per_step"):
            if not 1 <= getattr(self, name) <= 16:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 to 16")


def heuristic(device_kind: str, m: int, k: int, n: int) -> Config:
    """The configuration for a device and a product: the fastest on an H200 (docs/devices.md).

    Up to 64 rows use tiles of 16 rows and blocks of the least width, whose warps split K: a block waits for
    memory and for its own instructions, so many small blocks were twice as fast as few wide ones. Two groups
    per step leave registers for two blocks in a multiprocessor, one group for three; the heuristic chooses
    one group if that needs fewer rounds. Prefill uses blocks of 64 rows, which share each masked word, and
    one group per step, because the sums fill the registers.
    """
    if m > DECODE_ROWS:
        block_n = next(width for width in (128, 64, 32) if n >= width or width == 32)
        return Config(block_m=64, block_n=block_n, stages=3, groups_per_step=1)
    processors = describe(device_kind).processors or 108
    # A K-slice below 512 channels would spend more on filling its pipelines than on its groups.
    split = next(s for s in (4, 2, 1) if k // s >= 512 or s == 1)
    blocks = -(-m // ROW_TILE) * -(-n // 32)
    rounds = {resident: -(-blocks // (resident * processors)) for resident in (2, 3)}
    stages, per_step = (3, 1) if rounds[3] < rounds[2] else (2, 2)
    return Config(block_m=ROW_TILE, block_n=32, stages=stages, groups_per_step=per_step, split_k=split)


def shared_bytes(config: Config, group_size: int) -> int:
    """Shared memory of a block: the pipeline of x and its barriers; after it, the sums of the K-slices."""
    step = config.split_k * config.block_m * group_size * 2  # of one group per K-slice, bfloat16
    barriers = config.stages + max(config.stages, config.groups_per_step)
    shares = config.split_k * config.block_m * config.block_n * 4 if config.block_m == ROW_TILE else 0
    return max(config.stages * config.groups_per_step * step, shares) + 8 * barriers


def fitted(config: Config, device: Device, group_size: int) -> Config:
    """The configuration with groups per step, then stages, reduced until it fits the shared memory."""
    limit = device.scratch_bytes if device.platform == "cuda" else None
    while limit is not None and shared_bytes(config, group_size) > limit:
        if config.groups_per_step > 1:
            config = dataclasses.replace(config, groups_per_step=config.groups_per_step // 2)
        elif config.stages > 1:
            config = dataclasses.replace(config, stages=config.stages - 1)
        else:
            break
    return config


def check_supported(device: Device, dtype: jnp.dtype, m: int, group_size: int, config: Config | None) -> None:
    """Checks that the kernel supports a product on a device; a device that is no GPU is not itself checked.

    Args:
      device: the target.
      dtype: dtype of x.
      m: rows of x.
      group_size: channels in a group.
      config: the product's configuration, if it is known.

    Raises:
      NotImplementedError: the product is not supported; the message says why.
    """
    if group_size not in (32, 64, 128):
        raise NotImplementedError(f"mosaic_gpu takes groups of 32, 64 or 128, not of {group_size}")
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"mosaic_gpu takes bfloat16 or float32 activations, not {dtype}")
    if m == 0:
        raise NotImplementedError("mosaic_gpu has no block for a product without rows")
    if device.platform == "rocm":
        raise NotImplementedError(f"mosaic_gpu runs on NVIDIA GPUs, not on {device.name}")
    if device.platform == "cuda" and device.compute_capability not in (None, *CAPABILITIES):
        raise NotImplementedError(
            f"mosaic_gpu is for compute capability {', '.join(CAPABILITIES)}, "
            f"{device.name} has {device.compute_capability}"
        )
    limit = device.scratch_bytes if device.platform == "cuda" else None
    if config is not None and limit is not None and (needed := shared_bytes(config, group_size)) > limit:
        raise NotImplementedError(
            f"mosaic_gpu needs {needed} bytes of shared memory for {config}, {device.name} has {limit}"
        )
    if jax.__version_info__ < JAX:  # Mosaic GPU's loads and stores had other names and layouts
        least = ".".join(map(str, JAX))
        raise NotImplementedError(f"mosaic_gpu needs jax {least} or newer, this is {jax.__version__}")
