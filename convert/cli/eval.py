"""``slim-jax eval``."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convert.cli.options import SourceArgument
from convert.cli.sources import encode, open_source, require_positions, tokenizer_of, whole_decoder
from convert.display import progress

if TYPE_CHECKING:
    import numpy as np

    from slim_jax.model.perplexity import Perplexity


def evaluate(
    source: SourceArgument,
    text: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="UTF-8 text that calibration did not see; may be given several times.",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            show_default=False,
            help="Compare with this model, the one in full precision: divergence (KL), and how often both "
            "find the same token likeliest.",
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    max_windows: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Take every ceil(total / N)-th window. [dim]Default: all.[/]"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON on standard output and nothing else.")
    ] = False,
) -> None:
    """Measure perplexity on a text, in windows that do not overlap. Packed weights are used as they are.

    slim-jax eval smollm2 --text test.txt

    slim-jax eval out/q2 --text fiction.txt --text code.txt --against smollm2 --max-windows 38 --json
    """
    from convert.calibration import read_text

    contents = {path: read_text(path) for path in text}
    import numpy as np

    from slim_jax.model.perplexity import perplexity

    opened = open_source(source)
    dense = None if against is None else open_source(against)
    require_positions("--window", window, opened)
    tokenizer = tokenizer_of(opened)
    tokens = {path: np.asarray(encode(tokenizer, content), np.int32) for path, content in contents.items()}
    total = sum(_windows(path, ids, window, max_windows) for path, ids in tokens.items())
    model = whole_decoder(opened)
    other = None if against is None or dense is None else whole_decoder(dense)
    with progress("evaluating", total) as advance:
        found = {
            str(path): perplexity(
                model,
                ids,
                window=window,
                max_windows=max_windows,
                on_window=lambda done, of, so_far: advance(f"perplexity {so_far:.3f}"),
                against=other,
            )
            for path, ids in tokens.items()
        }
    if as_json:
        results = {path: _fields(result) for path, result in found.items()}
        document = {"texts": results} if len(results) > 1 else next(iter(results.values()))
        typer.echo(json.dumps(document))
        return
    for path, result in found.items():
        typer.echo((f"{path}: " if len(found) > 1 else "") + _line(result))


def _windows(path: Path, tokens: "np.ndarray", window: int, most: int | None) -> int:
    """How many windows of a text are read."""
    if len(tokens) < window:
        raise ValueError(f"{path} has {len(tokens)} tokens, expected at least {window} (--window)")
    total = len(tokens) // window
    return total if most is None else math.ceil(total / math.ceil(total / most))


def _fields(found: "Perplexity") -> dict[str, Any]:
    fields: dict[str, Any] = {
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "windows": found.windows,
    }
    if found.against is not None:
        fields |= {
            "against_perplexity": found.against,
            "kl": found.divergence,
            "top1_agreement": found.agreement,
        }
    return fields


def _line(found: "Perplexity") -> str:
    line = f"perplexity {found.perplexity:.4f} ({found.tokens} tokens, {found.windows} windows)"
    if found.against is None:
        return line
    return (
        f"{line}, against {found.against:.4f}; "
        f"KL {found.divergence:.4f} nats a token, the same likeliest token after {found.agreement:.1%}"
    )
