"""Terminal output of the command line: lines, progress, streamed text, and the table of layers."""

import contextlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from convert.text import Text
    from slim_jax.calibrate.events import Event
    from slim_jax.plan import Plan
    from slim_jax.report import BlockReport


def print_json(document: dict[str, Any], indent: int | None = 2) -> None:
    """Prints a document as JSON; numbers that JSON lacks become null, with a note that names them."""
    typer.echo(json.dumps(_finite(document, ""), indent=indent, allow_nan=False))


def _finite(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part, f"{where}.{name}".lstrip(".")) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part, f"{where}.{i}") for i, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        say(f"note: {where} is {value}, which JSON cannot hold: null is printed")
        return None
    return value


def print_result(result: dict[str, Any], line: str, as_json: bool) -> None:
    """Prints the line on standard output, or the result as JSON."""
    if as_json:
        print_json(result)
    else:
        typer.echo(line)


def say(line: str) -> None:
    """Prints one line on standard error; control and unprintable characters are escaped."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(line.split()))
    typer.echo(f"slim-jax: {''.join(shown)}", err=True)


class Progress:
    """Progress of a task: a bar on a terminal, else about ten lines. Calling it finishes one step."""

    def __init__(self, what: str, total: int, bar: Any = None) -> None:
        self.what, self.total, self.bar = what, total, bar
        self.done = 0
        if bar is not None:
            self.task = bar.add_task(what, total=total, figures="")

    def __call__(self, figures: str = "") -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, figures=figures)
        elif self.done == self.total or self.done % max(1, self.total // 10) == 0:
            typer.echo(f"{self.what} {self.done}/{self.total}  {figures}".rstrip(), err=True)

    def show(self, figures: str) -> None:
        """Shows figures of the step that is under way."""
        if self.bar is not None:
            self.bar.update(self.task, figures=figures)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Progress]:
    """Shows progress on standard error while the block runs; yields a callable to call at every step."""
    from rich import progress as rich_progress

    console = _console(stderr=True)
    if not console.is_terminal:
        yield Progress(what, total)
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[figures]}", markup=False),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console) as bar:
        yield Progress(what, total, bar)


def shown_by(step: Progress) -> "Callable[[Event], None]":
    """Returns a subscriber to a run's events that shows its progress."""
    from slim_jax.calibrate import events

    def show(event: "Event") -> None:
        match event:
            case events.BlockDone(report):
                step(_figures(report))
            case events.SweepStep(done, total):
                step.show(f"gradients of block {done}/{total}")
            case events.LearningEpoch(epoch, total, loss):
                step.show(f"epoch {epoch}/{total}, loss {loss:.4g}")
            case events.TuningStep(number, total, loss):
                step.show(f"tuning {number}/{total}, divergence {loss:.4g} nats")
            case events.Notice(message):
                say(message)

    return show


def _figures(block: "BlockReport") -> str:
    """Text that the progress display shows for a finished block; prints the block's warnings."""
    if block.warning:
        say(block.warning)
    learning = block.learning
    if learning is None:
        return f"error {block.error:.3g}"
    if learning.note:
        say(f"block {block.index}: {learning.note}")
    if not learning.losses:
        return "not trained"
    return f"loss {learning.losses[0]:.4g} -> {learning.losses[learning.kept_epoch]:.4g}"


class Stream:
    """Prints a text as it is generated, and measures the rate."""

    def __init__(self, text: "Text") -> None:
        self.text, self.times = text, list[float]()

    def take(self, row: int, token: int) -> bool:
        """Takes the next token of the single row; returns True if the row ends with it."""
        self.times.append(time.monotonic())
        stopped = self.text.take(token)
        self._show(self.text.delta())
        return stopped

    def close(self) -> None:
        """Prints the text that was held back."""
        self._show(self.text.delta(final=True) + "\n")

    def rate(self) -> str:
        """Number of tokens, and tokens per second after the first, whose time includes the prefill."""
        count, seconds = len(self.times), self.times[-1] - self.times[0] if self.times else 0.0
        return f"{count} token{'' if count == 1 else 's'}" + (
            f", {(count - 1) / seconds:.1f} tokens/s" if seconds > 0 else ""
        )

    def _show(self, text: str) -> None:
        typer.echo(text, nl=False)
        sys.stdout.flush()


