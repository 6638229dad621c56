"""What the TPU kernel in decode can be tuned by, and the choice for a device and a product."""

import dataclasses

from pallas_kernels.tuning import tuned

LANES = 128
SUBLANES = 8
UNPACKS = {"int8": 8, "bfloat16": 16}  # strategy: bits of a field


@dataclasses.dataclass(frozen=True)
class Config:
    """What the kernels can be tuned by; all but ``vector`` is for decode.

    Attributes:
      strips: columns of an output tile, in units of 128.
      groups: groups in a chunk, all unrolled.
      batch: groups whose channels of x are prepared together; twice as many are measured together.
      join: strips that one product takes together; 2 fills a matrix unit 256 wide.
      deep: planes of a code lie under one another, for matrix units 256 deep; of int8, in three groups of 4.
      unpack: ``"int8"`` or ``"bfloat16"``, what the matrix unit multiplies.
      digits: of 8 bits, that x has in int8; 2 or 3.
      ahead: products after one whose result the next strips wait for; 0: they wait for none. int8 only.
      cores: cores of a device that share the columns; 2 on v4 and v5p.
      vector: dtype in which prefill scales weights; ``"bfloat16"`` where the vector unit computes in it.
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
    kind = device_kind.lower()
    unpack = "bfloat16" if "7" in kind else "int8"
    deep, wide = "v6" in kind, "v6" in kind or "7" in kind
    cores = 2 if kind in ("tpu v4", "tpu v5", "tpu v5p") else 1
    # Between two loops the matrix unit runs empty, so tiles are wide, but all strips are unrolled.
    widest = (32 if deep else 16 if unpack == "int8" else 8) // (1 if m <= 16 else 2)
    total, join = -(-n // LANES), 2 if wide and n > LANES else 1
    tiles = -(-total // (widest * cores)) * cores
    strips = -(-total // (tiles * join)) * join
    few = m <= SUBLANES
    batch = (32 if few else 16) if deep else 8  # as many as fit the registers; so does ahead
    ahead = 25 if deep and not few and m <= 16 else 0
    vector = "bfloat16" if wide else "float32"
    return Config(
        strips, batch=batch, join=join, deep=deep, unpack=unpack, ahead=ahead, cores=cores, vector=vector
    )


def choose(device_kind: str, m: int, k: int, n: int, bits: float, group_size: int) -> Config:
    """What was measured for this product, else what the :func:`heuristic` says."""
    found = tuned("mosaic_tpu", Config, device_kind, m, k, n, bits, group_size)
    return heuristic(device_kind, m, k, n) if found is None else found
