"""Rules: options for some linear layers, where not all layers are to be treated alike.

A rule is a pattern over layer names, and options that replace the other settings for the layers that match.
Of several rules the first match wins, and it alone, as in Qwix and in GPTQModel's ``dynamic``: exceptions
come before general rules.
"""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Any

REGEX = "re:"
"""Prefix of a pattern that is a regular expression for the whole name."""

METHODS = ("slim", "gptq", "rtn")
KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "skip": ("true or false", (bool,)),
    "bits": ("a number", (int, float)),
    "group_size": ("a whole number", (int,)),
    "method": ("a name", (str,)),
    "sqc": ("a name", (str,)),
    "damping": ("a number", (int, float)),
}
"""Options of a rule: a description of the value, and its types."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Options for the layers that match a pattern. An option of None leaves the other settings unchanged.

    Attributes:
      pattern: pattern for names such as ``"blocks.3.mlp.down"``, where ``*`` stands for any text, dots
        included (`fnmatch`); after the prefix ``re:``, a regular expression for the whole name.
      skip: if True, the layers stay in full precision, stored in bfloat16; no other option may be given.
      bits: mean width of these layers, outside the budget that other layers share.
      group_size: input channels that share a scale, a zero point and a width.
      method: method that finds bits and codes: "slim", "gptq" or "rtn".
      sqc: search for scales and zero points.
      damping: damping of the Hessian.

    Raises:
      ValueError: the pattern is not a valid regular expression, the method is unknown, no option is given, or
        another one with ``skip``.
    """

    pattern: str
    skip: bool = False
    bits: float | None = None
    group_size: int | None = None
    method: str | None = None
    sqc: str | None = None
    damping: float | None = None

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise self.error(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.skip == bool(self.changes):
            told = f"skip and {', '.join(self.changes)}" if self.skip else "nothing"
            raise self.error(f"it says {told}, expected skip alone, or options such as bits=3")
        if self.pattern.startswith(REGEX):
            try:
                re.compile(self.pattern.removeprefix(REGEX))
            except re.error as error:
                raise self.error(f"not a regular expression: {error}") from None

    @classmethod
    def of(cls, given: Any) -> "Rule":
        """Makes a rule from ``(pattern, options)``, where options are a mapping or ``"skip"``.

        Raises:
          ValueError: the argument is something else, there is no such option, or a value has another type.
        """
        if isinstance(given, cls):
            return given
        pair = isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2
        if (
            not pair
            or not isinstance(given[0], str)
            or not (given[1] == "skip" or isinstance(given[1], Mapping))
        ):
            raise ValueError(
                f"a rule is {given!r}, expected (pattern, options) with options by name, or 'skip'"
            )
        pattern, options = given[0], {"skip": True} if given[1] == "skip" else dict(given[1])
        for name, value in options.items():
            if name not in KINDS:
                near = difflib.get_close_matches(str(name), KINDS, n=3, cutoff=0.5) or list(KINDS)
                found = f"there is no option {name!r}"
                raise ValueError(f"rule {pattern!r}: {found}, expected one such as {', '.join(near)}")
            told, kinds = KINDS[name]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise ValueError(f"rule {pattern!r}: {name} is {value!r}, expected {told}")
        return cls(pattern, **options)

    @property
    def changes(self) -> dict[str, Any]:
        """Options that the rule gives, except ``skip``, as fields of the config."""
        given = {name: getattr(self, name) for name in KINDS if name != "skip"}
        given["bits"] = None if self.bits is None else whole(self.bits)
        return {name: value for name, value in given.items() if value is not None}

    def matches(self, name: str) -> bool:
        """True if the pattern matches this layer name; an earlier rule may still come first."""
        if self.pattern.startswith(REGEX):
            return re.fullmatch(self.pattern.removeprefix(REGEX), name) is not None
        return fnmatch.fnmatchcase(name, self.pattern)

    def error(self, told: str) -> ValueError:
        """Returns an error that names the rule and says what is wrong with it."""
        return ValueError(f"rule {self.pattern!r}: {told}")

    def to_json(self) -> list[Any]:
        """Returns ``[pattern, options]``; :meth:`of` is the inverse."""
        return [self.pattern, {"skip": True} if self.skip else self.changes]

    def __str__(self) -> str:
        told = "skip" if self.skip else ", ".join(f"{name}={value}" for name, value in self.changes.items())
        return f"{self.pattern}: {told}"


def whole(number: float) -> float:
    """Returns the number, as an integer if it is one."""
    return int(number) if float(number).is_integer() else number


def first_match(rules: Sequence[Rule], name: str) -> Rule | None:
    """Returns the first rule that matches a layer's name; None if none does."""
    return next((rule for rule in rules if rule.matches(name)), None)


def check_rules(rules: Sequence[Rule], names: Sequence[str]) -> None:
    """Checks that every rule applies to some layer, and that at least one layer is quantized.

    Raises:
      ValueError: a rule matches no name, or only names that rules before it match; or rules skip all layers.
    """
    left = list(names)
    for rule in rules:
        if not any(map(rule.matches, left)):
            matched = [name for name in names if rule.matches(name)]
            if not matched:
                raise rule.error(f"it matches none of the {len(names)} layers, {_near(rule.pattern, names)}")
            raise rule.error(
                f"rules before it match {matched[0]} and all others that it matches, and first match wins: "
                "give it before them"
            )
        left = [name for name in left if not rule.matches(name)]
    holding = [first_match(rules, name) for name in names]
    if rules and all(rule is not None and rule.skip for rule in holding):
        raise ValueError(f"rules skip all {len(names)} layers, expected one at least that is quantized")


def _near(pattern: str, names: Sequence[str]) -> str:
    """Describes names close to a pattern, for an error message; ``*`` stands for numbers in names."""
    kinds = list(
        dict.fromkeys(".".join("*" if p.isdigit() else p for p in name.split(".")) for name in names)
    )
    plain = pattern.removeprefix(REGEX)
    near = [name for name in (*kinds, *names) if plain in name][:4]
    near = near or difflib.get_close_matches(plain, kinds, n=4, cutoff=0.4) or kinds[:4]
    told = f"near names: {', '.join(near)}" if near else "there are none"
    return f"{told}; the first is {names[0]}, the last {names[-1]}" if names else told
