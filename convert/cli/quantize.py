"""``slim-jax quantize``."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from convert.cli.options import (
    LARGEST_SEED,
    Bits,
    EmbeddingBits,
    GroupSize,
    JsonOption,
    Length,
    OutArgument,
    Preset,
    Revision,
    RuleOption,
    RulesFile,
    Samples,
    Set,
    SourceArgument,
    TargetSize,
)
from convert.cli.settings import make_rules, make_settings
from convert.cli.sources import (
    at_revision,
    devices_mesh,
    encode,
    keep_tokenizer,
    open_source,
    optional_tokenizer,
    require_folder,
    tokenizer_of,
    whole_decoder,
    window_length,
)
from convert.display import origin_notes, print_result, progress, say, shown_by

if TYPE_CHECKING:
    from collections.abc import Callable

    import jax
    import numpy as np

    from convert.calibration import Part
    from slim_jax.config import SlimConfig
    from slim_jax.plan import Plan
    from slim_jax.report import Report
    from slim_jax.store.source import Source

INTERRUPTED = "interrupted; the same command with --resume continues after the last finished block in {out}"
NO_OWN_TEXT = "too little memory for the model to write calibration text: calibrating on the other texts"
LARGER = "note: the model has {bytes:,} bytes, more than --target-size: some layers need 16-bit scales"


def quantize(
    ctx: typer.Context,
    source: SourceArgument,
    out: OutArgument,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="mix|self|FILE[:SHARE]",
            show_default=False,
            help="Calibration text: a UTF-8 file; [bold]self[/], text that the model writes; or "
            "[bold]mix[/], that and built-in articles, fiction, code and many languages. May be given "
            "several times, each with a share. [dim]Default: mix.[/]",
        ),
    ] = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    engine: Annotated[
        Literal["mlx"] | None,
        typer.Option(
            "--for",
            metavar="mlx",
            show_default=False,
            help="Program that will run the result, in a format with one bit width per layer: "
            "docs/sharing.md. [dim]Default: slim-jax.[/]",
        ),
    ] = None,
    target_size: TargetSize = None,
    preset: Preset = None,
    tune: Annotated[
        bool | None,
        typer.Option(
            "--tune/--no-tune",
            show_default=False,
            help="Fine-tune scales and norms of the whole model at the end, so that its logits approach "
            "those of the full-precision model. [dim]Default: set by the preset.[/]",
        ),
    ] = None,
    given: Set = None,
    rule: RuleOption = None,
    rules: RulesFile = None,
    embedding_bits: EmbeddingBits = None,
    samples: Samples = 128,
    length: Length = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the choice of calibration windows.")
    ] = 0,
    allocation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSON file with the bits of every layer and group, instead of a search."
        ),
    ] = None,
    save_allocation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the chosen bits to this JSON file.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run after its last finished block.")
    ] = False,
    offload: Annotated[
        bool,
        typer.Option("--offload-activations", help="Keep calibration activations on disk, not in memory."),
    ] = False,
    devices: Annotated[
        int, typer.Option(min=1, help="Number of this machine's devices that share the work.")
    ] = 1,
    revision: Revision = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model with SliM-LLM and store it packed.

    Blocks are quantized one after another, and each is on disk before the next starts: an interrupted run
    continues with --resume and gives the same result.

      slim-jax quantize smollm2 out/q3 --bits 3 --group-size 64 --samples 64

      slim-jax quantize models/Llama-3.2-1B out/q --target-size 500MB --preset best --calibration text.txt

      slim-jax quantize smollm2 out/gptq --bits 3 --set method=gptq --set damping=0.02

      slim-jax quantize smollm2 out/mix --rule 'blocks.0.*: skip' --rule '*.mlp.down: bits=3, group_size=64'
    """
    config = make_settings(
        preset,
        given or (),
        target_size,
        bits=bits,
        group_size=group_size,
        unit=None if engine is None else "layer",
        tune=tune,
        embedding_bits=embedding_bits,
        rules=make_rules(rule, rules),
    )
    from convert.calibration import parts, recipe, written

    texts = parts(calibration or ())
    from slim_jax.calibrate.drawn_windows import Draw
    from slim_jax.calibrate.pipeline import quantize_to_checkpoint
    from slim_jax.method.sba import load_allocation
    from slim_jax.method.sba import save_allocation as write_allocation
    from slim_jax.plan import for_size, parse_size

    chosen = None if allocation is None else load_allocation(allocation)
    require_folder("--save-allocation", save_allocation)
    _require_free(out, resume)
    mesh = _mesh(devices, samples, config)
    model = _opened(at_revision(source, revision), config)
    length = window_length(length, model.config)
    if target_size is not None:
        config = for_size(model.config, config, parse_size(target_size))
    if engine is not None:
        _announce_mlx(model, config)
    fitting, plan = _that_fit(texts, partial(_forecast, model, config, samples, length, offload))
    tokenizer, make = _calibration(model, fitting, samples, length, seed)
    ctx.obj.on_interrupt = INTERRUPTED.format(out=out)
    if not resume:
        if fitting != texts:
            say(NO_OWN_TEXT)
        _announce(model, config, plan, (samples, length, written(fitting, samples)), devices)
    with progress("quantizing", model.config.num_layers) as step:
        report = quantize_to_checkpoint(
            model,
            Draw(recipe(texts, samples, length, seed), make),
            config,
            out,
            allocation=chosen,
            resume=resume,
            offload=offload,
            mesh=mesh,
            on_event=shown_by(step),
        )
    keep_tokenizer(tokenizer, out)
    if save_allocation is not None:
        write_allocation(report.allocation, save_allocation)
    _show(out, report, plan, target_size, as_json)


