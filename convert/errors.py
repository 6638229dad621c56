"""The one error of this package."""


class ConvertError(ValueError):
    """A model cannot be read or written. The message is one line that names the cause."""


UNFIT = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""Exceptions that reading a config raises where values have an unforeseen type or size."""


def listed(names: list[str], limit: int = 6) -> str:
    """Joins ``names`` as "a, b, c", cut after ``limit`` with the number of those left out."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def first_line(error: BaseException) -> str:
    """First line of another library's message, or the exception's type if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__
