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
        help="Branch, tag or commit of a SOURCE on the hub; owner/model@NAME is the same.",
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
        help="Bits per weight of embedding and LM head; 16 does not quantize them. "
        "[dim]Default: --bits + 2, at most 8; with sqc=paper 16.[/]",
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Choose --bits so that the whole model has this size, such as 48MB or 1.5GiB.",
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        show_default=False,
        help="Average bits per weight, without scales and zero points: 3, 2.25 … [dim]Default: 2.[/]",
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        show_default=False,
        help="Input channels that share a bit width and scales: 32, 64, 128 … [dim]Default: 128.[/]",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="fast|good|best",
        show_default=False,
        help="fast: no training. good: fine-tunes the scales and norms of the whole model at the end. "
        "best: also trains every block (SliM-LLM+, with rounding); takes several times as long. "
        "[dim]Default: good.[/]",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        show_default=False,
        help="Change any setting of the method, such as method=gptq or damping=0.02; may be given several "
        "times. docs/usage.md lists the settings.",
    ),
]
RuleOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="PATTERN: OPTIONS",
        show_default=False,
        help="Settings for the layers whose names match PATTERN: '*.mlp.down: bits=3, group_size=64', or "
        "'blocks.0.*: skip' for full precision. May be given several times; first match wins.",
    ),
]
RulesFile = Annotated[
    Path | None,
    typer.Option(
        "--rules", metavar="FILE", help="TOML file with more rules, which come after those of --rule."
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Number of calibration windows.")]
Length = Annotated[
    int | None,
    typer.Option(
        min=2,
        show_default=False,
        help="Tokens per window. [dim]Default: 512, or all positions of the model.[/]",
    ),
]


def _check_top_p(top_p: float) -> float:
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"--top-p is {top_p}, expected more than 0 and at most 1")
    return top_p


Temperature = Annotated[
    float, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the most likely token.")
]
TopK = Annotated[int, typer.Option(min=0, help="Sample from the K most likely tokens; 0 for all.")]
TopP = Annotated[
    float,
    typer.Option(
        callback=_check_top_p,
        max=1.0,
        help="Sample from the most likely tokens whose probabilities add up to P.",
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        min=0.0, help="Sample from the tokens with at least this fraction of the highest probability."
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1, lowers the logits of tokens that have already occurred.")
]
LARGEST_SEED = 2**32 - 1
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the sampling.")]
MaxTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Largest number of new tokens.")]
CacheDtype = Annotated[
    Literal["float32", "bfloat16", "int8"] | None,
    typer.Option(
        show_default=False,
        help="Type of the stored keys and values. [dim]Default: that of the model's products.[/]",
    ),
]
Devices = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of devices (CPU cores if there is no accelerator) that share the work.",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help="Type of the weights that are not packed: float32 or bfloat16. [dim]Default: unchanged.[/]",
    ),
]