def _opened(source: str, config: "SlimConfig") -> "Source":
    """Opens the model, and checks that the rules match its layers and that it is not packed."""
    from slim_jax.calibrate.pipeline import check_dense
    from slim_jax.model.block import linear_names
    from slim_jax.rules import check_rules

    model = open_source(source)
    for note in origin_notes(model.origin):
        say(f"note: {note}")
    check_dense(model)
    check_rules(config.resolved().rules, linear_names(model.config))
    return model


def _require_free(out: Path, resume: bool) -> None:
    from slim_jax.store.checkpoint_sink import require_new
    from slim_jax.store.files import refuse_if_locked

    if resume:
        refuse_if_locked(out)
    else:
        require_new(out, "; --resume continues an interrupted run")


def _show(out: Path, report: "Report", plan: "Plan", target_size: str | None, as_json: bool) -> None:
    """Writes the report page, and prints the result."""
    from convert.report import write_report
    from slim_jax.memory import peak_bytes
    from slim_jax.plan import parse_size

    if target_size is not None and report.stored_bytes > parse_size(target_size):
        say(LARGER.format(bytes=report.stored_bytes))
    if report.tuning is not None and report.tuning.note:
        say(f"fine-tuning: {report.tuning.note}")
    write_report(out, out / "report.html")
    peak = peak_bytes()
    found = {**report.to_json(), "forecast_bytes": plan.calibration_bytes, "peak_bytes": peak}
    size = f"{report.stored_bytes / 1e6:.1f} MB, {report.times_smaller:.2f} times smaller than in bfloat16"
    line = f"{out}: {found['bits_per_weight']:.3f} bits per weight in the blocks; {size}"
    print_result(found, f"{line}; {peak / 2**30:.2f} GiB of memory at most", as_json)


def _forecast(
    source: "Source",
    config: "SlimConfig",
    samples: int,
    length: int,
    offload: bool,
    texts: "list[Part]",
) -> "Plan":
    from convert.calibration import written
    from slim_jax.plan import DEVICES, make_plan

    return make_plan(
        source.config,
        config,
        next(iter(DEVICES)),
        samples=samples,
        length=length,
        written=written(texts, samples),
        offload=offload,
    )


def _that_fit(texts: "list[Part]", forecast: "Callable[[list[Part]], Plan]") -> "tuple[list[Part], Plan]":
    """Returns the texts that fit into memory, and the forecast with them.

    Text that the model would write is left out if writing it needs more memory than there is and other texts
    remain.
    """
    from slim_jax.memory import available

    plan, room, others = forecast(texts), available(), [part for part in texts if part.text is not None]
    if room is None or plan.writing_bytes <= room or not others:
        return texts, plan
    return others, forecast(others)


def _announce(
    source: "Source", config: "SlimConfig", plan: "Plan", windows: tuple[int, int, int], devices: int
) -> None:
    """Prints how much memory, time and storage the run is expected to need.

    ``windows`` are the number of windows, their length, and how many of them the model writes.
    """
    from slim_jax.duration import in_words, operations, rate

    seconds = operations(source.config, config, *windows) / (devices * rate(source.config))
    needed = f"about {plan.calibration_bytes / 2**30:.2f} GiB of memory and {in_words(seconds)}"
    stored = f"{plan.packed_bytes / 1e6:.1f} MB to store, {plan.bits_per_weight:.3f} bits per weight"
    say(f"{config.method} at {config.bits} bits: {needed}; about {stored} in the blocks")


def _announce_mlx(source: "Source", config: "SlimConfig") -> None:
    """Prints how large the model will be in MLX's format.

    Raises:
      ValueError: the format cannot store such a model, or it is not exported.
    """
    from convert.writers.mlx import forecast_bytes, window_note

    size = forecast_bytes(source.config, config.resolved())
    note = window_note(source.config)
    say(f"for mlx: one width per layer; about {size / 1e6:.1f} MB after export --format mlx{note}")


def _calibration(
    source: "Source", texts: "list[Part]", samples: int, length: int, seed: int
) -> "tuple[Any, Callable[[], np.ndarray]]":
    """Returns the tokenizer (None where there is none) and a function that draws the windows."""
    from convert.calibration import draw

    find = tokenizer_of if any(part.text is not None for part in texts) else optional_tokenizer
    tokenizer = find(source)
    to_tokens = None if tokenizer is None else partial(encode, tokenizer)
    return tokenizer, partial(draw, texts, to_tokens, partial(_own_text, source), samples, length, seed)


def _own_text(
    source: "Source", samples: int, length: int, seed: int
) -> "np.ndarray":  # int32 [samples, length]
    """Returns calibration windows that the model writes itself."""
    import numpy as np

    from slim_jax.infer.generate import sample_text
    from slim_jax.store.source import FiniteSource

    say(f"the model writes {samples} windows of {length} tokens to calibrate on")
    tokens = sample_text(
        whole_decoder(FiniteSource(source), rounded=True), samples=samples, length=length, seed=seed
    )
    return np.asarray(tokens, np.int32)


def _mesh(devices: int, samples: int, config: "SlimConfig") -> "jax.sharding.Mesh | None":
    """Mesh of the first ``devices`` devices, or None for one.

    Raises:
      ValueError: the samples, or those used for fine-tuning, cannot be divided among the devices.
    """
    mesh = devices_mesh(devices)
    if samples % devices:
        raise ValueError(f"there are {samples} samples, expected a multiple of the {devices} devices")
    config.resolved().samples_to_tune(samples, devices)  # for its errors, before the model is read
    return mesh
