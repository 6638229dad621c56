"""Quantization: time, memory and quality, measured in one run.

    python -m bench quantize                                # search speed, memory, seconds for SmolLM2
    python -m bench quantize --calibration a.txt --text b.txt --methods rtn,gptq,slim --bits 2,3,4

Seconds are CPU seconds of the process unless they are
called wall seconds; compare ratios rather than seconds of different machines.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import convert
from bench.models import RandomSource, llama
from bench.results import Record, Results
from convert import calibration
from slim_jax.calibrate.pipeline import quantize, quantize_to_checkpoint
from slim_jax.config import SlimConfig
from slim_jax.duration import least_seconds
from slim_jax.eval.perplexity import perplexity
from slim_jax.eval.windows import draw_windows
from slim_jax.infer.generate import sample_text
from slim_jax.method.sba import allocate, divergence_from, quantized_at, scores
from slim_jax.store.source import Source, read_decoder


@partial(jax.jit, static_argnames="group_size")
def _candidate(
    w: jax.Array, x: jax.Array, importance: jax.Array, bits: jax.Array, *, group_size: int
) -> jax.Array:
    """Score of one allocation, with every group quantized and every product computed from scratch."""
    at = partial(quantized_at, w, importance, group_size=group_size, zero_bits=4, sqc="minmax")
    width = jnp.repeat(bits, group_size)[:, None]
    w_hat = jnp.where(width == 1, at(1), jnp.where(width == 2, at(2), at(3)))
    return divergence_from(x @ w)(x @ w_hat)


def search_speed(k: int, n: int, tokens: int, group_size: int) -> Record:
    """Times the incremental bit search and one that recomputes every candidate; both give the same scores."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, k))
    w = jax.random.normal(keys[1], (k, n)) * k**-0.5
    importance = jnp.exp(jax.random.normal(keys[2], (k,)))
    settings = {"bits": 2, "group_size": group_size, "zero_bits": 4, "sqc": "minmax", "criterion": "kl"}
    _, order = scores(w, x, importance, **settings)
    most = (k // group_size - 1) // 2
    allocations = [jnp.asarray(allocate(np.asarray(order), p, 2)) for p in range(most + 1)]
    direct = least_seconds(
        lambda: [_candidate(w, x, importance, b, group_size=group_size) for b in allocations], 1
    )
    ours = least_seconds(lambda: scores(w, x, importance, **settings))
    what = f"bit search, {k} x {n}, {tokens} tokens"
    return {"what": what, "direct_s": direct, "ours_s": ours, "ratio": direct / ours}


def peak_memory(layers: int) -> float:
    """Peak resident MiB of a process that quantizes a random model of ``layers`` blocks to disk."""
    code = f"from bench.quantize import _quantize_random; _quantize_random({layers})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def _quantize_random(layers: int) -> None:
    source = RandomSource(llama(layers, 512, 1536, 8, 256, 256))
    tokens = np.random.default_rng(0).integers(0, 256, (16, 128))
    settings = SlimConfig(bits=2, group_size=64, tune=False)
    with tempfile.TemporaryDirectory() as folder:
        quantize_to_checkpoint(source, tokens, settings, Path(folder) / "out")
    print(peak_mib())


def peak_mib() -> float:
    """Peak resident MiB of this process alone; Linux starts ``ru_maxrss`` at the parent's value."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _settings(name: str, bits: float, arguments: argparse.Namespace) -> SlimConfig:
    method, _, variant = name.partition(":")
    part = "learn" if method == "slim-plus" else "sqc"
    choice = {part: variant} if variant else {}
    settings: dict[str, Any] = {"tune": method == "slim-plus", **choice, **dict(arguments.set)}
    return SlimConfig(bits=bits, group_size=arguments.group_size, method=method, **settings)


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name not in {field.name for field in dataclasses.fields(SlimConfig)}:
        raise argparse.ArgumentTypeError(f"{name!r} is no setting of SlimConfig")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def quality(arguments: argparse.Namespace, name: str, bits: float) -> Record:
    """Quantizes the source once: CPU seconds, stored bits, values of ``p``, perplexity if there is a text."""
    source = convert.load_source(arguments.source)
    samples = _samples(source, arguments)
    start, wall = time.process_time(), time.monotonic()
    model, report = quantize(source, samples, _settings(name, bits, arguments))
    row: Record = {
        "method": name,
        "bits": bits,
        "stored_bits": report.bits_per_weight,
        "cpu_s": time.process_time() - start,
        "wall_s": time.monotonic() - wall,
        "mixed": _spread([layer.mixed for layer in report.layers]),
    }
    if report.blocks[0].learning is not None:
        learned = [block.learning for block in report.blocks]
        row["block_losses"] = [(one.losses[0], one.losses[one.kept_epoch]) for one in learned if one.losses]
    if arguments.text:
        result = perplexity(model, tokens_of(source, arguments.text), 2048, arguments.max_windows)
        row.update(dataclasses.asdict(result))
    return row


def _samples(source: Source, arguments: argparse.Namespace) -> np.ndarray:
    if arguments.calibration is None:
        tokens = _random_tokens(source)
        return draw_windows(tokens, arguments.samples, arguments.length, arguments.seed)

    def write(samples: int, length: int, seed: int) -> np.ndarray:
        return sample_text(read_decoder(source), samples=samples, length=length, seed=seed)

    tokenizer: Any = getattr(source, "tokenizer", None)
    given = calibration.parts(arguments.calibration.split(","))
    return calibration.draw(
        given, partial(encode_text, tokenizer), write, arguments.samples, arguments.length, arguments.seed
    )


def _spread(values: list[int | None]) -> dict[str, int]:
    return {str(v): values.count(v) for v in sorted({v for v in values if v is not None})}


def _random_tokens(source: Source) -> np.ndarray:
    """Random tokens, enough for timing."""
    return np.random.default_rng(0).integers(0, source.config.vocab_size, 300_000)


def tokens_of(source: Any, path: str | None) -> np.ndarray:
    if path is None:
        return _random_tokens(source)
    return encode_text(source.tokenizer, calibration.read_text(Path(path)))


def encode_text(tokenizer: Any, text: str) -> np.ndarray:
    """Tokens of a text, without special tokens."""
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"])


def _speed() -> Iterator[Record]:
    """Yields times of the bit search, and peak memory."""
    yield search_speed(1536, 576, 2048, 64)
    yield search_speed(4096, 4096, 2048, 128)
    for layers in (4, 64):
        yield {"what": f"a random model of {layers} blocks", "peak_mib": peak_memory(layers)}


def main(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Runs the measurements that the options ask for."""
    parser.add_argument("--source", default="smollm2")
    parser.add_argument("--calibration", help="as of `slim-jax quantize`, joined by commas; random without")
    parser.add_argument("--text", help="text to measure perplexity on; none without")
    parser.add_argument(
        "--methods",
        default="slim",
        help="of rtn, gptq and slim, each with :search, :paper or :minmax, "
        "and slim-plus, with :clip or :rounding",
    )
    parser.add_argument(
        "--set",
        type=_setting,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="other fields of SlimConfig",
    )
    parser.add_argument("--bits", default="2")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-windows", type=int, default=38)
    parser.add_argument("--quality-only", action="store_true", help="skip search speed and memory")
    arguments = parser.parse_args(given)
    results = Results(arguments.json)
    if not arguments.quality_only:
        results.show("speed", _speed())
    asked = [(name, bits) for name in arguments.methods.split(",") for bits in arguments.bits.split(",")]
    results.show("quality", (quality(arguments, name, float(bits)) for name, bits in asked))
