"""Comparison of a small model at 2, 3 and 4 bits: size, perplexity on two texts, and a sample of each.

    python -m bench demo                                  # into out/demo; `make demo`
    python -m bench demo --bits 3,4 --samples 64 --out out/other

The run takes minutes, because nothing is fine-tuned (`--preset fast`) and calibration is short; `--tune 2`
fine-tunes the given widths, which takes longer. A width whose folder is finished is not quantized again; an
interrupted one is resumed. Seconds are CPU seconds of the process.
"""

import argparse
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

from bench.results import Record, Results
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


def make_picture(rows: Sequence[Record], texts: Sequence[str]) -> str:
    """Plot of log perplexity over size, as SVG: a line for each text, dashed for the first row.

    Rows have "model", "MB", and the perplexity on each text by the text's name.
    """
    dense, packed = rows[0], sorted(rows[1:], key=lambda row: row["MB"])
    values = [math.log(row[text]) for row in rows for text in texts]
    low, high = min(values) - 0.1, max(values) + 0.1
    left, right = packed[0]["MB"] * 0.95, packed[-1]["MB"] * 1.05

    def x(size: float) -> float:
        return 60 + 500 * (size - left) / (right - left)

    def y(value: float) -> float:
        return 300 - 260 * (math.log(value) - low) / (high - low)

    parts = []
    for i, text in enumerate(texts):
        ink = INK[i % len(INK)]
        at = [(x(row["MB"]), y(row[text]), row[text]) for row in packed]
        line, level = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in at), y(dense[text])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{ink}" stroke-width="2"/>')
        parts.append(
            f'<path d="M60 {level:.1f}H560" stroke="{ink}" stroke-dasharray="4 4"/>'
            f'<text x="565" y="{level + 4:.1f}" fill="{ink}">{dense[text]:.1f}</text>'
            f'<text x="60" y="{18 + 16 * i}" fill="{ink}">{html.escape(text)}; dashed: full precision</text>'
        )
        parts += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{ink}"/>'
            f'<text x="{a + 7:.1f}" y="{b - 6:.1f}" fill="{ink}">{value:.1f}</text>'
            for a, b, value in at
        ]
    for row in packed:
        label = f"{html.escape(row['model'])}, {row['MB']:.0f} MB"
        parts.append(f'<text x="{x(row["MB"]):.1f}" y="322" text-anchor="middle">{label}</text>')
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


def parse(parser: argparse.ArgumentParser, given: Sequence[str]) -> argparse.Namespace:
    """Adds the options to the parser, parses what is given, and checks it."""
    parser.add_argument("--source", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--bits", type=_widths, default="2,3,4", help="widths, with commas between them")
    parser.add_argument("--tune", type=_widths, default="", help="those of them that are tuned end to end")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--text", type=Path, action="append", help="for perplexity; several times")
    parser.add_argument("--prompt", default=PROMPT)
    found = parser.parse_args(given)
    found.text = found.text or list(TEXTS)
    if not found.bits:
        parser.error("--bits is empty, expected widths such as 2,3,4")
    if not set(found.tune) <= set(found.bits):
        parser.error(f"--tune has {found.tune}, expected some of --bits {found.bits}")
    return found


def _widths(given: str) -> list[float]:
    try:
        return [float(bits) for bits in given.split(",") if bits.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given} is not numbers with commas between them") from None


def measured(name: str, source: Source, args: argparse.Namespace, tokenizer: Any, start: float) -> Record:
    """Measures a packed or dense model, prints its sample and returns its row; ``start`` is CPU seconds.

    Megabytes are those of all weights, in bfloat16 for the dense model; bits are stored ones, in the blocks.
    """
    known = summary(source.manifest) if isinstance(source, CheckpointSource) else None
    model = read_decoder(source)
    size, bits = 2 * sum(leaf.size for leaf in jax.tree.leaves(model)), 16.0
    if isinstance(source, CheckpointSource) and known is not None:
        size = sum(file.stat().st_size for file in source.path.glob("*.safetensors"))
        bits = known["bits_per_weight"]
    values, sample = measure(model, tokenizer, args.text, args.prompt)
    Console().print(f"== {name}: {args.prompt}{sample}", highlight=False, markup=False)
    row = {"model": name, "MB": size / 1e6, "bits_per_weight": bits}
    row |= dict(zip(map(_name, args.text), values))
    return row | {"CPU_seconds": round(time.process_time() - start), "sample": [sample]}


def _name(text: Path) -> str:
    return text.stem.replace("_", " ")


def main(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Quantizes, measures, prints the table, and draws ``perplexity.svg``."""
    args = parse(parser, given)
    try:
        _run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")


def _run(args: argparse.Namespace) -> None:
    for text in args.text:
        calibration.read_text(text)
    configs = {
        args.out / f"q{bits:g}": SlimConfig.preset(
            "good" if bits in args.tune else "fast", bits=bits, group_size=args.group_size
        )
        for bits in args.bits
    }
    source = open_model(args.source)
    tokenizer = source_tokenizer(source)
    tokens = windows(tokenizer, args.samples, args.length)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [measured("full precision", source, args, tokenizer, time.process_time())]
    for folder, config in configs.items():
        start = time.process_time()
        packed = quantized(source, tokenizer, tokens, config, folder)
        rows.append(measured(f"{config.bits:g} bits", packed, args, tokenizer, start))
    print("Megabytes of the whole model, and perplexity on each text: lower is better.")
    shown = [row | {"of_bfloat16": f"{row['MB'] / rows[0]['MB']:.1%}"} for row in rows]
    Results(args.json).show("rows", shown)
    picture = args.out / "perplexity.svg"
    picture.write_text(make_picture(rows, [_name(text) for text in args.text]), encoding="utf-8")
    print(f"{picture} shows it; slim-jax chat {folder} talks")
    print(f"{time.process_time():.0f} CPU seconds in all")