def layer_kinds(layers: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Groups layers by kind: ``blocks.7.attn.q`` is an ``attn.q``."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        parts = [part for part in layer["name"].split(".") if part != "blocks" and not part.isdigit()]
        kinds.setdefault(".".join(parts), []).append(layer)
    return kinds


def _console(*, stderr: bool = False) -> Any:
    """Console that prints foreign names literally: brackets and colons are not markup."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False)


class KindRow(NamedTuple):
    """Row of the table of layers: one kind of layer in all blocks, as text except for the size.

    Attributes:
      kind: name of the kind.
      layers: number of layers.
      shape: shape of the first, ``[K, N]``.
      groups: number of groups of each width.
      bits: stored bits per weight.
      bytes: stored bytes.
      error: mean output error, if known.
      rise: sum of the predicted loss increases, if known.
    """

    kind: str
    layers: str
    shape: str
    groups: str
    bits: str
    bytes: int
    error: str
    rise: str


def kind_rows(found: dict[str, Any]) -> list[KindRow]:
    """Returns the table of layers by kind; ``found`` is what `slim_jax.inspect` returns."""
    rows = []
    for kind, layers in layer_kinds([*found["embeddings"], *found["layers"]]).items():
        groups = Counter[str]()
        for layer in layers:
            groups.update(layer["bits"] or {})
        errors = [layer["error"] for layer in layers if layer["error"] is not None]
        rises = [layer["rise"] for layer in layers if layer["rise"] is not None]
        stored = sum(layer["bytes"] for layer in layers)
        rows.append(
            KindRow(
                kind,
                str(len(layers)),
                " × ".join(map(str, layers[0]["shape"])),
                ", ".join(f"{bits}: {count}" for bits, count in sorted(groups.items()) if count),
                f"{8 * stored / sum(math.prod(layer['shape']) for layer in layers):.3f}",
                stored,
                f"{sum(errors) / len(errors):.4g}" if errors else "",
                f"{sum(rises):.4f}" if rises else "",
            )
        )
    return rows


def print_layers(name: str, found: dict[str, Any]) -> None:
    """Prints the table of layers by kind, and the sizes; ``found`` is what `slim_jax.inspect` returns."""
    from rich.table import Table

    rows = kind_rows(found)
    predicted = any(row.rise for row in rows)
    table = Table(title=name, title_justify="left")
    table.add_column("layer")
    columns = ["count", "shape", "groups by bits", "bits per weight", "error"]
    for column in [*columns, *["loss increase"] * predicted]:
        table.add_column(column, justify="right")
    for row in rows:
        cells = (row.kind, row.layers, row.shape, row.groups, row.bits, row.error, row.rise)
        table.add_row(*cells[: len(table.columns)])
    console = _console()
    if found["layers"]:
        console.print(table)
        meaning = "; loss increase: predicted, in nats per token" if predicted else ""
        console.print(f"error: squared error of the outputs, relative{meaning}")
    if found["skipped"]:
        console.print(f"in full precision: {', '.join(found['skipped'])}", highlight=False)
    packed, whole = found["packed_bytes"] / 1e6, found["bytes"] / 1e6
    smaller = 2 * found["parameters"] / found["bytes"]
    console.print(
        f"{found['parameters']:,} parameters; "
        + (
            f"{packed:.1f} MB packed at {found['bits_per_weight']:.3f} bits per weight in the blocks, "
            f"{whole:.1f} MB in all, {smaller:.2f} times smaller than in bfloat16"
            if found["layers"]
            else "not quantized"
        ),
        highlight=False,
    )
    for note in origin_notes(found["origin"]):
        console.print(note, highlight=False)


def origin_notes(origin: Mapping[str, Any]) -> list[str]:
    """Returns what a user must know of a checkpoint that a model is made from, a sentence each.

    Args:
      origin: the origin of a `slim_jax.store.source.Source`, which may come from a stranger's manifest.
    """
    notes = []
    if isinstance(counts := origin.get("left_out"), dict) and counts:
        told = ", ".join(f"{kind} ({n} tensor{'s' * (n != 1)})" for kind, n in counts.items())
        notes.append(f"the text model alone is read; left out: {told}")
    if how := origin.get("quantized"):
        notes.append(
            f"the source is quantized already ({how}): its weights lie on a grid, which flatters errors and"
            " perplexities here"
        )
    return notes


def print_plan(name: str, plan: "Plan", duration: str, notes: Sequence[str] = ()) -> None:
    """Prints a plan in words and GiB; ``duration`` is that of the quantization on this machine."""
    from rich.table import Table

    def gib(size: int) -> str:
        return f"{size / 2**30:.2f} GiB"

    cut: dict[str, list[str]] = {}
    for layer, how in plan.sharding.items():
        cut.setdefault(how, []).append(layer)
    words = {"n": "over output channels", "replicated": "on every device"}
    table = Table(title=name, title_justify="left", show_header=False)
    table.add_row("parameters", f"{plan.parameters:,}, of which {plan.quantized:,} quantized")
    table.add_row("in bfloat16", gib(plan.bfloat16_bytes))
    table.add_row(
        "packed", f"{gib(plan.packed_bytes)}, {plan.bits_per_weight:.3f} bits per weight in the blocks"
    )
    if plan.embedding_bytes:
        table.add_row("", f"of which embedding and head {gib(plan.embedding_bytes)}")
    table.add_row("cache per token", f"{plan.cache_bytes_per_token / 2**10:.1f} KiB in bfloat16")
    table.add_row("to quantize", f"about {gib(plan.calibration_bytes)} of memory, about {duration} here")
    table.add_row(
        f"each of {plan.devices} {plan.device}",
        f"{gib(plan.device_bytes)} of {gib(plan.capacity)} for {plan.batch} × {plan.context} tokens",
    )
    for how, layers in cut.items() if plan.devices > 1 else ():
        table.add_row("", f"{words[how]}: {', '.join(layers)}")
    console = _console()
    console.print(table)
    verdict = "fits" if plan.fits else "does not fit"
    console.print(f"{verdict}; room for {plan.max_context:,} tokens per sequence", highlight=False)
    for note in notes:
        console.print(note, highlight=False)
