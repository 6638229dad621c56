"""How to quantize: one frozen record that the Python API, the command line and the manifest share."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from pallas_kernels.layout import zero_bits
from slim_jax.rules import Rule, first_match, whole

MIXED = ("slim", "slim-plus")
METHODS = (*MIXED, "gptq", "rtn")
SQC = ("search", "paper", "minmax")
CRITERIA = ("model", "kl", "error", "paper")
WIDE = 3.5
"""Mean width up to which codes of more than 4 bits, for which all zero points take 8, do not pay."""

CLIP = "clip"
LEARN = (CLIP, "clip-gptq", "grid", "rounding")

SAMPLES, LENGTH = 128, 512
"""Windows of calibration text, and their tokens, by default. On a CPU tuning takes long, and at 2048 tokens
four times as long."""

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"tune": False},
    "good": {"tune": True},
    "best": {"method": "slim-plus", "tune": True},
}
"""The ways to quantize that most want: nothing is learned; scales and norms are tuned end to end, as
``SlimConfig()`` does; before that blocks learn, one by one."""


@dataclasses.dataclass(frozen=True)
class SlimConfig:
    """Settings of a quantization, as they are asked for.

    ``None`` stands for the choice that goes with the other settings; :meth:`resolved` makes all of them.

    Attributes:
      bits: the mean width ``N`` of the codes. For uniform bits a whole number from 1 to 8; where they are
        allocated within each layer one from 2 to 7 (groups get ``N - 1`` to ``N + 1``); over the whole
        model any number from 1 to 7, such as 2.25: no group gets fewer than its whole part.
      group_size: input channels that share scale, zero point and width; a multiple of 32.
      method: "slim" allocates bits by salience, where that pays, and solves by GPTQ; "slim-plus" then
        learns, block by block; "gptq" gives all groups ``bits``; "rtn" rounds to nearest, without
        calibration of the rounding.
      sqc: how scales and zero points are found, a name of `slim_jax.method.scale_search.FITS`. "paper"
        repeats the choices of the authors' code, in the allocation and the order of work too. By default
        "search" for "slim", "minmax" for the two baselines.
      criterion: what the bit search minimizes: "model", the expected rise of the model's loss, over all
        layers at once (`slim_jax.method.budget`); within each layer "kl", "error" (see
        `slim_jax.method.sba.scores`) or "paper". By default "paper" where ``sqc`` is, "model" elsewhere.
      guide: whether tokens count in the Hessians by the gradient of the model's loss
        (`slim_jax.calibrate.sensitivity`), which sweeps over all of them, not over a few thousand.
      sequential: True calibrates each layer on what the quantized layers before it in its block give,
        False on the outputs of the unquantized block. By default False where ``sqc`` is "paper".
      asymmetric: how much of what quantized layers have cost its input, and the residual stream that it adds
        to, a layer's weights make up for, from 0 to 1 (`slim_jax.method.hessian.corrected`). By default 0.5,
        and 0 for "rtn" and where scales are not searched.
      damping: fraction of the mean of the Hessian's diagonal that is added to it. By default 0.1, for text
        that the calibration has not shown, and 0.01, as in GPTQ's code, where scales are not searched.
      refine: how often the scales, zero points and codes of a solved layer of a block are gone over again
        (`slim_jax.method.refine`); those of embedding and head never are. By default 2, and 0 for "rtn" and
        where scales are not searched.
      search_tokens: calibration tokens, evenly spread, that the bit search looks at.
      learn: what "slim-plus" learns: "clip" is the paper's SliM-LLM+, "clip-gptq", "grid" and "rounding"
        are not in the paper, see `slim_jax.method.learnable`. The fields below are for "slim-plus" too.
      epochs: passes over the calibration samples, at most.
      learning_rate: of the default optimizer; by default 1e-2 where clipping is learned (the
        paper's), else 5e-3.
      batch_size: samples of a step.
      augmented: weight of the paper's augmented loss term.
      embedding_bits: width of the codes of embedding and head, 2 to 8; 16 leaves them in bfloat16. By default
        as :func:`default_embedding_bits` says.
      embedding_group_size: their input channels that share scale and zero point; by default 64, and 32 where
        their codes have 4 bits or less.
      tune: whether scales and norms of the whole model are tuned in the end, by the divergence of its logits
        from the full-precision model's (`slim_jax.calibrate.fine_tuning`). By default where the method is
        "slim" or "slim-plus" and ``sqc`` not "paper".
      tune_samples: how many of the calibration samples, the last, are left to tuning; no layer is solved on
        them. On samples that layers were solved on, less than half shows of what was lost. By default half
        (:meth:`Settings.samples_to_tune`); with 0 tuning looks at those that the layers were solved on.
      tune_epochs: of tuning, passes over its samples.
      tune_batch_size: samples of one of its steps.
      tune_rate: learning rate of tuning, of the logarithms of scales and gains. By default 2e-3 below 3
        bits, and a quarter of it with every further one, by measurement at 2, 3 and 4 (docs/tried.md).
      rules: what holds for some layers of the blocks instead, ``(pattern, options)`` each, see
        `slim_jax.rules.Rule`, such as ``[("blocks.0.*", "skip"), ("*.mlp.down", {"bits": 3})]``. The first
        that matches a layer's name holds, alone: the layer is quantized as all would be if what is asked for
        here had the rule's options instead. ``bits`` above is then the mean of the layers to which no rule
        gives bits of their own, and that none skips.

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
        self.resolved()  # for its errors

    def resolved(self, *, decoder: bool = True) -> "Settings":
        """All settings, those that were not asked for as they go with the others.

        Args:
          decoder: whether there is a decoder, by whose loss bits are spent over the model; else criterion
            "model" stands for "kl".

        Raises:
          ValueError: a setting is out of its range.
        """
        if not math.isfinite(self.bits):
            raise ValueError(f"bits is {self.bits}, expected a number")
        asked = {field.name: getattr(self, field.name) for field in dataclasses.fields(SlimConfig)}
        given = {name: value for name, value in asked.items() if value is not None}
        mixed = self.method in MIXED
        sqc = given.get("sqc", "search" if mixed else "minmax")
        searches = sqc == "search" and self.method != "rtn"
        values: dict[str, Any] = {
            "sqc": sqc,
            "criterion": "paper" if sqc == "paper" else "model" if mixed else "kl",
            "sequential": sqc != "paper",
            "asymmetric": 0.5 if searches else 0.0,
            "damping": 0.1 if searches else 0.01,
            "refine": 2 if searches else 0,
            "learning_rate": 1e-2 if self.learn.startswith(CLIP) else 5e-3,
            "embedding_bits": default_embedding_bits(self.bits, sqc),
            "tune": mixed and sqc != "paper",
            "tune_rate": 2e-3 * 4.0 ** (2 - max(2, int(self.bits))),
            **given,
            "bits": whole(self.bits),
            "rules": tuple(map(Rule.of, self.rules)),
        }
        if values["criterion"] == "model" and not decoder:
            values["criterion"] = "kl"
        values.setdefault("embedding_group_size", 32 if values["embedding_bits"] <= 4 else 64)
        under = tuple(self._under(rule, decoder) for rule in values["rules"])
        return Settings(**values, under=under, asked=self)

    def _under(self, rule: Rule, decoder: bool) -> "Settings | None":
        """The settings for the layers of a rule; None where they stay in full precision."""
        if rule.skip:
            return None
        try:
            return dataclasses.replace(self, rules=(), **rule.changes).resolved(decoder=decoder)
        except ValueError as error:
            raise rule.error(str(error)) from None

    @staticmethod
    def preset(name: str, **settings: Any) -> "SlimConfig":
        """The settings of a name in :data:`PRESETS`, and others beside or instead of them.

        Raises:
          ValueError: there is no such preset, or a setting is out of its range.
        """
        _one_of("preset", name, tuple(PRESETS))
        return SlimConfig(**{**PRESETS[name], **settings})

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; ``SlimConfig(**fields)`` is the inverse."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(SlimConfig)}
        return fields | {"rules": [Rule.of(rule).to_json() for rule in self.rules]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(SlimConfig):
    """A value for every setting, as `SlimConfig.resolved` makes them; ``tune_samples`` alone may be None.

    Attributes:
      rules: as records.
      under: what holds for the layers of each rule, None where they stay in full precision.
      asked: what they were made of.
    """

    sqc: str
    criterion: str
    sequential: bool
    asymmetric: float
    damping: float
    refine: int
    learning_rate: float
    embedding_bits: int
    embedding_group_size: int
    tune: bool
    tune_rate: float
    rules: tuple[Rule, ...]
    under: tuple["Settings | None", ...]
    asked: SlimConfig = dataclasses.field(repr=False, compare=False)

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("sqc", self.sqc, SQC)
        _one_of("criterion", self.criterion, CRITERIA)
        _one_of("learn", self.learn, LEARN)
        self._check_bits()
        if self.embedding_bits not in (*range(2, 9), 16):
            raise ValueError(f"embedding_bits is {self.embedding_bits}, expected 2 to 8, or 16 for none")
        for name in ("group_size", "embedding_group_size"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 32 or size % 32:
                raise ValueError(f"{name} is {size}, expected a positive multiple of 32")
        for name in ("damping", "learning_rate", "tune_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0 and at most 1")
        if not 0 <= self.asymmetric <= 1:
            raise ValueError(f"asymmetric is {self.asymmetric}, expected 0 to 1")
        for name in ("refine", "augmented", "tune_samples"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in ("search_tokens", "epochs", "batch_size", "tune_epochs", "tune_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    def _check_bits(self) -> None:
        low, high = (1, 7) if self.over_model else (2, 7) if self.mixed else (1, 8)
        if not (self.over_model or isinstance(self.bits, int)):
            raise ValueError(f"bits is {self.bits}, expected a whole number unless criterion is 'model'")
        if not low <= self.bits <= high:
            raise ValueError(f"bits is {self.bits}, expected {low} to {high} for method {self.method}")

    def resolved(self, *, decoder: bool = True) -> "Settings":
        """The same, or as they are for another kind of model."""
        return self.asked.resolved(decoder=decoder)

    def rule(self, name: str) -> Rule | None:
        """The rule that holds for a layer, such as ``"blocks.3.mlp.down"``."""
        return first_match(self.rules, name)

    def of_layer(self, name: str) -> "Settings | None":
        """The settings for one layer, rules applied; None where it stays in full precision."""
        return next((own for rule, own in zip(self.rules, self.under) if rule.matches(name)), self)

    @property
    def corrects(self) -> bool:
        """Whether any layer makes up for what those before it have cost."""
        return bool(self.asymmetric) or any(own is not None and own.corrects for own in self.under)

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
        return self.method in MIXED

    @property
    def clips(self) -> bool:
        """Whether clipping is what "slim-plus" learns."""
        return self.learn.startswith(CLIP)

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
        """The values as JSON, and what rules change of them; no inverse, that is :attr:`asked`'s."""
        values = super().to_json()
        if not self.rules:
            return values
        others = [None if own is None else own.to_json() for own in self.under]
        changed = [
            other
            and {name: value for name, value in other.items() if name != "rules" and value != values[name]}
            for other in others
        ]
        return values | {"rules_resolved": changed}


def default_embedding_bits(bits: float, sqc: str | None) -> int:
    """Width of embedding and head: two bits more than the blocks have, 4 to 8; 16, which packs none, where
    the paper's code is repeated. What that costs is in `docs/quality.md`."""
    return 16 if sqc == "paper" else min(max(round(bits), 2) + 2, 8)


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
