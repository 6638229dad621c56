"""``slim-jax eval``."""

import math
from pathlib import Path
from typing import Annotated

import typer

from convert.cli.options import JsonOption, SourceArgument
from convert.cli.sources import encode, open_source, require_positions, tokenizer_of, whole_decoder
from convert.display import print_result, progress


def evaluate(
    source: SourceArgument,
    text: Annotated[
        Path,
        typer.Option(metavar="FILE", show_default=False, help="UTF-8 text that calibration did not see."),
    ],
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    max_windows: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Take every ceil(total / N)-th window. [dim]Default: all.[/]"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure perplexity on a text, in windows that do not overlap. Packed weights are used as they are.

    slim-jax eval smollm2 --text test.txt

    slim-jax eval out/q2 --text test.txt --window 2048 --max-windows 38 --json
    """
    from convert.calibration import read_text

    content = read_text(text)
    import numpy as np

    from slim_jax.model.perplexity import perplexity

    opened = open_source(source)
    require_positions("--window", window, opened)
    tokens = np.asarray(encode(tokenizer_of(source, opened), content), np.int32)
    if len(tokens) < window:
        raise ValueError(f"{text} has {len(tokens)} tokens, expected at least {window} (--window)")
    total = len(tokens) // window
    if max_windows is not None:
        total = math.ceil(total / math.ceil(total / max_windows))
    model = whole_decoder(source, opened)
    with progress("evaluating", total) as advance:
        found = perplexity(
            model,
            tokens,
            window=window,
            max_windows=max_windows,
            on_window=lambda done, of, so_far: advance(f"perplexity {so_far:.3f}"),
        )
    result = {"perplexity": found.perplexity, "tokens": found.tokens, "windows": found.windows}
    print_result(
        result, f"perplexity {found.perplexity:.4f} ({found.tokens} tokens, {found.windows} windows)", as_json
    )
