"""Events of a quantization. The caller's ``on_event(event)`` receives each one as it happens."""

import dataclasses
import warnings
from collections.abc import Callable

from slim_jax.report import BlockReport


@dataclasses.dataclass(frozen=True)
class SweepStep:
    """The gradient sweep has passed a block; it goes from the last block to the first.

    Attributes:
      done: number of blocks passed.
      total: number of blocks of the model.
    """

    done: int
    total: int


@dataclasses.dataclass(frozen=True)
class BlockDone:
    """A block is quantized and written, by this run or by the interrupted one that it resumes.

    Attributes:
      report: the block's report.
    """

    report: BlockReport


@dataclasses.dataclass(frozen=True)
class LearningEpoch:
    """ "slim-plus" has finished an epoch over a block, or over a module.

    Attributes:
      epoch: number of the epoch, from 1.
      total: the largest number of epochs.
      loss: validation loss after the epoch.
    """

    epoch: int
    total: int
    loss: float


@dataclasses.dataclass(frozen=True)
class TuningStep:
    """Fine-tuning has taken a step.

    Attributes:
      step: number of the step, from 1.
      total: the largest number of steps.
      loss: loss of the step's samples, in nats per token.
    """

    step: int
    total: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Notice:
    """Something that the user should know, such as a damaged part of a resumed run that is made again.

    Attributes:
      message: one line of text.
    """

    message: str


Event = SweepStep | BlockDone | LearningEpoch | TuningStep | Notice
OnEvent = Callable[[Event], None]


def warn_of_notices(event: Event) -> None:
    """Turns notices into Python warnings and ignores all other events; the default subscriber."""
    if isinstance(event, Notice):
        warnings.warn(event.message, stacklevel=2)
