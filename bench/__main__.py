"""Measures and checks this project: ``python -m bench NAME [options]``; ``--help`` lists the names.

A command is a file of this folder that has ``main(parser, given)``: it adds its options to the parser, parses
what is given, and shows its figures by `bench.results.Results`.
"""

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


def commands() -> dict[str, str]:
    """Returns the name of every command, and the first line of its file."""
    texts = {file.stem: file.read_text("utf-8") for file in sorted(Path(__file__).parent.glob("[a-z]*.py"))}
    return {
        name.replace("_", "-"): (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        for name, text in texts.items()
        if "\ndef main(parser:" in text
    }


def main(given: Sequence[str] | None = None) -> None:
    """Runs the command that the first argument names; only its own file is imported."""
    given, known = sys.argv[1:] if given is None else given, commands()
    lines = "\n".join(f"  {name:10}{text}" for name, text in known.items())
    names = argparse.ArgumentParser(
        prog="python -m bench",
        epilog=f"{lines}\n\npython -m bench NAME --help has the options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names.add_argument("name", choices=known, metavar="NAME")
    name = names.parse_args(given[:1]).name
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=known[name])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file, too")
    importlib.import_module(f"bench.{name.replace('-', '_')}").main(parser, given[1:])


if __name__ == "__main__":
    main()
