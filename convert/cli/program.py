"""The command line: ``slim-jax convert | quantize | eval | generate | inspect | export``.

It checks options, finds models and texts, and shows progress; the work is done elsewhere. What the
user got wrong ends in one line on standard error and exit status 2. Heavy imports stay inside the
commands, so that ``--help`` is instant.
"""

import dataclasses
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convert.display import Stream, print_layers, print_plan, progress

if TYPE_CHECKING:
    import jax
    import numpy as np

    from slim_jax.model.config import DecoderConfig
    from slim_jax.model.decoder import Decoder
    from slim_jax.report import BlockReport
    from slim_jax.run.source import Source

OK, BUG, USER_ERROR, INTERRUPTED = 0, 1, 2, 130

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
    """What the commands tell :func:`run`.

    Attributes:
      debug: let tracebacks through.
      on_interrupt: the line to print on Ctrl-C.
    """

    debug: bool = False
    on_interrupt: str = "interrupted"


SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        show_default=False,
        help="A Hugging Face directory, .gguf file, slim-jax checkpoint, owner/model on the hub, or smollm2.",
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
        help="Of embedding and head; 16 leaves them. [dim]Default: --bits + 3, at most 8; sqc paper: 16.[/]",
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Instead of --bits: as many as make the whole model so large, such as 48MB or 1.5GiB.",
    ),
]
EmbeddingGroupSize = Annotated[int, typer.Option(help="Of embedding and head.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE", help="Of dense weights: float32 or bfloat16. [dim]Default: as they are.[/]"
    ),
]


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

    [bold]Try it[/] on the built-in model, with calibration text that it writes itself:

      slim-jax quantize smollm2 out/q3 --bits 3 --group-size 64 --calibration self --samples 64 --length 512

      slim-jax inspect out/q3

      slim-jax generate out/q3 --prompt "The capital of France is"
    """
    ctx.obj.debug = debug


@app.command()
def convert(
    source: SourceArgument, out: OutArgument, dtype: DtypeOption = None, as_json: JsonOption = False
) -> None:
    """Convert a model to a slim-jax checkpoint, without quantizing it.

    Blocks are read and written one by one, so the model need not fit in memory.

      slim-jax convert models/Llama-3.2-1B out/llama

      slim-jax convert model.gguf out/model --dtype bfloat16
    """
    _require_new(out)
    from slim_jax.run import checkpoint

    model = _open(source, dtype)
    tokenizer = _optional_tokenizer(source, model)
    with progress("converting", model.config.num_layers) as advance:
        checkpoint.save_source(model, out, on_block=lambda *_: advance())
    _keep_tokenizer(tokenizer, out)
    result = {"path": str(out), "blocks": model.config.num_layers}
    _print(result, f"{out}: {result['blocks']} blocks, not quantized", as_json)


@app.command()
def quantize(
    ctx: typer.Context,
    source: SourceArgument,
    out: OutArgument,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="mix|self|FILE[:SHARE]",
            show_default=False,
            help="What to calibrate on, once or several times: a UTF-8 text; [bold]self[/], what the model "
            "writes; [bold]mix[/], some of that and of everything. A share may follow. [dim]Default: mix.[/]",
        ),
    ] = None,
    bits: Annotated[
        float, typer.Option(help="Mean bits of a code; any number such as 2.25 with --criterion model.")
    ] = 2,
    group_size: Annotated[
        int, typer.Option(help="Input channels that share a width and a scale: 32, 64, 128 …")
    ] = 128,
    method: Annotated[
        str,
        typer.Option(
            metavar="slim|slim-plus|gptq|rtn",
            help="slim mixes bit widths by salience where that pays, slim-plus also learns by gradient (see "
            "--learn); gptq and rtn (round to nearest) are uniform.",
        ),
    ] = "slim",
    sqc: Annotated[
        str | None,
        typer.Option(
            metavar="search|paper|minmax",
            help="How scales and zeros are found. [dim]Default: search for slim, else minmax.[/]",
        ),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            metavar="model|kl|error|paper",
            help="What the bit search minimizes: model, the expected rise of the loss, with one budget for "
            "all layers; the others within each layer. [dim]Default: model, with --sqc paper: paper.[/]",
        ),
    ] = None,
    guide: Annotated[
        bool,
        typer.Option("--guide/--no-guide", help="Tokens count by the gradient of the model's loss."),
    ] = False,
    damping: Annotated[
        float, typer.Option(help="Added to the Hessian, as a part of its mean diagonal.")
    ] = 0.01,
    learn: Annotated[
        str,
        typer.Option(
            metavar="clip|clip-gptq|grid|rounding",
            help="What slim-plus learns. clip: clipping, the paper's SliM-LLM+. Not in the paper: clip-gptq "
            "(clipping, then GPTQ), grid (scales and zeros), rounding (codes too).",
        ),
    ] = "rounding",
    epochs: Annotated[int, typer.Option(help="slim-plus: passes over the windows, at most.")] = 10,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="slim-plus. [dim]Default: 0.01 for clip, else 0.005.[/]", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="slim-plus: windows of a step.")] = 4,
    augmented: Annotated[
        float, typer.Option(help="slim-plus: weight of the paper's augmented loss term.")
    ] = 0.0,
    tune: Annotated[
        bool | None,
        typer.Option(
            "--tune/--no-tune",
            show_default=False,
            help="At the end, tune scales and norms of the whole model until its logits are the "
            "full-precision model's. [dim]Default: with slim-plus.[/]",
        ),
    ] = None,
    tune_epochs: Annotated[int, typer.Option(help="Of tuning: passes over the windows.")] = 1,
    target_size: TargetSize = None,
    embedding_bits: EmbeddingBits = None,
    embedding_group_size: EmbeddingGroupSize = 64,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 128,
    length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of windows.")] = 0,
    allocation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Bits per layer and group from this JSON file; nothing is searched."
        ),
    ] = None,
    save_allocation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the bits that were chosen to this JSON file.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last finished block of an interrupted run.")
    ] = False,
    offload: Annotated[
        bool,
        typer.Option("--offload-activations", help="Keep calibration activations on disk, not in memory."),
    ] = False,
    devices: Annotated[
        int, typer.Option(min=1, help="Share the work among so many of this machine's devices.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model with SliM-LLM and store it packed.

    Block after block; each finished one is on disk before the next starts, so a run that was
    interrupted goes on with --resume and ends with the same bits.

      slim-jax quantize smollm2 out/q2 --group-size 64 --calibration text.txt --samples 64 --length 512

      slim-jax quantize models/Llama-3.2-1B out/q3 --bits 3 --calibration self

      slim-jax quantize smollm2 out/gptq --bits 3 --method gptq --calibration text.txt
    """
    from slim_jax.config import SlimConfig

    config = SlimConfig(
        bits=bits,
        group_size=group_size,
        method=method,
        sqc=sqc,
        criterion=criterion,
        guide=guide,
        tune=tune,
        tune_epochs=tune_epochs,
        damping=damping,
        learn=learn,
        epochs=epochs,
        learning_rate=learning_rate,
        augmented=augmented,
        batch_size=batch_size,
        embedding_bits=embedding_bits,
        embedding_group_size=embedding_group_size,
    )
    from convert.calibration import draw, parts

    texts = parts(calibration or ())
    from slim_jax.method.sba import load_allocation
    from slim_jax.method.sba import save_allocation as write_allocation
    from slim_jax.run.pipeline import quantize_to_checkpoint
    from slim_jax.run.plan import for_size, parse_size

    chosen = None if allocation is None else load_allocation(allocation)
    if save_allocation is not None and not save_allocation.resolve().parent.is_dir():
        raise ValueError(f"--save-allocation: {save_allocation.parent} is not a directory")
    if not resume:
        _require_new(out, "; --resume goes on with an interrupted run")
    mesh = _mesh(devices)
    model = _open(source)
    _require_positions("--length", length, model)
    if target_size is not None:
        config = for_size(model.config, config, parse_size(target_size))
    find = _tokenizer if any(part.text is not None for part in texts) else _optional_tokenizer
    tokenizer = find(source, model)
    encode = None if tokenizer is None else partial(_encode, tokenizer)
    tokens = draw(texts, encode, partial(_own_text, source, model), samples, length, seed)
    ctx.obj.on_interrupt = (
        f"interrupted; the same command with --resume goes on after {out}'s last whole block"
    )
    with progress("quantizing", model.config.num_layers) as step:
        report = quantize_to_checkpoint(
            model,
            tokens,
            config,
            out,
            allocation=chosen,
            resume=resume,
            offload=offload,
            mesh=mesh,
            on_block=lambda block: step(_figures(block)),
            on_epoch=lambda epoch, of, loss: step.show(f"epoch {epoch}/{of}, loss {loss:.4g}"),
            on_sweep=lambda n, of: step.show(f"gradients of block {n}/{of}"),
            on_step=lambda n, of, loss: step.show(f"tuning {n}/{of}, divergence {loss:.4g} nats"),
        )
    _keep_tokenizer(tokenizer, out)
    if save_allocation is not None:
        write_allocation(report.allocation, save_allocation)
    found = report.to_json()
    size = f"{report.stored_bytes / 1e6:.1f} MB, {report.times_smaller:.2f} times smaller than in bfloat16"
    _print(found, f"{out}: {found['bits_per_weight']:.3f} bits per weight in the blocks; {size}", as_json)


