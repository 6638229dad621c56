"""The settings of a quantization, from a preset, the options that have a name of their own, and ``--set``."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slim_jax.config import SlimConfig

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}


def make_settings(preset: str | None, given: Sequence[str], **options: Any) -> "SlimConfig":
    """What ``--preset``, ``--set`` and options ask for together.

    Args:
      preset: a name of `slim_jax.config.PRESETS`. None is "good", unless ``given`` names a method or the
        paper's choices, which then say all.
      given: ``name=value`` each.
      options: fields of the settings that have an option; None where it was not given.

    Raises:
      ValueError: a name or a value is wrong, or a field is given twice.
    """
    from slim_jax.config import SlimConfig

    fields = {name: value for name, value in options.items() if value is not None}
    for item in given:
        name, value = parse_setting(item)
        if name in fields:
            raise ValueError(f"--set {item}: {name} is given twice, expected once")
        fields[name] = value
    if preset is None and ("method" in fields or fields.get("sqc") == "paper"):
        return SlimConfig(**fields)
    return SlimConfig.preset(preset or "good", **fields)


def check_size(bits: float | None, target_size: str | None) -> None:
    """Whether the size of the result is asked for in one way.

    Raises:
      ValueError: it is asked for in two.
    """
    if bits is not None and target_size is not None:
        raise ValueError(
            f"--bits {bits:g} and --target-size {target_size} say two things, expected one of them"
        )


def parse_setting(item: str) -> tuple[str, Any]:
    """``"damping=0.02"`` -> ``("damping", 0.02)``, of the type that the field of `SlimConfig` has.

    Raises:
      ValueError: there is no such field, or the value has another type.
    """
    name, equals, text = (part.strip() for part in item.partition("="))
    if not equals:
        raise ValueError(f"--set {item}: expected name=value, such as damping=0.02")
    known = settable()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or list(known)
        raise ValueError(
            f"--set {item}: there is no setting {name!r}, expected one such as {', '.join(near)}"
        )
    kind, optional = known[name]
    if optional and text.lower() == "none":
        return name, None
    try:
        if kind is bool:
            return name, {"true": True, "false": False}[text.lower()]
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError(text)
    except (KeyError, ValueError):
        raise ValueError(f"--set {item}: {name} is {text!r}, expected {KINDS[kind]}") from None
    return name, value


def settable() -> dict[str, tuple[type, bool]]:
    """Every field of `SlimConfig` that one value sets: its type, and whether it may be none."""
    from slim_jax.config import SlimConfig

    hints = typing.get_type_hints(SlimConfig)
    found = {}
    for field in dataclasses.fields(SlimConfig):
        hint = hints[field.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        inner = [kind for kind in kinds if kind is not types.NoneType]
        if len(inner) == 1 and inner[0] in KINDS:
            found[field.name] = inner[0], len(kinds) > 1
    return found
