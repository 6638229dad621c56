"""Results of a quantization, layer by layer."""

import dataclasses
from collections import Counter
from typing import Any

from pallas_kernels import MixedTensor


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
      name: layer name, such as ``"blocks.3.attn.q"``.
      shape: ``(K, N)``.
      group_size: input channels per group.
      bits: number of groups of each width.
      bits_per_weight: stored bits per weight, everything counted.
      error: squared error of the layer's output relative to the squared output, on the calibration text, as
        solved. The target is the weight that compensates the upstream error (``SlimConfig.asymmetric``);
        "slim-plus" afterwards lowers the error of the block, see :class:`LearningReport`.
      worst: the same ratio for the output channel where it is largest. In ``error``, a channel with a large
        weight outweighs all others and hides their errors; here it does not.
      mixed: number of groups with one bit more, which is also the number with one bit less (the ``p`` of the
        search); None where the bits were given.
      damping: damping of the layer's Hessian: the config's, or the value that made the Hessian positive
        definite.
      borrowed: for an expert, the share of its Hessian that comes from all tokens of the block, not its own.
      rise: predicted loss increase of the model by this layer, in nats per token, where one budget of bits
        was spent over the whole model: bits went where each lowers this most.
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
        """Makes a report, shape and bits read from ``tensor``; ``errors`` are ``error`` and ``worst``."""
        counts = {str(width): n for width, n in sorted(Counter(tensor.bits().tolist()).items())}
        stored = tensor.bits_per_weight
        return cls(name, tensor.shape, tensor.group_size, counts, stored, *errors, mixed, damping, borrowed)


@dataclasses.dataclass(frozen=True)
class LearningReport:
    """Results of "slim-plus" for a block.

    Attributes:
      losses: losses on the validation samples: before the first epoch, after each, and last with codes by
        GPTQ where that follows. Empty where the first is not finite.
      kept_epoch: index into ``losses`` of the parameters that were kept; 0 is the start.
      note: the problem that occurred, empty if there was none.
    """

    losses: list[float]
    kept_epoch: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class TuningReport:
    """Results of fine-tuning the scales and norms of the whole model.

    Attributes:
      losses: pairs of a step and its validation loss, the divergence from the full-precision model's
        next-token distribution in nats per token; the first is the start. Empty where that is not finite.
      kept: index into ``losses`` of the parameters that were kept, those of the lowest loss.
      tokens: number of training tokens, counted as often as they were seen.
      note: the problem that occurred, empty if there was none.
    """

    losses: list[tuple[int, float]]
    kept: int
    tokens: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """One finished block.

    Attributes:
      index: index of the block.
      total: number of blocks of the model.
      layers: reports of the layers, as the solver left them.
      seconds: wall time in seconds.
      allocation: bit widths of every group of every layer.
      learning: results of "slim-plus" after that, where it was used.
      expert_tokens: number of calibration tokens routed to each expert; empty where there are no experts.
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
        """Experts that no calibration token was routed to, such as ``"blocks.3.moe.experts.7"``."""
        return [f"blocks.{self.index}.moe.experts.{i}" for i, n in enumerate(self.expert_tokens) if n == 0]

    @property
    def warning(self) -> str:
        """Warning to the user about these experts; empty if there are none."""
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
      blocks: reports of the blocks in order.
      embeddings: reports of the embedding and LM head, where they were packed; a tied table is under "embed".
      parameters: number of parameters of the whole model.
      stored_bytes: stored bytes of the whole model.
      tuning: results of fine-tuning scales and norms, where that was done.
    """

    blocks: list[BlockReport]
    embeddings: list[LayerReport] = dataclasses.field(default_factory=list)
    parameters: int = 0
    stored_bytes: int = 0
    tuning: TuningReport | None = None

    @property
    def layers(self) -> list[LayerReport]:
        """Reports of all layers of the blocks in order."""
        return [layer for block in self.blocks for layer in block.layers]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all quantized layers of the blocks."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        stored = sum(layer.bits_per_weight * size for layer, size in zip(self.layers, sizes))
        return stored / sum(sizes)

    @property
    def times_smaller(self) -> float:
        """Bytes of the whole model in bfloat16, divided by its stored bytes."""
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
            "embeddings": [dataclasses.asdict(layer) for layer in self.embeddings],
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "tuning": None if self.tuning is None else dataclasses.asdict(self.tuning),
            "learning": [
                None if block.learning is None else dataclasses.asdict(block.learning)
                for block in self.blocks
            ],
            "expert_tokens": [block.expert_tokens for block in self.blocks],
        }
