"""The command line: ``slim-jax convert | quantize | eval | generate | chat | inspect | plan | export``.

The commands check options, find models and texts, and show progress; the work is done elsewhere. A user's
mistake ends in one line on standard error and exit status 2. Heavy imports stay inside the commands, so that
``--help`` is instant.
"""

import ctypes
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer

from convert.cli.chat import chat
from convert.cli.convert import convert
from convert.cli.eval import evaluate
from convert.cli.export import export
from convert.cli.generate import generate
from convert.cli.inspect import inspect
from convert.cli.plan import plan
from convert.cli.quantize import quantize
from convert.display import say

OK, BUG, USER_ERROR, INTERRUPTED = 0, 1, 2, 130

M_MMAP_THRESHOLD = -3
"""Parameter of glibc's ``mallopt``: allocations of at least this many bytes get their own mapping."""

# click's ClickException. Newer typer brings its own click, so there is no one place to import it from.
ClickException: Any = typer.BadParameter.__bases__[0].__bases__[0]

app = typer.Typer(
    name="slim-jax",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclasses.dataclass
class Session:
    """State that the commands share with :func:`run`.

    Attributes:
      debug: if True, tracebacks are let through.
      on_interrupt: the line to print on Ctrl-C.
    """

    debug: bool = False
    on_interrupt: str = "interrupted"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"slim-jax {version('slim-jax')}")
        raise typer.Exit


@app.callback()
def slim_jax_options(
    ctx: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="SLIM_JAX_DEBUG", help="Show tracebacks and library logs.")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize a language model to an average of 2, 3 or 4 bits per weight, and run it packed.

    [bold]Try it[/] on the built-in model:

      slim-jax quantize smollm2 out/q3 --bits 3 --group-size 64 --samples 64

      slim-jax inspect out/q3

      slim-jax generate out/q3 --prompt "The capital of France is"

      slim-jax chat out/q3
    """
    ctx.obj.debug = debug


app.command("convert")(convert)
app.command("quantize")(quantize)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("inspect")(inspect)
app.command("plan")(plan)
app.command("export")(export)


def _error_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ClickException):
        return error.format_message()  # type: ignore[attr-defined, no-any-return]
    return str(error) or type(error).__name__


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
      arguments: the words that the user typed after ``slim-jax``.

    Returns:
      The exit status: 0 for success, 2 for a user's mistake, 130 for Ctrl-C, 1 for an internal error.
    """
    session = Session()
    try:
        for argument in arguments:
            if any("\ud800" <= c <= "\udfff" for c in argument):  # bytes that are not UTF-8
                raise ValueError(f"the argument {argument} is not UTF-8")
        status = app(list(arguments) or ["--help"], prog_name="slim-jax", standalone_mode=False, obj=session)
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except (ValueError, OSError, MemoryError, ClickException) as error:
        if session.debug:
            raise
        say(f"error: {_error_line(error)}")
        return USER_ERROR
    except Exception as error:
        if session.debug:
            raise
        say(f"internal error: {type(error).__name__}: {error}; slim-jax --debug shows where")
        return BUG
    if status == INTERRUPTED:
        say(session.on_interrupt)
    return status if isinstance(status, int) else OK


def _return_memory() -> None:
    """Makes glibc return large arrays to the system when they are freed.

    By default glibc keeps the memory of a freed batch of activations, and the next batch does not fit into
    the gaps: the first two blocks of SmolLM2 on 64 windows of 512 tokens peaked at 1.9 GiB, and peak at 1.35
    GiB with this setting.
    """
    options = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if options is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        options(M_MMAP_THRESHOLD, 1 << 20)


def main() -> None:
    """Runs the ``slim-jax`` program: :func:`run`, with the logs and warnings of other libraries silenced."""
    if os.environ.get("SLIM_JAX_DEBUG") is None and "--debug" not in sys.argv:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        for name in ("absl", "jax", "orbax", "transformers", "flax", "huggingface_hub"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
    _return_memory()
    sys.exit(run(sys.argv[1:]))
