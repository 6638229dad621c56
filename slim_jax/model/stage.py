"""Stages of a block: each computes some fields of a stream from others."""

import dataclasses
from collections.abc import Callable
from typing import Any

Stream = dict[str, Any]
"""Values that flow through a block, by name; `slim_jax.model.block.stages` lists the names."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step through a block.

    Attributes:
      run: function from a part of the block, and the fields that it ``reads``, to the fields that it
        ``gives``; None where the layers read a field that is there already.
      reads: names of fields. Besides those of the stream there is ``"route"``, the weight of the stage's
        expert for every token.
      gives: names of fields.
      layers: linear layers, by their names in the block, that then read ``input``; those of one stage are
        calibrated together, and multiplied as one.
      input: name of the field that the layers read.
      adds: if True, the layers' output for all tokens is added to the residual stream ``h`` unchanged.
      part: name of the part of the block that ``run`` takes; empty for the whole block.
      expert: index of the expert whose tokens alone these layers see; None for all tokens.
      inside: stages that compute the same one after another, for calibration.
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
    """Returns a part of a block by its dotted name; the block itself if the name is empty.

    A part is such as ``attn`` or a linear layer (or the module by which a caller has replaced it).
    """
    for part in filter(None, name.split(".")):
        block = block[int(part)] if part.isdigit() else getattr(block, part)
    return block


def passed(stage: Stage, part: Any, stream: Stream) -> Stream:
    """Returns the stream after a stage."""
    assert stage.run is not None
    given = stage.run(part, *(stream.get(name) for name in stage.reads))
    return {**stream, **dict(zip(stage.gives, given, strict=True))}
