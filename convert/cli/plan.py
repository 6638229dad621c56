"""``slim-jax plan``."""

import dataclasses
import json
from typing import Annotated

import typer

from convert.cli.options import EmbeddingBits, EmbeddingGroupSize, JsonOption, SourceArgument, TargetSize
from convert.cli.sources import read_config
from convert.display import print_plan


def plan(
    source: SourceArgument,
    bits: Annotated[float, typer.Option(help="Mean bit width.")] = 2,
    group_size: Annotated[int, typer.Option(help="Input channels that share a scale.")] = 128,
    method: Annotated[str, typer.Option(metavar="slim|slim-plus|gptq|rtn")] = "slim",
    target_size: TargetSize = None,
    embedding_bits: EmbeddingBits = None,
    embedding_group_size: EmbeddingGroupSize = 64,
    devices: Annotated[
        str, typer.Option(metavar="KIND[:COUNT]", help="Where the model is to run, such as v5e:4 or h100.")
    ] = "v5e",
    batch: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens that each has room for.")] = 4096,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    as_json: JsonOption = False,
) -> None:
    """Show what a model would need at a bit width, and whether it fits. Reads its config, no weights.

    slim-jax plan models/Llama-2-7b --bits 2 --devices v5e

    slim-jax plan models/Llama-2-70b --bits 2 --devices v5e:4 --context 2048 --json
    """
    from slim_jax.config import SlimConfig
    from slim_jax.run.plan import for_size, make_plan, parse_devices, parse_size

    settings = SlimConfig(
        bits=bits,
        group_size=group_size,
        method=method,
        embedding_bits=embedding_bits,
        embedding_group_size=embedding_group_size,
    )
    config = read_config(source)
    if target_size is not None:
        settings = for_size(config, settings, parse_size(target_size))
    found = make_plan(
        config,
        settings,
        *parse_devices(devices),
        batch=batch,
        context=context,
        samples=samples,
        length=length,
    )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        print_plan(source, found)