def _mesh(devices: int) -> "jax.sharding.Mesh | None":
    """Of the first devices; None for one."""
    import jax

    found = jax.devices()
    if devices > len(found):
        raise ValueError(f"--devices is {devices}, this machine has {len(found)} ({found[0].platform})")
    return jax.make_mesh((devices,), ("devices",), devices=found[:devices]) if devices > 1 else None


@app.command("eval")
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

    opened = _open(source)
    _require_positions("--window", window, opened)
    tokens = np.asarray(_encode(_tokenizer(source, opened), content), np.int32)
    if len(tokens) < window:
        raise ValueError(f"{text} has {len(tokens)} tokens, expected at least {window} (--window)")
    total = len(tokens) // window
    if max_windows is not None:
        total = math.ceil(total / math.ceil(total / max_windows))
    model = _decoder(source, opened)
    with progress("evaluating", total) as advance:
        found = perplexity(
            model,
            tokens,
            window=window,
            max_windows=max_windows,
            on_window=lambda done, of, so_far: advance(f"perplexity {so_far:.3f}"),
        )
    result = {"perplexity": found.perplexity, "tokens": found.tokens, "windows": found.windows}
    _print(
        result, f"perplexity {found.perplexity:.4f} ({found.tokens} tokens, {found.windows} windows)", as_json
    )


