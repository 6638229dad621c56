"""``slim-jax inspect``."""

from pathlib import Path
from typing import Annotated

import typer

from convert.cli.options import JsonOption, Revision
from convert.cli.sources import at_revision, require_folder
from convert.display import print_json, print_layers


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", show_default=False, help="A slim-jax checkpoint.")],
    revision: Revision = None,
    as_json: JsonOption = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the report page to this file (quantize writes it to report.html).",
        ),
    ] = None,
) -> None:
    """Show what a checkpoint stores: sizes, bits per weight, and the bits of each layer.

    slim-jax inspect out/q2

    slim-jax inspect out/q2 --json | jq .bits_per_weight

    slim-jax inspect out/q2 --html layers.html
    """
    require_folder("--html", html)
    from slim_jax.store import checkpoint

    path = Path(at_revision(str(path), revision))
    found = checkpoint.inspect(path)
    if html is not None:
        from convert.report import write_report

        write_report(path, html)
    if as_json:
        print_json(found)
    else:
        print_layers(str(path), found)
