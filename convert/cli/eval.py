"""``slim-jax eval``."""

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convert.cli.options import Revision, SourceArgument
from convert.cli.sources import (
    at_revision,
    encode,
    open_source,
    require_positions,
    tokenizer_of,
    whole_decoder,
)
from convert.display import print_json, progress

if TYPE_CHECKING:
    import numpy as np

    from slim_jax.eval.perplexity import Perplexity


def evaluate(
    source: SourceArgument,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="UTF-8 text that was not used for calibration; may be given several times.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            show_default=False,
            help="Full-precision model to compare with: KL divergence, and how often both models predict the "
            "same token.",
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    max_windows: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Evaluate at most N windows, evenly spaced. [dim]Default: all.[/]"
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            show_default=False,
            help="Tasks of lm-evaluation-harness, instead of texts; needs the package lm_eval.",
        ),
    ] = None,
    tasks_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with more tasks (the harness's YAML files; Python that they name is run).",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Largest number of questions per task. [dim]Default: all.[/]"),
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="K", help="Solved examples before each question. [dim]Default: set by the task.[/]"
        ),
    ] = None,
    revision: Revision = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON on standard output and nothing else.")
    ] = False,
) -> None:
    """Measure perplexity on a text, in windows that do not overlap, or scores on tasks.

    Packed weights are used as they are.

    slim-jax eval smollm2 --text test.txt

    slim-jax eval out/q2 --text fiction.txt --text code.txt --against smollm2 --max-windows 38 --json

    slim-jax eval out/q2 --tasks arc_easy,hellaswag --limit 200
    """
    if (text is None) == (tasks is None):
        raise ValueError("expected either --text or --tasks")
    source = at_revision(source, revision)
    if tasks is not None:
        if against is not None:
            raise ValueError("--against goes with --text")
        _scores(source, tasks, as_json, limit=limit, fewshot=fewshot, folder=tasks_folder)
        return
    if (limit, fewshot, tasks_folder) != (None, None, None):
        raise ValueError("--limit, --fewshot and --tasks-folder go with --tasks")
    _perplexities(source, text or [], against, window, max_windows, as_json)


def _scores(source: str, tasks: str, as_json: bool, **how: Any) -> None:
    """Prints a line for each measure of each task."""
    names = [name for task in tasks.split(",") if (name := task.strip())]
    if not names:
        raise ValueError("--tasks names no task, expected some such as arc_easy,hellaswag")
    folder = how["folder"]
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--tasks-folder: {folder} is not a directory")
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("scores need the package lm_eval: pip install 'slim-jax[scores]'")
    from convert.scores import evaluate

    found = evaluate(open_source(source), names, **how)
    if as_json:
        print_json({"tasks": found}, indent=None)
        return
    for task, measures in found.items():
        for name, value in measures.items():
            measure, _, filtered = name.partition(",")
            if not isinstance(value, float) or measure.endswith("_stderr"):
                continue
            error = measures.get(f"{measure}_stderr,{filtered}")
            spread = f" ± {error:.4f}" if isinstance(error, float) else ""
            which = f" ({filtered})" if filtered not in ("", "none") else ""
            typer.echo(f"{task}: {measure}{which} {value:.4f}{spread}")


def _perplexities(
    source: str, text: list[Path], against: str | None, window: int, max_windows: int | None, as_json: bool
) -> None:
    """Prints a line for each text."""
    from convert.calibration import read_text

    contents = {path: read_text(path) for path in text}
    import numpy as np

    from slim_jax.eval.perplexity import perplexity

    opened = open_source(source)
    dense = None if against is None else open_source(against)
    require_positions("--window", window, opened.config)
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
        print_json(document, indent=None)
        return
    for path, result in found.items():
        typer.echo((f"{path}: " if len(found) > 1 else "") + _line(result))


def _windows(path: Path, tokens: "np.ndarray", window: int, most: int | None) -> int:
    """Number of windows of a text that are evaluated."""
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
        f"KL divergence {found.divergence:.4f} nats per token, "
        f"same prediction for {found.agreement:.1%} of tokens"
    )
