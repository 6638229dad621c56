"""Checks the prose of the code: how docstrings begin, and words that the field has other names for.

    python .ci/words.py

A docstring's first line is a verb phrase or a noun phrase that says what the thing is or returns.
"""

import ast
import re
import subprocess
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
    """Prints what is found in the files that git tracks; the exit status."""
    tracked = subprocess.run(["git", "ls-files", "*.py", "*.md"], capture_output=True, text=True, check=True)
    found = []
    for path in map(Path, tracked.stdout.split()):
        if path.name == "CHANGELOG.md" or path == Path(".ci/words.py") or "texts" in path.parts:
            continue
        found += words(path) + (beginnings(path) if path.suffix == ".py" else [])
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