@app.command()
def generate(
    source: SourceArgument,
    prompt: Annotated[
        list[str], typer.Option(show_default=False, metavar="TEXT", help="May be given several times.")
    ],
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="At most this many new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(max=1.0, help="Draw from the likeliest tokens that make up this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
) -> None:
    """Continue a prompt, token by token to the terminal.

    slim-jax generate out/q2 --prompt "The capital of France is" --max-tokens 32

    slim-jax generate out/q3 --prompt "Once" --prompt "Never" --temperature 0.8 --top-p 0.95
    """
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"--top-p is {top_p}, expected more than 0 and at most 1")
    from slim_jax.model.generate import generate as run_generate

    opened = _open(source)
    tokenizer = _tokenizer(source, opened)
    prompts = [_encode(tokenizer, text) for text in prompt]
    for text, ids in zip(prompt, prompts):
        if not ids:
            raise ValueError(f"--prompt {text!r} has no tokens, expected some text")
        _require_positions("prompt and --max-tokens together", len(ids) + max_tokens, opened)
    model = _decoder(source, opened)
    stream = Stream(tokenizer, prompt) if len(prompt) == 1 else None
    texts = run_generate(
        model,
        prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=list(opened.config.eos_token_ids),
        on_token=None if stream is None else stream.take,
    )
    if stream is not None:
        stream.close()
        return
    for text, ids in zip(prompt, texts):
        typer.echo(text + tokenizer.decode(ids, skip_special_tokens=True))
        typer.echo("")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", show_default=False, help="A slim-jax checkpoint.")],
    as_json: JsonOption = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page with a row per layer.")
    ] = None,
) -> None:
    """Show what a checkpoint stores: sizes, bits per weight, and where the bits went.

    slim-jax inspect out/q2

    slim-jax inspect out/q2 --json | jq .bits_per_weight

    slim-jax inspect out/q2 --html layers.html
    """
    if html is not None and not html.resolve().parent.is_dir():
        raise ValueError(f"--html: {html.parent} is not a directory")
    from slim_jax.run import checkpoint

    found = checkpoint.inspect(path)
    if html is not None:
        from convert.page import layers_page

        html.write_text(layers_page(str(path), found), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_layers(str(path), found)


@app.command()
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
    config = _config(source)
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


@app.command()
def export(
    source: SourceArgument,
    out: OutArgument,
    format: Annotated[
        str, typer.Option(metavar="hf", help="hf: safetensors that transformers loads.")
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16. [dim]Default: as they are.[/]"),
    ] = None,
) -> None:
    """Write a model with dequantized weights, for other tools to load.

    slim-jax export out/q2 out/q2-hf --format hf --dtype bfloat16
    """
    if format != "hf":
        raise ValueError(f"--format is {format!r}, expected hf")
    _require_new(out)
    from convert.export import export_hf

    model = _open(source)
    export_hf(model, out, dtype, tokenizer=_optional_tokenizer(source, model))
    typer.echo(f"{out}: {model.config.num_layers} blocks, dequantized")


def _open(spec: str, dtype: str | None = None) -> "Source":
    """The model that a SOURCE argument names; no weights are read yet."""
    from convert.load import load_source
    from slim_jax.run.checkpoint import CheckpointSource, is_checkpoint

    if is_checkpoint(Path(spec)):
        return CheckpointSource(Path(spec))
    return load_source(spec, dtype)


def _config(spec: str) -> "DecoderConfig":
    """The config of the model that a SOURCE argument names."""
    from convert.load import load_config
    from slim_jax.run.checkpoint import CheckpointSource, is_checkpoint

    return CheckpointSource(Path(spec)).config if is_checkpoint(Path(spec)) else load_config(spec)


def _decoder(spec: str, source: "Source") -> "Decoder":
    """The whole model in memory."""
    from slim_jax.model.params import make_decoder
    from slim_jax.run import checkpoint

    if checkpoint.is_checkpoint(Path(spec)):
        return checkpoint.load(Path(spec))
    blocks = [source.block(i) for i in range(source.config.num_layers)]
    return make_decoder(source.config, source.outer(), blocks)


def _tokenizer(spec: str, source: "Source") -> Any:
    from convert.tokenizer import load_tokenizer
    from slim_jax.run.checkpoint import is_checkpoint

    if is_checkpoint(Path(spec)):
        return load_tokenizer(Path(spec) / "tokenizer")
    return source.tokenizer  # type: ignore[attr-defined]


def _optional_tokenizer(spec: str, source: "Source") -> Any:
    """The tokenizer, or None and a note where the model has none."""
    try:
        return _tokenizer(spec, source)
    except ValueError as error:
        _say(f"note: going on without a tokenizer: {error}")
        return None


def _keep_tokenizer(tokenizer: Any, out: Path) -> None:
    from convert.tokenizer import save_tokenizer

    if tokenizer is not None:
        save_tokenizer(tokenizer, out / "tokenizer")


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids, with what the model's own tokenizer puts before a text."""
    return list(tokenizer(text, verbose=False)["input_ids"])


def _own_text(
    spec: str, source: "Source", samples: int, length: int, seed: int
) -> "np.ndarray":  # int32 [samples, length]
    """Calibration text that the model writes itself."""
    import numpy as np

    from slim_jax.model.generate import sample_text

    _say(f"the model writes {samples} windows of {length} tokens to calibrate on")
    tokens = sample_text(_decoder(spec, source), samples=samples, length=length, seed=seed)
    return np.asarray(tokens, np.int32)


def _require_new(out: Path, hint: str = "") -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise ValueError(f"{out} exists and is not an empty directory{hint}")


def _require_positions(name: str, tokens: int, source: "Source") -> None:
    if tokens > source.config.max_positions:
        raise ValueError(f"{name} is {tokens}, but the model has {source.config.max_positions} positions")


def _figures(block: "BlockReport") -> str:
    """What the progress display says of a finished block."""
    if block.warning:
        _say(block.warning)
    learning = block.learning
    if learning is None:
        return f"error {block.error:.3g}"
    if learning.note:
        _say(f"block {block.index}: {learning.note}")
    return f"loss {learning.losses[0]:.4g} -> {learning.losses[learning.kept_epoch]:.4g}"


def _print(result: dict[str, Any], line: str, as_json: bool) -> None:
    typer.echo(json.dumps(result, indent=2) if as_json else line)


def _say(line: str) -> None:
    """One line on standard error."""
    typer.echo(f"slim-jax: {' '.join(line.split())}", err=True)


def _error_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ClickException):
        return error.format_message()  # type: ignore[attr-defined, no-any-return]
    return str(error) or type(error).__name__


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
      arguments: what the user typed after ``slim-jax``.

    Returns:
      The exit status: 0, or 2 for the user's mistake, 130 for Ctrl-C, 1 for a mistake of ours.
    """
    session = Session()
    try:
        status = app(list(arguments) or ["--help"], prog_name="slim-jax", standalone_mode=False, obj=session)
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except (ValueError, OSError, ClickException) as error:
        if session.debug:
            raise
        _say(f"error: {_error_line(error)}")
        return USER_ERROR
    except Exception as error:
        if session.debug:
            raise
        _say(f"internal error: {type(error).__name__}: {error}; slim-jax --debug shows where")
        return BUG
    if status == INTERRUPTED:
        _say(session.on_interrupt)
    return status if isinstance(status, int) else OK


def main() -> None:
    """The ``slim-jax`` program: :func:`run` without other libraries' logs and warnings."""
    if os.environ.get("SLIM_JAX_DEBUG") is None and "--debug" not in sys.argv:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        for name in ("absl", "jax", "orbax", "transformers", "flax"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
    sys.exit(run(sys.argv[1:]))
