"""Settings of a quantization, built from a preset, the named options and ``--set``."""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slim_jax.config import SlimConfig
    from slim_jax.rules import Rule

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}


def make_settings(
    preset: str | None, given: Sequence[str], target_size: str | None = None, **options: Any
) -> "SlimConfig":
    """Combines ``--preset``, ``--set`` and the named options into one `SlimConfig`.

    Args:
      preset: a name of `slim_jax.config.PRESETS`; None for the defaults of `SlimConfig`.
      given: the ``--set`` items, each ``name=value``.
      target_size: the ``--target-size``, which takes the place of ``--bits``.
      options: fields of the settings that have their own option; None where it was not given.

    Raises:
      ValueError: a name or a value is wrong, or a field is given twice.
    """
    from slim_jax.config import SlimConfig

    fields = {name: value for name, value in options.items() if value is not None}
    if target_size is not None and "bits" in fields:
        raise ValueError(f"--bits {fields['bits']:g} and --target-size {target_size} exclude each other")
    for item in given:
        name, value = parse_setting(item)
        if name in fields:
            raise ValueError(f"--set {item}: {name} is given twice, expected once")
        fields[name] = value
    return SlimConfig(**fields) if preset is None else SlimConfig.preset(preset, **fields)


def make_rules(given: Sequence[str] | None, file: Path | None) -> "tuple[Rule, ...] | None":
    """Returns the rules of ``--rule``, followed by those of ``--rules``; None if there are none.

    Raises:
      ValueError: one of them cannot be understood; see :func:`parse_rule` and :func:`read_rules`.
    """
    found = [*map(parse_rule, given or ()), *(() if file is None else read_rules(file))]
    return tuple(found) or None


def parse_rule(item: str) -> "Rule":
    """Parses a rule such as ``"*.mlp.down: bits=3, group_size=64"`` or ``"blocks.0.*: skip"``.

    Raises:
      ValueError: an option does not exist, or its value has another type.
    """
    from slim_jax.rules import Rule

    pattern, colon, told = (part.strip() for part in item.rpartition(":"))
    if not colon or not pattern or not told:
        raise ValueError(f"--rule {item}: expected PATTERN: OPTIONS, such as '*.mlp.down: bits=3'")
    if told == "skip":
        return Rule(pattern, skip=True)
    label, options = f"--rule {item}", dict[str, Any]()
    for part in told.split(","):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"{label}: {part.strip()!r} is not name=value, expected options such as bits=3")
        if name in options:
            raise ValueError(f"{label}: {name} is given twice, expected once")
        options[name] = _typed(label, name, text, _fields(Rule, leave=("pattern",)), "option")
    return Rule.of((pattern, options))


def read_rules(file: Path) -> "list[Rule]":
    """Reads rules from a TOML file: one ``[[rule]]`` table each, with ``pattern`` and options.

    Raises:
      ValueError: the file does not have this form.
    """
    from slim_jax.rules import Rule

    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from None
    tables = found.pop("rule", [])
    if found or not isinstance(tables, list) or not tables:
        other = f"has {', '.join(map(repr, found))}" if found else "has no rules"
        raise ValueError(f"{file} {other}, expected tables [[rule]] and nothing else")
    rules = []
    for i, table in enumerate(tables, 1):
        if not isinstance(table, dict) or not isinstance(table.get("pattern"), str):
            raise ValueError(f'{file}: rule {i} has no pattern, expected one such as pattern = "blocks.0.*"')
        try:
            rules.append(Rule.of((table.pop("pattern"), table)))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    return rules


def parse_setting(item: str) -> tuple[str, Any]:
    """Parses ``"damping=0.02"`` to ``("damping", 0.02)``; the field of `SlimConfig` gives the type.

    Raises:
      ValueError: the field does not exist, or the value has another type.
    """
    name, equals, text = (part.strip() for part in item.partition("="))
    if not equals:
        raise ValueError(f"--set {item}: expected name=value, such as damping=0.02")
    return name, _typed(f"--set {item}", name, text, settable(), "setting")


def _typed(label: str, name: str, text: str, known: Mapping[str, tuple[type, bool]], what: str) -> Any:
    """Parses a field's value; ``known`` are the fields, ``what`` is the user's word for them."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or list(known)
        raise ValueError(f"{label}: there is no {what} {name!r}, expected one such as {', '.join(near)}")
    kind, optional = known[name]
    if optional and text.lower() == "none":
        return None
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError(text)
    except (KeyError, ValueError):
        raise ValueError(f"{label}: {name} is {text!r}, expected {KINDS[kind]}") from None
    return value


def settable() -> dict[str, tuple[type, bool]]:
    """Fields of `SlimConfig` that take a single value: each one's type, and whether it may be None."""
    from slim_jax.config import SlimConfig

    return _fields(SlimConfig)


def _fields(record: Any, leave: Sequence[str] = ()) -> dict[str, tuple[type, bool]]:
    """Fields of a record that take a single value, except those in ``leave``."""
    hints = typing.get_type_hints(record)
    found = {}
    for field in dataclasses.fields(record):
        if field.name in leave:
            continue
        hint = hints[field.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        inner = [kind for kind in kinds if kind is not types.NoneType]
        if len(inner) == 1 and inner[0] in KINDS:
            found[field.name] = inner[0], len(kinds) > 1
    return found
