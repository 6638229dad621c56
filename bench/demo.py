"""Comparison of a small model at 2, 3 and 4 bits: size, perplexity on two texts, and a sample of each.

    python -m bench.demo                                  # into out/demo; `make demo`
    python -m bench.demo --bits 3,4 --samples 64 --out out/other

The run takes minutes, because nothing is fine-tuned (`--preset fast`) and calibration is short; `--tune 2`
fine-tunes the given widths, which takes longer. A width whose folder is finished is not quantized again; an
interrupted one is resumed. Seconds are CPU seconds of the process.
"""

import argparse
import dataclasses
import html
import math
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from convert import calibration
from convert.cli.sources import encode
from convert.display import progress, shown_by
from convert.readers.load import open_model, source_tokenizer
from convert.report import COLORS
from convert.writers.packed import export_packed
from slim_jax.calibrate.pipeline import quantize_to_checkpoint
from slim_jax.config import SlimConfig
from slim_jax.eval.perplexity import perplexity
from slim_jax.infer.generate import Generator
from slim_jax.model.decoder import Decoder
from slim_jax.store.checkpoint import CheckpointSource, is_checkpoint
from slim_jax.store.manifest import summary
from slim_jax.store.source import Source, read_decoder

ROOT = Path(__file__).parents[1]
TEXTS = (ROOT / "bench/data/pride_and_prejudice.txt", ROOT / "docs/usage.md")
"""A novel, and a manual that no model was trained on."""
PROMPT = "The old lighthouse keeper opened the door and"
WINDOW, WINDOWS = 512, 2
WRITTEN, PENALTY = 40, 1.2
"""Tokens of a sample, and the repetition penalty that keeps a small model from repeating itself."""
INK = ("#3288bd", "#d53e4f", "#b58900", "#8a63b8")


@dataclasses.dataclass(frozen=True)
class Row:
    """One model, a row of the table.

    Attributes:
      name: name of the row, such as "3 bits".
      bytes: size of the files of all weights, including the embedding; in bfloat16 for the dense model.
      bits_per_weight: stored bits in the blocks; 16 for the dense model.
      perplexities: perplexity on every text.
      sample: text that the model writes after the prompt.
      seconds: CPU seconds to quantize and measure, without work that the widths share.
    """

    name: str
    bytes: int
    bits_per_weight: float
    perplexities: tuple[float, ...]
    sample: str
    seconds: float


def make_table(rows: Sequence[Row], texts: Sequence[str]) -> Table:
    """Table of the rows, without their samples."""
    table = Table(title="perplexity: lower is better; the file is the whole model", title_justify="left")
    table.add_column("")
    for column in ("file", "of bfloat16", "bits per weight", *texts, "CPU seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.bytes / 1e6:.1f} MB",
            f"{row.bytes / rows[0].bytes:.1%}",
            f"{row.bits_per_weight:.3f}",
            *(f"{value:.2f}" for value in row.perplexities),
            f"{row.seconds:.0f}",
        )
    return table


def make_picture(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """Plot of log perplexity over size, as SVG: a line for each text, dashed for the first row."""
    dense, packed = rows[0], sorted(rows[1:], key=lambda row: row.bytes)
    values = [math.log(value) for row in rows for value in row.perplexities]
    low, high = min(values) - 0.1, max(values) + 0.1
    left, right = packed[0].bytes * 0.95, packed[-1].bytes * 1.05

    def x(size: float) -> float:
        return 60 + 500 * (size - left) / (right - left)

    def y(value: float) -> float:
        return 300 - 260 * (math.log(value) - low) / (high - low)

    parts = []
    for i, text in enumerate(texts):
        ink = INK[i % len(INK)]
        at = [(x(row.bytes), y(row.perplexities[i]), row.perplexities[i]) for row in packed]
        line, level = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in at), y(dense.perplexities[i])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{ink}" stroke-width="2"/>')
        parts.append(
            f'<path d="M60 {level:.1f}H560" stroke="{ink}" stroke-dasharray="4 4"/>'
            f'<text x="565" y="{level + 4:.1f}" fill="{ink}">{dense.perplexities[i]:.1f}</text>'
            f'<text x="60" y="{18 + 16 * i}" fill="{ink}">{html.escape(text)}; dashed: {dense.name}</text>'
        )
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{ink}"/>'
            f'<text x="{a + 7:.1f}" y="{b - 6:.1f}" fill="{ink}">{value:.1f}</text>'
            for a, b, value in at
        ]
    for row in packed:
        label = f"{html.escape(row.name)}, {row.bytes / 1e6:.0f} MB"
        parts.append(f'<text x="{x(row.bytes):.1f}" y="322" text-anchor="middle">{label}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 340" font-family="sans-serif" '
        'font-size="12">'
        '<rect width="640" height="340" fill="#fff"/><path d="M60 40V300H560" fill="none" stroke="#888"/>'
        f'<text x="20" y="170" transform="rotate(-90 20 170)" fill="{COLORS[1]}">perplexity</text>'
        f"{''.join(parts)}</svg>\n"
    )


