"""``slim-jax export``."""

from typing import Annotated

import typer

from convert.cli.options import OutArgument, SourceArgument
from convert.cli.sources import open_source, optional_tokenizer, require_new


def export(
    source: SourceArgument,
    out: OutArgument,
    format: Annotated[
        str, typer.Option(metavar="hf", help="hf: safetensors that transformers loads.")
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16. [dim]Default: as they are.[/]"),
    ] = None,
) -> None:
    """Write a model with dequantized weights, for other tools to load.

    slim-jax export out/q2 out/q2-hf --format hf --dtype bfloat16
    """
    if format != "hf":
        raise ValueError(f"--format is {format!r}, expected hf")
    require_new(out)
    from convert.export import export_hf

    model = open_source(source)
    export_hf(model, out, dtype, tokenizer=optional_tokenizer(source, model))
    typer.echo(f"{out}: {model.config.num_layers} blocks, dequantized")
