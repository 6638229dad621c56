"""``slim-jax quantize``."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convert.cli.options import (
    EmbeddingBits,
    EmbeddingGroupSize,
    JsonOption,
    OutArgument,
    SourceArgument,
    TargetSize,
)
from convert.cli.sources import (
    encode,
    keep_tokenizer,
    open_source,
    optional_tokenizer,
    require_new,
    require_positions,
    tokenizer_of,
    whole_decoder,
)
from convert.display import Progress, print_result, progress, say

if TYPE_CHECKING:
    import jax
    import numpy as np

    from convert.calibration import Part
    from slim_jax.report import BlockReport
    from slim_jax.run.source import Source


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
    from convert.calibration import parts

    texts = parts(calibration or ())
    from slim_jax.method.sba import load_allocation
    from slim_jax.method.sba import save_allocation as write_allocation
    from slim_jax.run.pipeline import quantize_to_checkpoint
    from slim_jax.run.plan import for_size, parse_size

    chosen = None if allocation is None else load_allocation(allocation)
    if save_allocation is not None and not save_allocation.resolve().parent.is_dir():
        raise ValueError(f"--save-allocation: {save_allocation.parent} is not a directory")
    if not resume:
        require_new(out, "; --resume goes on with an interrupted run")
    mesh = _mesh(devices)
    model = open_source(source)
    require_positions("--length", length, model)
    if target_size is not None:
        config = for_size(model.config, config, parse_size(target_size))
    tokenizer, tokens = _calibration(source, model, texts, samples, length, seed)
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
            **_shown(step),
        )
    keep_tokenizer(tokenizer, out)
    if save_allocation is not None:
        write_allocation(report.allocation, save_allocation)
    found = report.to_json()
    size = f"{report.stored_bytes / 1e6:.1f} MB, {report.times_smaller:.2f} times smaller than in bfloat16"
    print_result(
        found, f"{out}: {found['bits_per_weight']:.3f} bits per weight in the blocks; {size}", as_json
    )


def _calibration(
    spec: str, source: "Source", texts: "list[Part]", samples: int, length: int, seed: int
) -> "tuple[Any, np.ndarray]":
    """The tokenizer, None where there is none, and the windows, ``int32[samples, length]``."""
    from convert.calibration import draw

    find = tokenizer_of if any(part.text is not None for part in texts) else optional_tokenizer
    tokenizer = find(spec, source)
    to_tokens = None if tokenizer is None else partial(encode, tokenizer)
    return tokenizer, draw(texts, to_tokens, partial(_own_text, spec, source), samples, length, seed)


def _own_text(
    spec: str, source: "Source", samples: int, length: int, seed: int
) -> "np.ndarray":  # int32 [samples, length]
    """Calibration text that the model writes itself."""
    import numpy as np

    from slim_jax.model.generate import sample_text

    say(f"the model writes {samples} windows of {length} tokens to calibrate on")
    tokens = sample_text(whole_decoder(spec, source), samples=samples, length=length, seed=seed)
    return np.asarray(tokens, np.int32)


def _mesh(devices: int) -> "jax.sharding.Mesh | None":
    """Of the first devices; None for one."""
    import jax

    found = jax.devices()
    if devices > len(found):
        raise ValueError(f"--devices is {devices}, this machine has {len(found)} ({found[0].platform})")
    return jax.make_mesh((devices,), ("devices",), devices=found[:devices]) if devices > 1 else None


def _figures(block: "BlockReport") -> str:
    """What the progress display says of a finished block."""
    if block.warning:
        say(block.warning)
    learning = block.learning
    if learning is None:
        return f"error {block.error:.3g}"
    if learning.note:
        say(f"block {block.index}: {learning.note}")
    return f"loss {learning.losses[0]:.4g} -> {learning.losses[learning.kept_epoch]:.4g}"


def _shown(step: Progress) -> dict[str, Any]:
    """What a run calls, to show how far it is."""
    return {
        "on_block": lambda block: step(_figures(block)),
        "on_epoch": lambda epoch, of, loss: step.show(f"epoch {epoch}/{of}, loss {loss:.4g}"),
        "on_sweep": lambda n, of: step.show(f"gradients of block {n}/{of}"),
        "on_step": lambda n, of, loss: step.show(f"tuning {n}/{of}, divergence {loss:.4g} nats"),
    }