def measure(
    model: Decoder, tokenizer: Any, texts: Sequence[Path], prompt: str
) -> tuple[tuple[float, ...], str]:
    """Perplexity on every text, and the text that the model writes after the prompt."""

    ids = [np.asarray(encode(tokenizer, text.read_text("utf-8")), np.int32) for text in texts]
    found = tuple(perplexity(model, tokens, WINDOW, WINDOWS).perplexity for tokens in ids)
    begun = [encode(tokenizer, prompt)]
    (written,) = Generator(model).generate(begun, max_tokens=WRITTEN, repetition_penalty=PENALTY)
    return found, tokenizer.decode(written, skip_special_tokens=True)


def windows(tokenizer: Any, samples: int, length: int) -> np.ndarray:
    """Calibration windows from the texts of the built-in mixture, without text that the model writes."""
    texts = [part for part in calibration.parts(()) if part.text is not None]
    return calibration.draw(texts, partial(encode, tokenizer), _no_text, samples, length, 0)


def _no_text(samples: int, length: int, seed: int) -> np.ndarray:
    raise ValueError("the demo does not calibrate on what a model writes")


def quantized(
    source: Source, tokenizer: Any, tokens: np.ndarray, config: SlimConfig, out: Path
) -> CheckpointSource:
    """Returns the packed model in ``out``, quantizing it if it is missing."""
    run = out.with_name(f"{out.name}.run")
    if not is_checkpoint(out):
        with progress(f"{config.bits:g} bits", source.config.num_layers) as step:
            quantize_to_checkpoint(
                source,
                tokens,
                config,
                run,
                resume=run.exists(),
                on_event=shown_by(step),
            )
        export_packed(CheckpointSource(run), out, tokenizer=tokenizer)
        shutil.rmtree(run)
    return CheckpointSource(out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the arguments.

    Raises:
      ValueError: an argument is invalid.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--bits", default="2,3,4", help="widths, with commas between them")
    parser.add_argument("--tune", default="", help="those of them that are tuned end to end")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--text", type=Path, action="append", help="for perplexity; several times")
    parser.add_argument("--prompt", default=PROMPT)
    found = parser.parse_args(arguments)
    found.bits, found.tune = _widths("--bits", found.bits), _widths("--tune", found.tune)
    found.text = found.text or list(TEXTS)
    if not found.bits:
        raise ValueError("--bits is empty, expected widths such as 2,3,4")
    if not set(found.tune) <= set(found.bits):
        raise ValueError(f"--tune has {found.tune}, expected some of --bits {found.bits}")
    for text in found.text:
        calibration.read_text(text)
    return found


def _widths(option: str, given: str) -> list[float]:
    try:
        return [float(bits) for bits in given.split(",") if bits.strip()]
    except ValueError:
        raise ValueError(f"{option} is {given}, expected numbers with commas between them") from None


def measured(name: str, source: Source, args: argparse.Namespace, tokenizer: Any, start: float) -> Row:
    """Measures a packed or dense model, prints its sample and returns its row; ``start`` is CPU seconds."""
    known = summary(source.manifest) if isinstance(source, CheckpointSource) else None
    model = read_decoder(source)
    if isinstance(source, CheckpointSource) and known is not None:
        size, bits = _size(source.path), known["bits_per_weight"]
    else:
        size, bits = 2 * sum(leaf.size for leaf in jax.tree.leaves(model)), 16.0
    values, sample = measure(model, tokenizer, args.text, args.prompt)
    Console().print(f"== {name}: {args.prompt}{sample}", highlight=False, markup=False)
    return Row(name, size, bits, values, sample, time.process_time() - start)


def main(arguments: Sequence[str] | None = None) -> None:
    """Quantizes, measures, prints the table, and draws ``perplexity.svg``."""
    args = parse(arguments)
    source = open_model(args.source)
    tokenizer = source_tokenizer(source)
    tokens = windows(tokenizer, args.samples, args.length)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [measured("full precision", source, args, tokenizer, time.process_time())]
    configs = {
        args.out / f"q{bits:g}": SlimConfig.preset(
            "good" if bits in args.tune else "fast", bits=bits, group_size=args.group_size
        )
        for bits in args.bits
    }
    for folder, config in configs.items():
        start = time.process_time()
        packed = quantized(source, tokenizer, tokens, config, folder)
        rows.append(measured(f"{config.bits:g} bits", packed, args, tokenizer, start))
    texts = [text.stem.replace("_", " ") for text in args.text]
    console = Console()
    console.print(make_table(rows, texts))
    picture = args.out / "perplexity.svg"
    picture.write_text(make_picture(rows, texts), encoding="utf-8")
    console.print(f"{picture} shows it; slim-jax chat {folder} talks", highlight=False)
    console.print(f"{time.process_time():.0f} CPU seconds in all", highlight=False)


def _size(folder: Path) -> int:
    """Size of the weights' files in bytes."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"demo: {error}")
