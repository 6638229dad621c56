"""``slim-jax plan``."""

import dataclasses
from typing import Annotated

import typer

from convert.cli.options import (
    Bits,
    EmbeddingBits,
    GroupSize,
    JsonOption,
    Length,
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
from convert.cli.sources import at_revision, describe, window_length
from convert.display import origin_notes, print_json, print_plan


def plan(
    source: SourceArgument,
    bits: Bits = None,
    group_size: GroupSize = None,
    target_size: TargetSize = None,
    preset: Preset = None,
    given: Set = None,
    rule: RuleOption = None,
    rules: RulesFile = None,
    embedding_bits: EmbeddingBits = None,
    devices: Annotated[
        str,
        typer.Option(
            metavar="KIND[:COUNT]", help="Devices that are to run the model, such as v5e:4 or h100."
        ),
    ] = "v5e",
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 4096,
    samples: Samples = 128,
    length: Length = None,
    revision: Revision = None,
    as_json: JsonOption = False,
) -> None:
    """Predict size, memory and time: does the quantized model fit, and how long does quantizing take here?

    Only the config is read, no weights.

    slim-jax plan models/Llama-2-7b --bits 2 --devices v5e

    slim-jax plan models/Llama-2-70b --bits 2 --devices v5e:4 --context 2048 --json
    """
    from convert.calibration import parts, written
    from slim_jax.duration import in_words, operations, rate
    from slim_jax.plan import for_size, make_plan, parse_devices, parse_size

    settings = make_settings(
        preset,
        given or (),
        target_size,
        bits=bits,
        group_size=group_size,
        embedding_bits=embedding_bits,
        rules=make_rules(rule, rules),
    )
    config, origin = describe(at_revision(source, revision))
    if target_size is not None:
        settings = for_size(config, settings, parse_size(target_size))
    length = window_length(length, config)
    own = written(parts(()), samples)  # for the default calibration
    found = make_plan(
        config,
        settings,
        *parse_devices(devices),
        batch=batch,
        context=context,
        samples=samples,
        length=length,
        written=own,
    )
    seconds = operations(config, settings, samples, length, own) / rate(config)
    notes = origin_notes(origin)
    if as_json:
        print_json({**dataclasses.asdict(found), "seconds_here": round(seconds), "notes": notes})
    else:
        print_plan(source, found, in_words(seconds), notes)
