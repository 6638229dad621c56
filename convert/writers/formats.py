"""The formats of ``slim-jax export``, by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slim_jax.store.source import Source

FORMATS = {
    "safetensors": "as stored",
    "hf": "dequantized",
    "gptq": "packed, embedding and LM head dequantized",
    "mlx": "packed, one width per layer",
}
"""Name -> a description of how the weights are stored, for messages."""


def check_options(format: str, dtype: str | None, perplexity: Sequence[str]) -> list[tuple[str, float]]:
    """Checks that the options fit the format; returns the perplexities with the names of their texts.

    Raises:
      ValueError: the format is unknown, does not take an option, or a perplexity is not ``TEXT=VALUE``.
    """
    if format not in FORMATS:
        raise ValueError(f"--format is {format!r}, expected one of {', '.join(FORMATS)}")
    if format == "safetensors" and dtype is not None:
        raise ValueError("--dtype is for hf, gptq and mlx, safetensors keeps every array as it is")
    if format != "safetensors" and perplexity:
        raise ValueError("--perplexity is for the model card of --format safetensors")
    return [_perplexity(given) for given in perplexity]


def _perplexity(given: str) -> tuple[str, float]:
    text, _, value = given.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not (text and 1 <= number < float("inf")):
        raise ValueError(f"--perplexity is {given!r}, expected one such as wikitext2=17.35")
    return text, number


def write(
    format: str,
    source: Source,
    out: Path,
    dtype: str | None,
    tokenizer: Any,
    perplexity: Sequence[tuple[str, float]],
) -> str:
    """Writes a model in one of :data:`FORMATS`; returns the description of how its weights are stored.

    Raises:
      ValueError: the format cannot store this model, or ``out`` cannot be written.
    """
    from convert.writers.export import export_hf
    from convert.writers.gptq import export_gptq
    from convert.writers.mlx import export_mlx, window_note
    from convert.writers.packed import export_packed

    if format == "safetensors":
        export_packed(source, out, tokenizer=tokenizer, perplexity=perplexity)
    elif format == "gptq":
        export_gptq(source, out, dtype, tokenizer=tokenizer)
    elif format == "mlx":
        export_mlx(source, out, dtype, tokenizer=tokenizer)
        return FORMATS[format] + window_note(source.config)
    else:
        export_hf(source, out, dtype, tokenizer=tokenizer)
    return FORMATS[format]
