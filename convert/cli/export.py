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
            metavar="safetensors|hf|gptq|mlx",
            help="safetensors: packed, for every command of slim-jax and for the hub. hf: dequantized, for "
            "transformers. gptq: GPTQModel's packed format, for models with one bit width and integer zero "
            "points. mlx: packed for mlx-lm. docs/sharing.md lists the programs that read each.",
        ),
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Type of the weights for hf: float32, bfloat16 or float16. [dim]Default: unchanged.[/] For "
            "gptq and mlx, type of scales and of what is not packed: float16, bfloat16 or, for mlx, float32. "
            "[dim]Default: float16.[/]",
        ),
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT=VALUE",
            show_default=False,
            help="Measured perplexity for the model card of safetensors; may be given several times.",
        ),
    ] = None,
) -> None:
    """Export a model: packed for sharing, or in a format that other tools read.

    slim-jax export out/q2 out/q2-packed --format safetensors --perplexity wikitext2=29.4

    slim-jax export out/q2 out/q2-hf --format hf --dtype bfloat16

    slim-jax export out/q4 out/q4-gptq --format gptq

    slim-jax export out/q3 out/q3-mlx --format mlx
    """
    from convert.writers.folder import require_new
    from convert.writers.formats import check_options, write

    measured = check_options(format, dtype, perplexity or [])
    require_new(out)
    model = open_source(at_revision(source, revision))
    said = write(format, model, out, dtype, optional_tokenizer(model), measured)
    typer.echo(f"{out}: {model.config.num_layers} blocks, {said}")
