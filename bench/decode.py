"""Tokens per second of one sequence, dense (float32) and packed, measured alternately in one process.

    python -m bench decode [--source smollm2] [--bits 2] [--packed PATH] [--devices N] [--tokens 64]

With ``--devices``, the packed model is also run on that many devices (cores of a CPU), which share the work
of every token.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from bench.models import random_decoder
from bench.results import Results
from convert import load_source
from convert.cli.sources import devices_mesh
from slim_jax.infer.generate import Generator
from slim_jax.store.checkpoint import load
from slim_jax.store.source import read_decoder


def seconds(generator: Generator, prompt: list[int], tokens: int) -> float:
    """Seconds from the first to the last of ``tokens + 1`` tokens, without prefill."""
    times: list[float] = []
    generator.generate(
        [prompt],
        max_tokens=tokens + 1,
        stop=[],
        on_token=lambda row, token: times.append(time.perf_counter()),
    )
    return times[-1] - times[0]


def measure(generators: dict[str, Generator], tokens: int, rounds: int) -> dict[str, float]:
    """Median tokens per second of each generator, measured alternately."""
    prompt = list(range(2, 18))
    taken = _medians(generators, lambda generator: seconds(generator, prompt, tokens), rounds)
    return {name: tokens / found for name, found in taken.items()}


def measure_prefill(generators: dict[str, Generator], length: int, rounds: int) -> dict[str, float]:
    """Median seconds in which each generator reads a prompt and chooses the first token, alternately."""
    prompt = [2 + i % 200 for i in range(length)]

    def read(generator: Generator) -> float:
        start = time.perf_counter()
        generator.generate([prompt], max_tokens=1, stop=[])
        return time.perf_counter() - start

    return _medians(generators, read, rounds)


def _medians(
    generators: dict[str, Generator], run: Callable[[Generator], float], rounds: int
) -> dict[str, float]:
    taken = [[run(generator) for generator in generators.values()] for _ in range(1 + rounds)]
    return dict(zip(generators, np.median(taken[1:], axis=0).tolist()))  # the first round compiles


def main(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Shows tokens per second of each model."""
    parser.add_argument("--source", default="smollm2")
    parser.add_argument("--bits", type=int, default=2, help="mean width of random codes, 2 to 7")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--packed", help="a quantized checkpoint instead of random codes")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(given)
    mesh = devices_mesh(args.devices, cores=True)
    source = load_source(args.source, dtype="float32")
    packed = load(args.packed) if args.packed else random_decoder(source, args.bits, args.group_size)
    generators = {"dense": Generator(read_decoder(source)), "packed": Generator(packed)}
    if mesh is not None:
        generators[f"packed, {args.devices} devices"] = Generator(packed, mesh=mesh)
    speed = measure(generators, args.tokens, args.rounds)
    rows = [
        {"model": name, "tokens_per_s": found, "times_dense": found / speed["dense"]}
        for name, found in speed.items()
    ]
    Results(args.json, settings=vars(args), cores=os.cpu_count()).show("rows", rows)
