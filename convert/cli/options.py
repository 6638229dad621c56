"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        show_default=False,
        help="A Hugging Face directory, .gguf file, slim-jax checkpoint, owner/model on the hub, or smollm2.",
    ),
]
OutArgument = Annotated[
    Path, typer.Argument(metavar="OUT", show_default=False, help="Directory to write; new or empty.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")
]
EmbeddingBits = Annotated[
    int | None,
    typer.Option(
        metavar="2…8|16",
        show_default=False,
        help="Of embedding and head; 16 leaves them. [dim]Default: --bits + 3, at most 8; sqc paper: 16.[/]",
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Instead of --bits: as many as make the whole model so large, such as 48MB or 1.5GiB.",
    ),
]
EmbeddingGroupSize = Annotated[int, typer.Option(help="Of embedding and head.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE", help="Of dense weights: float32 or bfloat16. [dim]Default: as they are.[/]"
    ),
]
