"""Quantization: time, memory and quality, measured in one run.

    python -m bench.quantize                                # search speed, memory, seconds for SmolLM2
    python -m bench.quantize --calibration a.txt --text b.txt --methods rtn,gptq,slim --bits 2,3,4

Prints tables, and one JSON document with ``--json``. Seconds are CPU seconds of the process unless they are
called wall seconds; compare ratios rather than seconds of different machines.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import convert
from convert import calibration
from pallas_kernels import MixedTensor
from slim_jax.calibrate.activations import Activations
from slim_jax.calibrate.learning import learning_optimizer, rest_of, start, train_epoch
from slim_jax.calibrate.pipeline import quantize, quantize_to_checkpoint
from slim_jax.calibrate.quantizer import BlockQuantizer
from slim_jax.calibrate.sensitivity import Sensitivity
from slim_jax.config import SlimConfig
from slim_jax.duration import least_seconds
from slim_jax.eval.perplexity import perplexity
from slim_jax.eval.windows import draw_windows
from slim_jax.infer.generate import sample_text
from slim_jax.method.learnable import BlockLoss, Samples
from slim_jax.method.sba import allocate, divergence_from, quantized_at, scores
from slim_jax.model.block import sequence_positions
from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import block_params, make_block, outer_params
from slim_jax.placement import ONE_DEVICE
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


def search_speed(k: int, n: int, tokens: int, group_size: int) -> dict[str, Any]:
    """Times the incremental bit search and one that recomputes every candidate; both give the same scores."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, k))
    w = jax.random.normal(keys[1], (k, n)) * k**-0.5
    importance = jnp.exp(jax.random.normal(keys[2], (k,)))
    settings = {"bits": 2, "group_size": group_size, "zero_bits": 4, "sqc": "minmax", "criterion": "kl"}
    _, order = scores(w, x, importance, **settings)
    groups = k // group_size
    allocations = []
    for p in range((groups - 1) // 2 + 1):
        allocations.append(jnp.asarray(allocate(np.asarray(order), p, 2)))
    direct = least_seconds(
        lambda: [_candidate(w, x, importance, b, group_size=group_size) for b in allocations], 1
    )
    ours = least_seconds(lambda: scores(w, x, importance, **settings))
    return {"k": k, "n": n, "tokens": tokens, "direct_s": direct, "ours_s": ours, "ratio": direct / ours}


def learning_speed(source: Source, tokens: np.ndarray) -> dict[str, Any]:
    """Times an epoch of "slim-plus" over one block, and the block's full-precision gradient."""
    config, dense = source.config, dict(source.block(0))
    rtn = SlimConfig(group_size=64, method="rtn").resolved()
    params, _ = BlockQuantizer(source, tokens, rtn, Sensitivity({}, {})).quantize(0)
    packed = {name.removesuffix(".weight"): w for name, w in params.items() if isinstance(w, MixedTensor)}
    x = jnp.concatenate(list(Activations.of(source, tokens).batches))
    samples = Samples(x, x, x)  # any target will do for timing
    settings = SlimConfig(group_size=64, method="slim-plus").resolved()
    weights = {name: dense[f"{name}.weight"] for name in packed}
    (learned, layers), rest = start(weights, packed, settings, ONE_DEVICE), rest_of(dense, packed)
    optimizer, loss = learning_optimizer(settings, len(tokens)), BlockLoss(config.block(0), 0.0)
    state = optimizer.init(learned)
    order = jnp.arange(len(tokens)).reshape(-1, settings.batch_size)

    @jax.jit
    def full(params: dict[str, jax.Array]) -> jax.Array:
        def loss(params: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
            y, _ = make_block(config.block(0), params)(x[rows], sequence_positions(x[rows]))
            return jnp.mean((y - x[rows]) ** 2)

        return jax.lax.scan(lambda _, rows: (None, jax.grad(loss)(params, rows)), None, order)[1]

    def epoch() -> Any:
        given = jax.tree.map(jnp.copy, (learned, state))  # an epoch donates its arguments
        return train_epoch(*given, layers, rest, samples, order, optimizer, loss)

    dense = {name: jnp.asarray(value, jnp.float32) for name, value in dense.items()}
    ours, plain = least_seconds(epoch), least_seconds(lambda: full(dense))
    return {"tokens": tokens.size, "epoch_s": ours, "full_precision_s": plain, "ratio": ours / plain}


class RandomSource:
    """A model with random weights; its blocks are made when they are read, so that none stays in memory.

    Attributes:
      config: the decoder's config.
      origin: marks the model as random.
    """

    def __init__(self, config: DecoderConfig, *, dtype: Any = np.float32, alike: bool = False) -> None:
        """``dtype`` is that of the parameters; if ``alike``, all blocks are one and the same."""
        self.config, self._dtype, self._alike = config, dtype, alike
        self.origin: dict[str, Any] = {"kind": "random", "layers": config.num_layers}
        self._block: dict[str, np.ndarray] | None = None

    def _random(self, shapes: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)

        def matrix(shape: tuple[int, ...]) -> np.ndarray:
            return rng.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)

        return {
            name: (np.ones(s.shape, np.float32) if len(s.shape) == 1 else matrix(s.shape)).astype(self._dtype)
            for name, s in shapes.items()
        }

    def outer(self) -> dict[str, np.ndarray]:
        """See `slim_jax.store.source.Source`."""
        return self._random(outer_params(self.config), 0)

    def block(self, index: int) -> dict[str, np.ndarray]:
        """See `slim_jax.store.source.Source`."""
        if not self._alike:
            return self._random(block_params(self.config), 1 + index)
        if self._block is None:
            self._block = self._random(block_params(self.config), 1)
        return self._block


def _small(layers: int) -> RandomSource:
    """Returns a small llama-like model."""
    return RandomSource(
        DecoderConfig(
            family="llama",
            vocab_size=256,
            hidden_size=512,
            intermediate_size=1536,
            num_layers=layers,
            num_heads=8,
            num_kv_heads=8,
            head_dim=64,
            max_positions=256,
        )
    )


def peak_memory(layers: int) -> float:
    """Peak resident MiB of a process that quantizes a random model of ``layers`` blocks to disk."""
    code = f"from bench.quantize import _quantize_random; _quantize_random({layers})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def _quantize_random(layers: int) -> None:
    import tempfile

    source = _small(layers)
    tokens = np.random.default_rng(0).integers(0, 256, (16, 128))
    with tempfile.TemporaryDirectory() as folder:
        quantize_to_checkpoint(
            source, tokens, SlimConfig(bits=2, group_size=64, tune=False), Path(folder) / "out"
        )
    print(peak_mib())


def peak_mib() -> float:
    """Peak resident MiB of this process alone; Linux starts ``ru_maxrss`` at the parent's value."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


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


def quality(arguments: argparse.Namespace, name: str, bits: float) -> dict[str, Any]:
    """Quantizes the source once: CPU seconds, stored bits, values of ``p``, perplexity if there is a text."""
    source = convert.load_source(arguments.source)
    samples = _samples(source, arguments)
    start, wall = _cpu_seconds(), time.monotonic()
    model, report = quantize(source, samples, _settings(name, bits, arguments))
    row: dict[str, Any] = {
        "method": name,
        "bits": bits,
        "stored_bits": report.bits_per_weight,
        "cpu_s": _cpu_seconds() - start,
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
    encode = partial(encode_text, tokenizer)
    return calibration.draw(given, encode, write, arguments.samples, arguments.length, arguments.seed)


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


def main() -> None:
    """Runs the measurements that the options ask for and prints them."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantize", description=__doc__.splitlines()[0])
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
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    out: dict[str, Any] = {"quality": []}
    say = partial(print, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if not arguments.quality_only:
        out["search"] = [search_speed(1536, 576, 2048, 64), search_speed(4096, 4096, 2048, 128)]
        for row in out["search"]:
            say(
                f"bit search [{row['n']}, {row['k']}], {row['tokens']} tokens: "
                f"direct {row['direct_s']:.2f} s, incremental {row['ours_s']:.2f} s, ratio {row['ratio']:.1f}"
            )
        source = convert.load_source(arguments.source)
        out["learning"] = row = learning_speed(source, _random_tokens(source)[: 16 * 512].reshape(16, 512))
        say(
            f"slim-plus, an epoch of {row['tokens']} tokens over one block: {row['epoch_s']:.2f} s, "
            f"its full-precision gradient {row['full_precision_s']:.2f} s, ratio {row['ratio']:.2f}"
        )
        out["peak_mib"] = {str(layers): peak_memory(layers) for layers in (4, 64)}
        say("peak memory: " + ", ".join(f"{n} blocks {mib:.0f} MiB" for n, mib in out["peak_mib"].items()))
    for name in arguments.methods.split(","):
        for bits in map(float, arguments.bits.split(",")):
            row = quality(arguments, name, bits)
            out["quality"].append(row)
            found = f", perplexity {row['perplexity']:.2f}" if "perplexity" in row else ""
            say(
                f"{name}, {bits:g} bits: stored {row['stored_bits']:.3f}{found}, CPU {row['cpu_s']:.0f} s, "
                f"wall {row['wall_s']:.0f} s, p {row['mixed']}"
            )
    if arguments.json:
        print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
