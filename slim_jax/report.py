"""What a quantization did, layer by layer."""

import dataclasses
from collections import Counter
from typing import Any

from pallas_kernels import MixedTensor


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
      name: such as ``"blocks.3.attn.q"``.
      shape: ``(K, N)``.
      group_size: input channels per group.
      bits: number of groups of each width.
      bits_per_weight: stored bits over weights, everything counted.
      error: growth of the layer's squared output error over the squared output, on the calibration text,
        as solved: of the weights that make up for what was lost before (``SlimConfig.asymmetric``), and
        "slim-plus" then lowers the block's, see :class:`LearningReport`.
      worst: the same of the output channel where it is largest. In ``error``, a channel with a large weight
        outweighs all others; here it does not hide what becomes of them.
      mixed: groups at one bit more, which is also the number at one bit less (the ``p`` of the search);
        None where the bits were given.
      damping: of its Hessian: the config's, or what it took to make the Hessian positive definite.
      borrowed: of an expert: the share of its Hessian that is from all tokens of the block, not its own.
      rise: by how much the layer was expected to raise the model's loss, in nats a token, when one budget of
        bits was spent over the whole model: bits went where this falls most for a bit.
    """

    name: str
    shape: tuple[int, int]
    group_size: int
    bits: dict[str, int]
    bits_per_weight: float
    error: float
    worst: float | None = None
    mixed: int | None = None
    damping: float | None = None
    borrowed: float = 0.0
    rise: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        tensor: MixedTensor,
        errors: tuple[float, float],
        mixed: int | None,
        damping: float | None,
        borrowed: float = 0.0,
    ) -> "LayerReport":
        """Reads shape and bits off the packed weight; ``errors`` are ``error`` and ``worst``."""
        counts = {str(width): n for width, n in sorted(Counter(tensor.bits().tolist()).items())}
        stored = tensor.bits_per_weight
        return cls(name, tensor.shape, tensor.group_size, counts, stored, *errors, mixed, damping, borrowed)


@dataclasses.dataclass(frozen=True)
class LearningReport:
    """What "slim-plus" learned of a block.

    Attributes:
      losses: on the held-out samples: before the first epoch, after each, and last with codes by GPTQ
        where that follows. Empty where the first is not finite.
      kept_epoch: whose parameters were kept, an index into ``losses``; 0 is the start.
      note: what went wrong, empty if nothing did.
    """

    losses: list[float]
    kept_epoch: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class TuningReport:
    """How scales and norms of the whole model were tuned.

    Attributes:
      losses: step, and the divergence from the full-precision model's next token on held-out samples, in
        nats a token; first the start. Empty where that is not finite.
      kept: which of ``losses`` was kept, the lowest.
      tokens: that were learned from, counted as often as they were seen.
      note: what went wrong, empty if nothing did.
    """

    losses: list[tuple[int, float]]
    kept: int
    tokens: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """One finished block.

    Attributes:
      index: of the block, of ``total``.
      total: blocks of the model.
      layers: as the solver left them.
      seconds: wall seconds.
      allocation: bit widths of every group of every layer.
      learning: how "slim-plus" went on from there, where it did.
      expert_tokens: calibration tokens that were routed to each expert; empty where there are none.
    """

    index: int
    total: int
    layers: list[LayerReport]
    seconds: float
    allocation: dict[str, list[int]]
    learning: LearningReport | None = None
    expert_tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def unreached(self) -> list[str]:
        """The experts that calibration never reached, such as ``"blocks.3.moe.experts.7"``."""
        return [f"blocks.{self.index}.moe.experts.{i}" for i, n in enumerate(self.expert_tokens) if n == 0]

    @property
    def warning(self) -> str:
        """What the user should know of these experts; empty if there are none."""
        if not self.unreached:
            return ""
        names = ", ".join(self.unreached)
        return f"no calibration token was routed to {names}: quantized on all tokens of the block"

    @property
    def error(self) -> float:
        """Mean of the layers' errors; 0 where rules skip all layers."""
        return sum(layer.error for layer in self.layers) / max(len(self.layers), 1)


@dataclasses.dataclass(frozen=True)
class Report:
    """A finished quantization.

    Attributes:
      blocks: in order.
      ends: embedding and head, where they were packed; what a tied table does is under "embed".
      parameters: of the whole model.
      stored_bytes: of the whole model.
      tuning: how scales and norms were tuned in the end, where they were.
    """

    blocks: list[BlockReport]
    ends: list[LayerReport] = dataclasses.field(default_factory=list)
    parameters: int = 0
    stored_bytes: int = 0
    tuning: TuningReport | None = None

    @property
    def layers(self) -> list[LayerReport]:
        """All layers of the blocks in order."""
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all quantized layers of the blocks."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        stored = sum(layer.bits_per_weight * size for layer, size in zip(self.layers, sizes))
        return stored / sum(sizes)

    @property
    def times_smaller(self) -> float:
        """Bytes of the whole model in bfloat16 over those that are stored."""
        return 2 * self.parameters / self.stored_bytes

    @property
    def allocation(self) -> dict[str, list[int]]:
        """Bit width of every group of every layer of the blocks."""
        return {name: bits for block in self.blocks for name, bits in block.allocation.items()}

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.stored_bytes,
            "bfloat16_bytes": 2 * self.parameters,
            "seconds": sum(block.seconds for block in self.blocks),
            "ends": [dataclasses.asdict(layer) for layer in self.ends],
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "tuning": None if self.tuning is None else dataclasses.asdict(self.tuning),
            "learning": [
                None if block.learning is None else dataclasses.asdict(block.learning)
                for block in self.blocks
            ],
            "expert_tokens": [block.expert_tokens for block in self.blocks],
        }
