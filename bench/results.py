"""Tables and JSON files of all commands.

rich is imported by the functions that need it: `bench.device` says what is not installed.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

FILE_WIDTH = 240  # characters of a line where the output is no terminal


class Results:
    """Figures of one run of a command: printed as tables, and written to a file after every record.

    Attributes:
      document: the content of the file: facts about the run, and a list of records for each table.
    """

    def __init__(self, file: Path | None = None, **about: Any) -> None:
        self.document: Record = about
        self._file = file

    def show(self, name: str, records: Iterable[Record]) -> list[Record]:
        """Prints records as a table that grows as they come; returns them.

        Where the output is no terminal, the table is printed at the end. Each record of an iterator is then
        also a line on standard error, as soon as it is there.
        """
        from rich.console import Console
        from rich.live import Live

        found = self.document.setdefault(name, [])
        terminal = sys.stdout.isatty()
        told = not terminal and not isinstance(records, list)
        width = None if terminal else FILE_WIDTH
        console = Console(width=width, markup=False, highlight=False)
        with Live(console=console, auto_refresh=False, redirect_stderr=terminal) as live:
            for record in records:
                found.append(record)
                live.update(table(found), refresh=True)
                if told:
                    print(line(record), file=sys.stderr, flush=True)
                if self._file is not None:
                    write_json(self._file, self.document)
        return found


def write_json(file: Path, document: Record) -> None:
    """Writes a document completely before it is renamed; numbers that JSON lacks become strings."""
    text = json.dumps(_finite(document), indent=1, default=str) + "\n"
    part = file.with_name(f"{file.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def table(records: Sequence[Record]) -> Any:
    """Builds a Markdown table of the plain values of records, a `rich.table.Table`.

    Lists and dictionaries are for the file alone.
    """
    from rich.box import MARKDOWN
    from rich.table import Table

    made = Table(box=MARKDOWN)
    keys = list(dict.fromkeys(key for record in records for key in _plain(record)))
    for key in keys:
        numbers = all(isinstance(record.get(key) or 0, int | float) for record in records)
        made.add_column(key.replace("_", " "), justify="right" if numbers else "left")
    for record in records:
        made.add_row(*(cell(record.get(key)) for key in keys))
    return made


def line(record: Record) -> str:
    """Formats the plain values of a record as a line of text."""
    return ", ".join(f"{key.replace('_', ' ')} {cell(value)}" for key, value in _plain(record).items())


def cell(value: Any) -> str:
    """Formats a value for people: numbers with four digits, or with all that are before the point."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "NO"}[value]
    if isinstance(value, int) or (isinstance(value, float) and 1000 <= abs(value) < math.inf):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(record: Record) -> Record:
    return {k: v for k, v in record.items() if v is not None and not isinstance(v, dict | list | tuple)}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
