"""Builds dataclasses from JSON values, checked against the annotations; the error names the first fault."""

import dataclasses
import reprlib
import sys
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST = 1 << 31
"""Bound on the absolute value of integers."""

EXPECTED = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def from_json(kind: Any, value: Any, where: str) -> Any:
    """Converts a JSON value to a value of type ``kind``.

    Args:
      kind: int, float, str, bool, Any or a `Literal`; a list, tuple or dictionary of a supported type, or
        one of these or None; or a dataclass whose fields have supported types. If a dataclass has its own
        ``from_json``, this is called with the value once its fields are checked, and unknown fields are
        errors; other dataclasses ignore unknown fields.
      value: a value as `json.loads` returns it.
      where: name of the value in messages.

    Raises:
      ValueError: a field is missing or has another type, or a number is not finite or too large.
    """
    outer, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _record(kind, value, where)
    if outer in (Union, types.UnionType):
        (only,) = (part for part in parts if part is not types.NoneType)
        return None if value is None else from_json(only, value, where)
    if outer in (list, tuple) and isinstance(value, list):
        kinds = [parts[0]] * len(value) if outer is list or parts[1:] == (...,) else parts
        if len(kinds) == len(value):
            return outer(from_json(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    elif outer in (dict, Mapping) and isinstance(value, dict):
        return {key: from_json(parts[1], part, f"{where}[{key!r}]") for key, part in value.items()}
    elif outer is Literal and isinstance(value, str) and value in parts:
        return value
    elif kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    elif kind in EXPECTED and type(value) is kind and (kind is not int or abs(value) < LARGEST):
        return value
    told = EXPECTED.get(kind) or (f"one of {', '.join(map(str, parts))}" if outer is Literal else None)
    told = told or {list: "a list", tuple: f"a list{'' if ... in parts else f' of {len(parts)}'}"}.get(outer)
    raise ValueError(f"{where} is {reprlib.repr(value)}, expected {told or 'an object'}")


def _record(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints, fields = get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    for name, field in fields.items():
        if name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where or 'it'} has no {name}")
    inside = f"{where}." if where else ""
    found = {name: from_json(hints[name], value[name], inside + name) for name in fields if name in value}
    own = getattr(kind, "from_json", None)
    if own is not None and (unknown := [name for name in value if name not in fields]):
        raise ValueError(f"{inside}{unknown[0]} is not known to this version of slim-jax: upgrade it")
    try:
        return kind(**found) if own is None else own(value)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None
