"""Tokens per second of one sequence, dense (float32) and packed, measured alternately in one process.

``python -m bench.decode [--source smollm2] [--bits 2] [--packed PATH] [--devices N] [--tokens 64] [--json]``.
With ``--devices``, the packed model is also run on that many devices (cores of a CPU), which share the work
of every token.
"""

import argparse
import dataclasses
import json
import os
import time
from typing import Any

import numpy as np

from convert import load_source
from convert.cli.sources import devices_mesh
from pallas_kernels import MixedTensor, pack, scales
from pallas_kernels.chips import product_dtype
from slim_jax.config import SlimConfig
from slim_jax.infer.generate import Generator
from slim_jax.model.block import linear_groups
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import Params, block_params, make_decoder
from slim_jax.store.source import Source, read_decoder


def random_packed(
    shape: tuple[int, ...], bits: int, group_size: int, rng: np.random.Generator
) -> MixedTensor:
    """Random packed weight ``[K, N]``: a quarter of the groups each at ``bits ± 1``, half at ``bits``."""
    groups = -(-shape[0] // group_size)
    widths = np.full(groups, bits)
    order = rng.permutation(groups)
    widths[order[: groups // 4]] -= 1
    widths[order[groups // 4 : 2 * (groups // 4)]] += 1
    return random_codes(shape, widths, group_size, rng, widths=(bits - 1, bits, bits + 1))


def random_codes(
    shape: tuple[int, ...],
    bits: np.ndarray,
    group_size: int,
    rng: np.random.Generator,
    widths: tuple[int, ...],
) -> MixedTensor:
    """Random packed weight ``[K, N]`` whose groups have these ``bits``, out of ``widths``."""
    k, n = shape
    limit = np.repeat(1 << bits, group_size)[:k, None]
    codes = (rng.integers(0, 1 << max(widths), (k, n)) % limit).astype(np.uint8)
    scale = np.asarray(scales.encoded((rng.random((len(bits), n)) + 0.5) * 0.01))
    zero = rng.integers(0, 16, (len(bits), n), dtype=np.uint8)
    return pack(codes, scale, zero, bits, group_size=group_size, widths=widths)


def random_decoder(
    source: Source, bits: int, group_size: int, seed: int = 0, *, alike: bool = False
) -> Decoder:
    """Returns the source's model with random codes in every linear layer of its blocks.

    Embedding and LM head are packed at the width that belongs to ``bits``. If ``alike``, all blocks of one
    kind share one block's codes.
    """
    config, rng = source.config, np.random.default_rng(seed)
    blocks: list[Params] = []
    packed: dict[DecoderConfig, Params] = {}
    for i, kind in enumerate(config.blocks()):
        if not (kind in packed and alike):
            shapes = block_params(kind)
            names = [f"{name}.weight" for group in linear_groups(kind) for name in group]
            packed[kind] = {
                name: dataclasses.replace(
                    random_packed(shapes[name].shape, bits, group_size, rng), dtype=product_dtype()
                )
                for name in names
            }
        blocks.append({**source.block(i), **packed[kind]})
    outer = {name: random_table(name, value, bits, rng) for name, value in source.outer().items()}
    return make_decoder(config, outer, blocks)


def random_table(name: str, value: Any, bits: int, rng: np.random.Generator) -> Any:
    """Packs embedding and LM head at the width that belongs to ``bits``; keeps other parameters."""
    if name not in ("embed", "head.weight"):
        return value
    k, n = value.shape[::-1] if name == "embed" else value.shape
    settings = SlimConfig(bits=bits).resolved()
    width, group_size = settings.embedding_bits, settings.embedding_group_size
    bits_of_groups = np.full(-(-k // group_size), width)
    packed = random_codes((k, n), bits_of_groups, group_size, rng, widths=(width,))
    return dataclasses.replace(packed, dtype=product_dtype())


def load_packed(path: str) -> Decoder:
    """Loads a quantized checkpoint."""
    from slim_jax.store.checkpoint import load  # not needed for random codes

    return load(path)


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
    for generator in generators.values():
        seconds(generator, prompt, tokens)
    taken: dict[str, list[float]] = {name: [] for name in generators}
    for _ in range(rounds):
        for name, generator in generators.items():
            taken[name].append(seconds(generator, prompt, tokens))
    return {name: tokens / float(np.median(times)) for name, times in taken.items()}


def measure_prefill(generators: dict[str, Generator], length: int, rounds: int) -> dict[str, float]:
    """Median seconds in which each generator reads a prompt and chooses the first token, alternately."""
    prompt = [2 + i % 200 for i in range(length)]
    taken: dict[str, list[float]] = {name: [] for name in generators}
    for i in range(1 + rounds):
        for name, generator in generators.items():
            start = time.perf_counter()
            generator.generate([prompt], max_tokens=1, stop=[])
            if i:  # the first run compiles
                taken[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in taken.items()}


def main() -> None:
    """Prints tokens per second of each model, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="smollm2")
    parser.add_argument("--bits", type=int, default=2, help="mean width of random codes, 2 to 7")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--packed", help="a quantized checkpoint instead of random codes")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    mesh = devices_mesh(args.devices, cores=True)
    source = load_source(args.source, dtype="float32")
    packed = load_packed(args.packed) if args.packed else random_decoder(source, args.bits, args.group_size)
    generators = {"dense": Generator(read_decoder(source)), "packed": Generator(packed)}
    if mesh is not None:
        generators[f"packed_{args.devices}_devices"] = Generator(packed, mesh=mesh)
    speed = measure(generators, args.tokens, args.rounds)
    ratio = speed["packed"] / speed["dense"]
    if args.json:
        result = {"source": args.source, "bits": args.bits, "packed_checkpoint": args.packed}
        result |= {"tokens": args.tokens, "rounds": args.rounds, "cores": os.cpu_count()}
        print(
            json.dumps(result | {f"{name}_tokens_per_s": s for name, s in speed.items()} | {"ratio": ratio})
        )
        return
    for name, tokens_per_second in speed.items():
        print(f"{name:<18} {tokens_per_second:7.1f} tokens/s")
    print(f"{'packed / dense':<18} {ratio:7.2f}")


if __name__ == "__main__":
    main()
