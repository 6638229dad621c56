"""What a block is made of: stages, each from some fields of a stream to others."""

import dataclasses
from collections.abc import Callable
from typing import Any

Stream = dict[str, Any]
"""What flows through a block, by name; `slim_jax.model.block.stages` says which names there are."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step through a block.

    Attributes:
      run: from a part of the block, and the fields that it ``reads``, to those that it ``gives``; None
        where the layers read what is there already.
      reads: names of fields. Besides those of the stream there is ``"route"``, the weight of the stage's
        expert for every token.
      gives: names of fields.
      layers: linear layers, by their names in the block, that then read ``input``; those of one stage are
        calibrated together, and multiplied as one.
      input: a field.
      adds: whether what the layers give, of all tokens, is added to the residual stream ``h`` as it is.
      part: what ``run`` needs of the block, by name; all of it if empty.
      expert: whose tokens alone these layers see; None for all tokens.
      inside: stages that do the same one after another, for calibration.
    """

    run: Callable[..., tuple[Any, ...]] | None
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    layers: tuple[str, ...] = ()
    input: str = "x"
    adds: bool = False
    part: str = ""
    expert: int | None = None
    inside: "tuple[Stage, ...]" = ()


def part_of(block: Any, name: str) -> Any:
    """A part of a block, such as ``attn`` or a linear layer (or what a caller has put in its place), by its
    dotted name; the block itself if that is empty."""
    for part in filter(None, name.split(".")):
        block = block[int(part)] if part.isdigit() else getattr(block, part)
    return block


def passed(stage: Stage, part: Any, stream: Stream) -> Stream:
    """The stream after a stage."""
    assert stage.run is not None
    given = stage.run(part, *(stream.get(name) for name in stage.reads))
    return {**stream, **dict(zip(stage.gives, given, strict=True))}
