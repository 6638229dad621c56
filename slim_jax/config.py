"""How to quantize: one frozen record that the Python API, the command line and the manifest share."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from pallas_kernels.layout import zero_bits
from slim_jax.rules import Rule, first_match

METHODS = ("slim", "slim-plus", "gptq", "rtn")
SQC = ("search", "paper", "minmax")
CRITERIA = ("model", "kl", "error", "paper")
WIDE = 3.5
"""Mean width up to which codes of more than 4 bits, for which all zero points take 8, do not pay."""

LEARN = ("clip", "clip-gptq", "grid", "rounding")

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "slim", "tune": False},
    "good": {"method": "slim", "tune": True},
    "best": {"method": "slim-plus", "tune": True},
}
"""The ways to quantize that most want: nothing is learned; scales and norms are tuned end to end; before that
blocks learn, one by one."""


@dataclasses.dataclass(frozen=True)
class SlimConfig:
    """Settings of a quantization. ``None`` stands for the choice that goes with the other settings.

    Attributes:
      bits: the mean width ``N`` of the codes. For uniform bits a whole number from 1 to 8; where they are
        allocated within each layer one from 2 to 7 (groups get ``N - 1`` to ``N + 1``); over the whole
        model any number from 1 to 7, such as 2.25: no group gets fewer than its whole part.
      group_size: input channels that share scale, zero point and width; a multiple of 32.
      method: "slim" allocates bits by salience, where that pays, and solves by GPTQ; "slim-plus" then
        learns, block by block; "gptq" gives all groups ``bits``; "rtn" rounds to nearest, without
        calibration of the rounding.
      sqc: how scales and zero points are found, a name of `slim_jax.method.sqc.FITS`. "paper" repeats
        the choices of the authors' code, in the allocation and the order of work too. By default
        "search" for "slim", "minmax" for the two baselines.
      criterion: what the bit search minimizes: "model", the expected rise of the model's loss, over all
        layers at once (`slim_jax.method.budget`); within each layer "kl", "error" (see
        `slim_jax.method.sba.scores`) or "paper". By default "paper" where ``sqc`` is, "model" elsewhere.
      guide: whether tokens count in the Hessians by the gradient of the model's loss
        (`slim_jax.run.sweep`), which sweeps over all of them, not over a few thousand.
      sequential: True calibrates each layer on what the quantized layers before it in its block give,
        False on the outputs of the unquantized block. By default False where ``sqc`` is "paper".
      asymmetric: how much of what quantized layers have cost its input, and the residual stream that it adds
        to, a layer's weights make up for, from 0 to 1 (`slim_jax.method.hessian.corrected`). By default 0.5,
        and 0 for "rtn" and where scales are not searched.
      damping: fraction of the mean of the Hessian's diagonal that is added to it. By default 0.1, for text
        that the calibration has not shown, and 0.01, as in GPTQ's code, where scales are not searched.
      refine: how often the scales, zero points and codes of a solved layer are gone over again
        (`slim_jax.method.refine`). By default 2, and 0 for "rtn" and where scales are not searched.
      search_tokens: calibration tokens, evenly spread, that the bit search looks at.
      learn: what "slim-plus" learns: "clip" is the paper's SliM-LLM+, "clip-gptq", "grid" and "rounding"
        are not in the paper, see `slim_jax.method.plus`. The fields below are for "slim-plus" too.
      epochs: passes over the calibration samples, at most.
      learning_rate: of the default optimizer; by default 1e-2 where clipping is learned (the
        paper's), else 5e-3.
      batch_size: samples of a step.
      augmented: weight of the paper's augmented loss term.
      embedding_bits: width of the codes of embedding and head, 2 to 8; 16 leaves them as they are. By default
        as :func:`default_embedding_bits` says.
      embedding_group_size: their input channels that share scale and zero point; by default 64, and 32 where
        their codes have 4 bits or less.
      tune: whether scales and norms of the whole model are tuned in the end, by the divergence of its logits
        from the full-precision model's (`slim_jax.run.tuning`). By default where the method is "slim-plus"
        and ``sqc`` not "paper".
      tune_samples: how many of the calibration samples, the last, are left to tuning; no layer is solved on
        them. On samples that layers were solved on, less than half shows of what was lost. By default half
        (:meth:`samples_to_tune`); with 0 tuning looks at those that the layers were solved on.
      tune_epochs: of tuning, passes over its samples.
      tune_batch_size: samples of one of its steps.
      tune_rate: learning rate of tuning, of the logarithms of scales and gains. By default 2e-3 below 3
        bits, and a quarter of it with every further one, by measurement at 2, 3 and 4 (docs/tried.md).
      rules: what holds for some layers of the blocks instead, ``(pattern, options)`` each, see
        `slim_jax.rules.Rule`, such as ``[("blocks.0.*", "skip"), ("*.mlp.down", {"bits": 3})]``. The first
        that matches a layer's name holds, alone. ``bits`` above is then the mean of the layers to which no
        rule gives bits of their own, and that none skips.

    Raises:
      ValueError: a setting is out of its range.
    """

    bits: float = 2
    group_size: int = 128
    method: str = "slim"
    sqc: str | None = None
    criterion: str | None = None
    guide: bool = False
    sequential: bool | None = None
    asymmetric: float | None = None
    damping: float | None = None
    refine: int | None = None
    search_tokens: int = 2048
    learn: str = "rounding"
    epochs: int = 5
    learning_rate: float | None = None
    batch_size: int = 4
    augmented: float = 0.0
    embedding_bits: int | None = None
    embedding_group_size: int | None = None
    tune: bool | None = None
    tune_samples: int | None = None
    tune_epochs: int = 1
    tune_batch_size: int = 1
    tune_rate: float | None = None
    rules: Sequence[Any] = ()

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        if self.sqc is None:
            object.__setattr__(self, "sqc", "search" if self.mixed else "minmax")
        _one_of("sqc", self.sqc, SQC)
        if self.criterion is None:
            within = "paper" if self.sqc == "paper" else "kl"
            object.__setattr__(self, "criterion", "model" if self.mixed and within == "kl" else within)
        _one_of("criterion", self.criterion, CRITERIA)
        if self.sequential is None:
            object.__setattr__(self, "sequential", self.sqc != "paper")
        self._check_solving()
        self._check_bits()
        if self.embedding_bits is None:
            object.__setattr__(self, "embedding_bits", default_embedding_bits(self.bits, self.sqc))
        if self.embedding_bits not in (*range(2, 9), 16):
            raise ValueError(f"embedding_bits is {self.embedding_bits}, expected 2 to 8, or 16 for none")
        if self.embedding_group_size is None:
            size = 32 if self.embedding_bits is not None and self.embedding_bits <= 4 else 64
            object.__setattr__(self, "embedding_group_size", size)
        for name in ("group_size", "embedding_group_size"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 32 or size % 32:
                raise ValueError(f"{name} is {size}, expected a positive multiple of 32")
        _one_of("learn", self.learn, LEARN)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 1e-2 if self.clips else 5e-3)
        if self.tune is None:
            object.__setattr__(self, "tune", self.method == "slim-plus" and self.sqc != "paper")
        if self.tune_rate is None:
            object.__setattr__(self, "tune_rate", 2e-3 * 4.0 ** (2 - max(2, int(self.bits))))
        for name in ("learning_rate", "tune_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0 and at most 1")
        if self.augmented < 0:
            raise ValueError(f"augmented is {self.augmented}, expected 0 or more")
        for name in ("search_tokens", "epochs", "batch_size", "tune_epochs", "tune_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.tune_samples is not None and self.tune_samples < 0:
            raise ValueError(f"tune_samples is {self.tune_samples}, expected 0 or more")
        object.__setattr__(self, "rules", tuple(map(Rule.of, self.rules)))
        for rule in self.rules:
            try:
                self._under(rule)
            except ValueError as error:
                raise rule.error(str(error)) from None

    def _check_solving(self) -> None:
        searches = self.sqc == "search" and self.method != "rtn"
        asymmetric = (0.5 if searches else 0.0) if self.asymmetric is None else self.asymmetric
        refine = (2 if searches else 0) if self.refine is None else self.refine
        damping = (0.1 if searches else 0.01) if self.damping is None else self.damping
        object.__setattr__(self, "asymmetric", asymmetric)
        object.__setattr__(self, "refine", refine)
        object.__setattr__(self, "damping", damping)
        if not 0 < damping <= 1:
            raise ValueError(f"damping is {damping}, expected above 0 and at most 1")
        if not 0 <= asymmetric <= 1:
            raise ValueError(f"asymmetric is {asymmetric}, expected 0 to 1")
        if refine < 0:
            raise ValueError(f"refine is {refine}, expected 0 or more")

    def _check_bits(self) -> None:
        low, high = (1, 7) if self.over_model else (2, 7) if self.mixed else (1, 8)
        if self.bits % 1 == 0:  # not so of infinity
            object.__setattr__(self, "bits", int(self.bits))
        elif not self.over_model:
            raise ValueError(f"bits is {self.bits}, expected a whole number unless criterion is 'model'")
        if not low <= self.bits <= high:
            raise ValueError(f"bits is {self.bits}, expected {low} to {high} for method {self.method}")

    @classmethod
    def preset(cls, name: str = "good", **settings: Any) -> "SlimConfig":
        """The settings of a name in :data:`PRESETS`, and others beside or instead of them.

        Raises:
          ValueError: there is no such preset, or a setting is out of its range.
        """
        _one_of("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **settings})

    def rule(self, name: str) -> Rule | None:
        """The rule that holds for a layer, such as ``"blocks.3.mlp.down"``."""
        return first_match(self.rules, name)

    def of_layer(self, name: str) -> "SlimConfig | None":
        """The settings for one layer, rules applied; None where it stays in full precision."""
        rule = self.rule(name)
        return None if rule is not None and rule.skip else self._under(rule)

    def _under(self, rule: Rule | None) -> "SlimConfig":
        if not self.rules:
            return self
        return dataclasses.replace(self, rules=(), **({} if rule is None else rule.changes))

    @property
    def over_model(self) -> bool:
        """Whether one budget of bits is spent over the whole model."""
        return self.mixed and self.criterion == "model"

    @property
    def packs_ends(self) -> bool:
        """Whether embedding and head are packed too."""
        return self.embedding_bits != 16

    @property
    def mixed(self) -> bool:
        """Whether bits are allocated by salience."""
        return self.method in ("slim", "slim-plus")

    @property
    def clips(self) -> bool:
        """Whether clipping is what "slim-plus" learns."""
        return self.learn.startswith("clip")

    @property
    def widths(self) -> tuple[int, ...]:
        """The bit widths that a layer may hold.

        Over the whole model a whole mean is every group's width, and a fraction is met by its whole part
        and wider ones: groups below it cost more than is foretold (docs/tried.md).
        """
        if self.over_model:
            lowest, highest = math.floor(self.bits), math.ceil(self.bits) + 2
            if self.bits == lowest:
                return (lowest,)
            return tuple(range(lowest, min(highest, 4 if self.bits <= WIDE else 8) + 1))
        bits = int(self.bits)
        return (bits - 1, bits, bits + 1) if self.mixed else (bits,)

    @property
    def mean_width(self) -> float:
        """The budget of bits per code, which makes up for zero points of 8 bits where widths above 4 occur:
        as many bits are stored as for uniform codes of ``bits``, rounded up."""
        zeros = zero_bits(self.widths) - zero_bits((math.ceil(self.bits),))
        return self.bits - zeros / self.group_size

    def samples_to_tune(self, samples: int, devices: int = 1) -> int:
        """How many of so many calibration samples are tuning's alone, where ``devices`` share the work.

        Raises:
          ValueError: ``tune_samples`` leaves none to solve the layers on, or the devices do not divide it.
        """
        if not self.tune:
            return 0
        if self.tune_samples is None:
            return samples // 2 // devices * devices
        if self.tune_samples >= samples:
            raise ValueError(f"tune_samples is {self.tune_samples} of {samples} samples, expected fewer")
        if self.tune_samples % devices:
            raise ValueError(
                f"tune_samples is {self.tune_samples}, expected a multiple of the {devices} devices"
            )
        return self.tune_samples

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; ``SlimConfig(**fields)`` is the inverse."""
        return {**dataclasses.asdict(self), "rules": [rule.to_json() for rule in self.rules]}


def default_embedding_bits(bits: float, sqc: str | None) -> int:
    """Width of embedding and head: two bits more than the blocks have, 4 to 8; 16, which packs none, where
    the paper's code is repeated. What that costs is in `docs/quality.md`."""
    return 16 if sqc == "paper" else min(max(round(bits), 2) + 2, 8)


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
