"""``slim-jax generate``."""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convert.cli.options import (
    CacheDtype,
    Devices,
    JsonOption,
    MaxTokens,
    MinP,
    RepetitionPenalty,
    Revision,
    Seed,
    SourceArgument,
    Temperature,
    TopK,
    TopP,
)
from convert.cli.sources import (
    at_revision,
    devices_mesh,
    encode,
    open_source,
    require_positions,
    tokenizer_of,
    whole_decoder,
)
from convert.display import Stream, print_json

if TYPE_CHECKING:
    from convert.text import Text
    from slim_jax.infer.generate import Generator

ROWS = 16
"""Prompts that are continued at once in one batch."""


def generate(
    source: SourceArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False, metavar="TEXT", help="Text to continue; may be given several times."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text with one prompt per line.")
    ] = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            show_default=False,
            help="Stop before this text; \\n is the end of a line. May be given several times.",
        ),
    ] = None,
    seed: Seed = 0,
    cache_dtype: CacheDtype = None,
    devices: Devices = 1,
    revision: Revision = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, and print the text as it is generated.

    slim-jax generate out/q2 --prompt "The capital of France is" --max-tokens 32

    slim-jax generate out/q3 --prompt "Once" --prompt "Never" --temperature 0.8 --top-p 0.95

    slim-jax generate out/q3 --prompts questions.txt --stop "\\n" --json
    """
    wanted = [*(prompt or ()), *_lines(prompts)]
    if not wanted:
        raise ValueError("there is no prompt, expected --prompt or --prompts")
    stops = [text.replace("\\n", "\n") for text in stop or ()]
    if "" in stops:
        raise ValueError("--stop is empty, expected some text")
    from convert.text import Text
    from slim_jax.infer.generate import Generator
    from slim_jax.infer.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    mesh = devices_mesh(devices, cores=True)
    opened = open_source(at_revision(source, revision))
    tokenizer = tokenizer_of(opened)
    ids = [encode(tokenizer, text) for text in wanted]
    for text, tokens in zip(wanted, ids):
        if not tokens:
            raise ValueError(f"--prompt {text!r} has no tokens, expected some text")
        require_positions("prompt and --max-tokens together", len(tokens) + max_tokens, opened.config)
    generator = Generator(whole_decoder(opened), cache_dtype=cache_dtype, mesh=mesh, consume=True)
    how = {"max_tokens": max_tokens, "seed": seed, **dataclasses.asdict(sampling)}
    texts = [Text(tokenizer, stops, prompt=tokens) for tokens in ids]
    if len(wanted) == 1 and not as_json:
        typer.echo(wanted[0], nl=False)
        stream = Stream(texts[0])
        generator.generate(ids, on_token=stream.take, **how)
        stream.close()
        return
    start = time.monotonic()
    _continue(generator, ids, texts, how)
    if as_json:
        _print_json(wanted, texts, max_tokens, time.monotonic() - start)
        return
    for text, written in zip(wanted, texts):
        typer.echo(text + written.text + "\n")


def _lines(file: Path | None) -> list[str]:
    """Returns the lines of a file that are not empty."""
    from convert.calibration import read_text

    if file is None:
        return []
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--prompts: {file} has no prompts, expected one per line")
    return lines


def _continue(generator: "Generator", ids: list[list[int]], texts: "list[Text]", how: dict[str, Any]) -> None:
    """Fills the texts in batches of ``ROWS``; every batch has its own seed."""
    seed = how.pop("seed")
    for number, batch in enumerate(itertools.batched(zip(ids, texts), ROWS)):
        prompts, rows = zip(*batch)

        def take(row: int, token: int, rows: "tuple[Text, ...]" = rows) -> bool:
            return rows[row].take(token)

        generator.generate(prompts, on_token=take, seed=seed + number, **how)


def _print_json(prompts: list[str], texts: "list[Text]", max_tokens: int, seconds: float) -> None:
    def ended(text: "Text") -> str:
        """Returns "stop" for a stop string, "length" for ``--max-tokens``, "end" for an end-of-text token."""
        return "stop" if text.stopped else "length" if len(text.ids) == max_tokens else "end"

    results = [
        {"prompt": prompt, "text": text.text, "tokens": len(text.ids), "ended": ended(text)}
        for prompt, text in zip(prompts, texts)
    ]
    print_json({"results": results, "seconds": round(seconds, 3)})
