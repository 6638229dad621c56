"""``slim-jax export``."""

from typing import Annotated

import typer

from convert.cli.options import OutArgument, Revision, SourceArgument
from convert.cli.sources import at_revision, open_source, optional_tokenizer


def export(
    source: SourceArgument,
    out: OutArgument,
    revision: Revision = None,
    format: Annotated[
        str,
        typer.Option(
            metavar="safetensors|hf|gptq",
            help="safetensors: packed as it is, a few files to pass on, which every command here reads. "
            "hf: dequantized, which transformers loads. gptq: GPTQModel's packed format, of results with one "
            "width and whole zero points; docs/sharing.md says which programs take which of them.",
        ),
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Of hf: float32, bfloat16 or float16. [dim]Default: as they are.[/] Of gptq, what is not "
            "packed and scales: float16 or bfloat16. [dim]Default: float16.[/]",
        ),
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT=VALUE",
            show_default=False,
            help="Of safetensors: measured with eval, for the model card. May be given several times.",
        ),
    ] = None,
) -> None:
    """Write a model for others: packed to pass on, or in a form that other tools load.

    slim-jax export out/q2 out/q2-packed --format safetensors --perplexity wikitext2=29.4

    slim-jax export out/q2 out/q2-hf --format hf --dtype bfloat16

    slim-jax export out/q4 out/q4-gptq --format gptq
    """
    from convert.writers.folder import require_new
    from convert.writers.formats import check_options, write

    measured = check_options(format, dtype, perplexity or [])
    require_new(out)
    model = open_source(at_revision(source, revision))
    said = write(format, model, out, dtype, optional_tokenizer(model), measured)
    typer.echo(f"{out}: {model.config.num_layers} blocks, {said}")
