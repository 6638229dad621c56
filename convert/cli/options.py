"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated, Literal

import typer

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        show_default=False,
        help="A Hugging Face directory, .gguf file, slim-jax checkpoint, owner/model on the hub, or smollm2.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="NAME",
        show_default=False,
        help="Of a SOURCE on the hub: a branch, tag or commit, also written owner/model@NAME.",
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
        help="Of embedding and head; 16 leaves them. [dim]Default: --bits + 2, at most 8; sqc paper: 16.[/]",
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Instead of --bits: as many as make the whole model so large, such as 48MB or 1.5GiB.",
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        show_default=False, help="Mean bits of a code, any number such as 2.25. [dim]Default: 2.[/]"
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        show_default=False,
        help="Input channels that share a width and a scale: 32, 64, 128 … [dim]Default: 128.[/]",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="fast|good|best",
        show_default=False,
        help="fast learns nothing; good tunes scales and norms of the whole model in the end; best also "
        "learns block by block (SliM-LLM+, and codes too), several times as long. [dim]Default: good.[/]",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        show_default=False,
        help="Any setting of the method, such as method=gptq or damping=0.02; the table is in docs/usage.md.",
    ),
]
RuleOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="PATTERN: OPTIONS",
        show_default=False,
        help="For the layers whose names match, such as '*.mlp.down: bits=3, group_size=64', or 'blocks.0.*: "
        "skip' for full precision. Several times; the first that matches a layer holds.",
    ),
]
RulesFile = Annotated[
    Path | None,
    typer.Option("--rules", metavar="FILE", help="More rules, after those, from this TOML file."),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
Length = Annotated[
    int | None,
    typer.Option(
        min=2, show_default=False, help="Tokens per window. [dim]Default: 512, or what the model has.[/]"
    ),
]


def _check_top_p(top_p: float) -> float:
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"--top-p is {top_p}, expected more than 0 and at most 1")
    return top_p


Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from so many likeliest tokens; 0 from all.")]
TopP = Annotated[
    float,
    typer.Option(
        callback=_check_top_p, max=1.0, help="Draw from the likeliest tokens that make up this probability."
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        min=0.0, help="Draw from tokens at least so likely, as a part of the likeliest's probability."
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: the logits of tokens already seen are made smaller by this.")
]
LARGEST_SEED = 2**32 - 1
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the draws.")]
MaxTokens = Annotated[int, typer.Option(min=1, metavar="N", help="At most this many new tokens.")]
CacheDtype = Annotated[
    Literal["float32", "bfloat16", "int8"] | None,
    typer.Option(show_default=False, help="Of keys and values. [dim]Default: as the model multiplies.[/]"),
]
Devices = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Share the work of every token among so many devices, or cores."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE", help="Of dense weights: float32 or bfloat16. [dim]Default: as they are.[/]"
    ),
]
