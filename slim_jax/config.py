"""Settings of a quantization: one frozen record for the Python API, the command line and the manifest."""

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
"""Mean width up to which codes of more than 4 bits do not pay: with them, all zero points take 8 bits."""

LAYER = "layer"
UNITS = ("group", LAYER)
ENGINE_WIDTHS = (2, 3, 4, 5, 6, 8)
"""Widths that a layer of one width may have: no engine's format has others."""

SHORT_ZERO_BITS = 6
"""Bits of a zero point where a layer has one width: times a scale's 5 significant bits, it fits float16."""

CLIP = "clip"
LEARN = (CLIP, "rounding")

SAMPLES, LENGTH = 128, 512
"""Default number of windows of calibration text, and of tokens in each. Fine-tuning takes long on a CPU, and
four times as long at 2048 tokens."""

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"tune": False},
    "good": {"tune": True},
    "best": {"method": "slim-plus", "tune": True},
}
"""Settings by preset name. "fast" learns nothing; "good" fine-tunes scales and norms end to end, as
``SlimConfig()`` does; "best" lets the blocks learn one by one before that."""


@dataclasses.dataclass(frozen=True)
class SlimConfig:
    """Settings of a quantization, as the caller asks for them.

    ``None`` stands for the default that goes with the other settings; :meth:`resolved` fills in all of them.

    Attributes:
      bits: mean width ``N`` of the codes: a whole number from 1 to 8 for uniform bits, and from 2 to 7 where
        bits are allocated within each layer (groups get ``N - 1`` to ``N + 1``). Where one budget is spent
        over the whole model it is any number from 1 to 7, such as 2.25; no group then gets fewer bits than
        its whole part.
      group_size: input channels that share a scale, a zero point and a width; a multiple of 32.
      method: "slim" allocates bits by salience, where that pays, and solves by GPTQ; "slim-plus" then also
        learns, block by block; "gptq" gives every group ``bits``; "rtn" rounds to nearest, and no calibration
        influences the rounding.
      unit: what has one width: "group"; or "layer" for engines that know no groups of different widths. All
        groups of the layers that share an input, such as q, k and v or gate and up, which engines load as
        one, then have one of :data:`ENGINE_WIDTHS`, and zero points at most 6 bits, so that float16 holds
        their products with scales.
      sqc: search for scales and zero points, a name in `slim_jax.method.scale_search.FITS`. "paper" also
        repeats the choices of the authors' code in the allocation and the order of work. By default "search"
        for "slim" and "slim-plus", and "minmax" for the two baselines.
      criterion: quantity that the bit search minimizes. "model" is the predicted loss increase of the model,
        over all layers at once (`slim_jax.method.budget`); within each layer "kl", "error" (see
        `slim_jax.method.sba.scores`) or "paper". By default "paper" where ``sqc`` is, else "model" for "slim"
        and "slim-plus" and "kl" for the baselines.
      sequential: if True, each layer is calibrated on the outputs of the quantized layers before it in its
        block; if False, on those of the unquantized block. By default False where ``sqc`` is "paper", else
        True.
      asymmetric: strength of error compensation, from 0 to 1: the share of the upstream error, in a layer's
        input and in the residual stream that its output is added to, for which its weights compensate
        (`slim_jax.method.hessian.corrected`). By default 0.5, and 0 for "rtn" and where scales are not
        searched.
      damping: fraction of the mean of the Hessian's diagonal that is added to the diagonal. By default 0.1,
        chosen for text outside the calibration set; 0.01, as in GPTQ's code, for "rtn" and where scales are
        not searched.
      refine: coordinate-descent passes over the scales, zero points and codes of each solved layer of a block
        (`slim_jax.method.refine`); the embedding and LM head never get any. By default 2, and 0 for "rtn" and
        where scales are not searched.
      search_tokens: calibration tokens, evenly spaced, that the bit search uses.
      learn: parameters that "slim-plus" learns: "clip" is the paper's SliM-LLM+; "rounding" is not in the
        paper, see `slim_jax.method.learnable`. The next four fields are for "slim-plus" too.
      epochs: maximum number of passes over the calibration samples.
      learning_rate: learning rate of the default optimizer; by default 1e-2 where clipping is learned (the
        paper's), else 5e-3.
      batch_size: samples per step.
      augmented: weight of the paper's augmented loss term.
      embedding_bits: width of the codes of the embedding and LM head, 2 to 8; 16 leaves them in bfloat16. The
        default is :func:`default_embedding_bits`.
      embedding_group_size: input channels of the embedding and LM head that share a scale and a zero point;
        by default 64, and 32 where their codes have 4 bits or fewer.
      tune: if True, the scales and norms of the whole model are fine-tuned at the end, to lower the
        divergence of its logits from the full-precision model's (`slim_jax.calibrate.fine_tuning`). By
        default True for "slim" and "slim-plus" unless ``sqc`` is "paper".
      tune_samples: number of calibration samples, the last ones, that are reserved for fine-tuning; no layer
        is solved on them. Samples that layers were solved on show less than half of the divergence. By
        default half of the samples (:meth:`Settings.samples_to_tune`); with 0, fine-tuning uses the samples
        that the layers were solved on.
      tune_epochs: passes of fine-tuning over its samples.
      tune_batch_size: samples per step of fine-tuning.
      tune_rate: learning rate of fine-tuning, for the logarithms of scales and gains. By default 2e-3 below 3
        bits and a quarter of that for each further bit, by measurement at 2, 3 and 4 bits (docs/tried.md).
      rules: exceptions for some layers of the blocks, ``(pattern, options)`` each, see `slim_jax.rules.Rule`,
        such as ``[("blocks.0.*", "skip"), ("*.mlp.down", {"bits": 3})]``. The first match wins, alone: the
        layer is quantized as if the rule's options replaced the settings given here. ``bits`` above is then
        the mean of the layers that no rule skips or gives bits of their own.

    Raises:
      ValueError: a setting is out of its range.
    """

    bits: float = 2
    group_size: int = 128
    method: str = "slim"
    unit: str = "group"
    sqc: str | None = None
    criterion: str | None = None
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
        """Returns all settings, with defaults filled in for those that were not given.

        Args:
          decoder: if True, the model is a decoder, whose loss decides how bits are spent over the model; if
            False, criterion "model" becomes "kl".

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
            "learning_rate": 1e-2 if self.learn == CLIP else 5e-3,
            "embedding_bits": default_embedding_bits(self.bits, sqc, self.unit),
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
        """Returns the settings for the layers of a rule; None where they stay in full precision."""
        if rule.skip:
            return None
        try:
            return dataclasses.replace(self, rules=(), **rule.changes).resolved(decoder=decoder)
        except ValueError as error:
            raise rule.error(str(error)) from None

    @staticmethod
    def preset(name: str, **settings: Any) -> "SlimConfig":
        """Returns the settings of a preset in :data:`PRESETS`, with ``settings`` added or replacing them.

        Raises:
          ValueError: there is no such preset, or a setting is out of its range.
        """
        _one_of("preset", name, tuple(PRESETS))
        return SlimConfig(**{**PRESETS[name], **settings})

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as JSON values; ``SlimConfig(**fields)`` is the inverse."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(SlimConfig)}
        return fields | {"rules": [Rule.of(rule).to_json() for rule in self.rules]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(SlimConfig):
    """All settings with values, as `SlimConfig.resolved` returns them; only ``tune_samples`` may be None.

    Attributes:
      rules: the rules as records.
      under: settings for the layers of each rule, None where they stay in full precision.
      asked: the settings that these were resolved from.
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
        _one_of("unit", self.unit, UNITS)
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
        if self.unit == LAYER:
            if self.mixed and not self.over_model:
                raise ValueError(f"criterion is {self.criterion!r}, expected 'model' where unit is 'layer'")
            low, high = 2, 6 if self.mixed else 8
        if not (self.over_model or isinstance(self.bits, int)):
            raise ValueError(f"bits is {self.bits}, expected a whole number unless criterion is 'model'")
        if not low <= self.bits <= high:
            raise ValueError(f"bits is {self.bits}, expected {low} to {high} for method {self.method}")

    def resolved(self, *, decoder: bool = True) -> "Settings":
        """Resolves the original settings again, for a model that is a decoder or not."""
        return self.asked.resolved(decoder=decoder)

    def rule(self, name: str) -> Rule | None:
        """Returns the rule that applies to a layer, such as ``"blocks.3.mlp.down"``; None if none does."""
        return first_match(self.rules, name)

    def of_layer(self, name: str) -> "Settings | None":
        """Returns the settings for one layer, rules applied; None where it stays in full precision."""
        return next((own for rule, own in zip(self.rules, self.under) if rule.matches(name)), self)

    @property
    def corrects(self) -> bool:
        """True if any layer compensates the upstream error."""
        return bool(self.asymmetric) or any(own is not None and own.corrects for own in self.under)

    @property
    def over_model(self) -> bool:
        """True if one budget of bits is spent over the whole model."""
        return self.mixed and self.criterion == "model"

    @property
    def packs_embeddings(self) -> bool:
        """True if the embedding and LM head are packed too."""
        return self.embedding_bits != 16

    @property
    def mixed(self) -> bool:
        """True if bits are allocated by salience."""
        return self.method in MIXED

    @property
    def clips(self) -> bool:
        """True if "slim-plus" learns clipping."""
        return self.learn == CLIP

    @property
    def widths(self) -> tuple[int, ...]:
        """Bit widths that a layer may hold.

        With one budget over the whole model, a whole mean is every group's width. A fractional mean is
        reached with its whole part and wider widths: narrower groups cost more than predicted
        (docs/tried.md).
        """
        if self.over_model:
            lowest, highest = math.floor(self.bits), math.ceil(self.bits) + 2
            if self.bits == lowest:
                return (lowest,)
            widths = range(lowest, min(highest, 4 if self.bits <= WIDE else 8) + 1)
            return tuple(width for width in widths if self.unit != LAYER or width in ENGINE_WIDTHS)
        bits = int(self.bits)
        return (bits - 1, bits, bits + 1) if self.mixed else (bits,)

    def fitted_zero_bits(self, widths: tuple[int, ...]) -> int:
        """Returns the bits of a fitted zero point, in a tensor of these widths; it may store more."""
        return min(zero_bits(widths), SHORT_ZERO_BITS) if self.unit == LAYER else zero_bits(widths)

    @property
    def mean_width(self) -> float:
        """Mean bits per code to spend: ``bits``, less the cost of 8-bit zero points for widths above 4.

        The stored size is then that of ``bits`` with the zero points of uniform codes of ``bits``, rounded
        up.
        """
        zeros = zero_bits(self.widths) - zero_bits((math.ceil(self.bits),))
        return self.bits - zeros / self.group_size

    def samples_to_tune(self, samples: int, devices: int = 1) -> int:
        """Returns how many of ``samples`` calibration samples are reserved for fine-tuning.

        Raises:
          ValueError: ``tune_samples`` leaves none to solve the layers on, or is no multiple of ``devices``,
            the number of devices that share the work.
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
        """Returns the values as JSON, with the values that rules change.

        They cannot be read back; the JSON of :attr:`asked` can.
        """
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


def default_embedding_bits(bits: float, sqc: str | None, unit: str = UNITS[0]) -> int:
    """Default width of the embedding and LM head: two bits more than the blocks have, 4 to 8.

    It is 16, which packs neither, where ``sqc`` is "paper". The cost in quality is in `docs/quality.md`.
    Where ``unit`` is "layer" it is the next width that engines have.
    """
    if sqc == "paper":
        return 16
    wanted = min(max(round(bits), 2) + 2, 8)
    return min(width for width in ENGINE_WIDTHS if width >= wanted) if unit == LAYER else wanted


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
