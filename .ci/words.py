"""Checks the prose of the code: how docstrings begin, and words that the field has other names for.

    python .ci/words.py

A docstring's first line is a verb phrase or a noun phrase that says what the thing is or returns.
"""

import ast
import re
import sys
from pathlib import Path

BEGINNINGS = ("What", "Of", "Whether", "With", "By", "Those", "That", "In", "How", "Which")

RETIRED = {
    r"in front of": "before",
    r"ma(?:kes?|de|king) up for": "compensate",
    r"gone over again": "coordinate-descent passes",
    r"foretold": "predicted",
    r"shortfall": "residual error",
    r"learners": "training samples",
    r"taps": "token importance",
    r"(?:by|take|takes|in) turns": "chunks, one after another",
    r"runs? of (?:alike )?blocks": "scan segments",
    r"(?:first )?that matches holds": "first match wins",
    r"what a bit is worth": "bit weight",
}

PLACES = (
    *(f"{folder}/**/*.py" for folder in ("pallas_kernels", "slim_jax", "convert", "bench", "tests")),
    *("README.md", "CONTRIBUTING.md", "docs/**/*.md"),
)
"""Files that are checked; the changelog keeps its words."""

DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def beginnings(path: Path) -> list[str]:
    """Docstrings of a Python file that begin as no phrase does."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, DEFINITIONS)]
    found = [(node, ast.get_docstring(node)) for node in nodes]
    return [
        f"{path}:{getattr(node, 'lineno', 1)}: the docstring begins with {text.split()[0]!r}"
        for node, text in found
        if text and text.split()[0].strip(",:") in BEGINNINGS
    ]


def words(path: Path) -> list[str]:
    """Retired words of a file, each with the field's own."""
    return [
        f"{path}:{number}: {match[0]!r}: say {instead}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word, instead in RETIRED.items()
        if (match := re.search(rf"\b{word}\b", line, re.IGNORECASE))
    ]


def main() -> int:
    """Prints what is found below the folder that the program is run in; returns the exit status."""
    files = [path for place in PLACES for path in sorted(Path().glob(place)) if "texts" not in path.parts]
    found = []
    for path in files:
        found += words(path) + (beginnings(path) if path.suffix == ".py" else [])
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
