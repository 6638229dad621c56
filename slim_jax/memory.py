"""How much memory a quantization needs at once: forecast from the config alone, measured, and what there is.

A run goes through phases (the model writes calibration text, the gradient sweep, blocks, embedding and head,
tuning), and each frees what it had. A phase counts its arrays, what it reads, and the temporaries of its
largest program. Sources are taken to give float32.
"""

import contextlib
import dataclasses
import math
import sys
from pathlib import Path

import jax

from slim_jax.calibrate.activations import BATCH_TOKENS
from slim_jax.calibrate.embeddings import CHUNK
from slim_jax.calibrate.sensitivity import BUDGET_LENGTH, BUDGET_TOKENS, without_choice
from slim_jax.config import Settings
from slim_jax.infer.generate import SAMPLE_ROWS
from slim_jax.model.block import linear_groups
from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import block_params

RUNTIME, OF_TOKEN = 420 * 2**20, 1024
"""Bytes of Python, JAX, compiled programs and a tokenizer, and for each token of the vocabulary; measured."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Numbers of a model that phases count with.

    Attributes:
      blocks: parameters of every block.
      outer: parameters outside the blocks.
      head: of these, of a head that is not tied, which is transposed when it is read.
      packed: bytes of all packed layers.
      scales: groups of all packed layers.
      ends: bytes of embedding and head, packed.
    """

    blocks: list[int]
    outer: int
    head: int
    packed: int
    scales: int
    ends: int


def phases(
    config: DecoderConfig,
    settings: Settings,
    shapes: Shapes,
    samples: int,
    length: int,
    written: int,
    offload: bool,
) -> dict[str, int]:
    """Returns the bytes that every phase of a quantization holds at once, the runtime's not among them.

    Args:
      config: the decoder's.
      settings: how it is quantized.
      shapes: of the model.
      samples: calibration windows.
      length: their tokens.
      written: how many of them the model writes itself.
      offload: whether activations are on disk but for a batch.
    """
    tokens = BATCH_TOKENS if offload else (samples - settings.samples_to_tune(samples)) * length
    sizes = zip(config.blocks(), shapes.blocks)
    blocks = [_block_bytes(kind, settings, size, tokens) for kind, size in sizes]
    found = {"blocks": max(blocks), "ends": _ends_bytes(config, settings, shapes, tokens)}
    if written:
        found["writing"] = _writing_bytes(config, shapes, written, length)
    if settings.guide or without_choice(config, settings) is None:
        found["sweep"] = _sweep_bytes(config, settings, shapes, tokens, length)
    if settings.tune:
        found["tuning"] = _tuning_bytes(config, settings, shapes, samples, length)
    return found


def runtime_bytes(config: DecoderConfig) -> int:
    """Returns what is held beside a quantization's arrays where these are in the process's memory."""
    return RUNTIME + OF_TOKEN * config.vocab_size if jax.default_backend() == "cpu" else 0


def _reading(shapes: Shapes) -> int:
    """What stands outside the blocks, with a copy of the head."""
    return 4 * (shapes.outer + shapes.head)


DRAWING = 48
"""Bytes for each logit of a step: as it is, random numbers and what comes of them."""


def _writing_bytes(config: DecoderConfig, shapes: Shapes, rows: int, length: int) -> int:
    """The model in bfloat16; its tables while it is read, then the cache, which is copied to grow, and the
    logits of a step with random numbers for them."""
    model = 2 * (sum(shapes.blocks) + shapes.outer)
    rows = min(rows, SAMPLE_ROWS)
    cache = sum(2 * 2 * kind.num_kv_heads * kind.head_dim for kind in config.blocks())
    table = 4 * config.vocab_size * (config.embed_size or config.hidden_size)  # XLA's CPU code copies it once
    step = table + rows * (2 * cache * length + DRAWING * config.vocab_size)
    return model + max(_reading(shapes), step)


def held_bytes(kind: DecoderConfig, settings: Settings, size: int, tokens: int) -> int:
    """Returns the bytes of the arrays that are held while the layers of a block are observed and solved.

    The residual stream in float32, before the block and inside (with the full-precision one, if upstream
    errors are compensated, and for "slim-plus" two targets too), two stages' inputs in bfloat16, and a block
    twice in float32.
    """
    beside = 2 if settings.corrects else 1
    streams = beside + (4 if settings.method == "slim-plus" else beside)
    of_token = 4 * streams * kind.hidden_size + 2 * beside * (kind.hidden_size + _widest(kind))
    return tokens * of_token + 2 * 4 * size


def _block_bytes(kind: DecoderConfig, settings: Settings, size: int, tokens: int) -> int:
    """What is held, and what the layer with most inputs takes while it is observed, or solved."""
    solving = max(_observing(tokens, _widest(kind)), HESSIANS * 4 * _widest(kind) ** 2)
    return held_bytes(kind, settings, size, tokens) + solving


HESSIANS = 8
"""Matrices ``[K, K]`` at once: two that were observed, the Hessian, its factors, and copies."""

OBSERVED = 18
"""Bytes for each input of each token in a batch that is observed: copies in bfloat16 and in float32."""


def _observing(tokens: int, channels: int) -> int:
    return OBSERVED * min(tokens, BATCH_TOKENS) * channels + 2 * 4 * channels**2


def _widest(kind: DecoderConfig) -> int:
    shapes = block_params(kind)
    return max(shapes[f"{group[0]}.weight"].shape[0] for group in linear_groups(kind))


def _ends_bytes(config: DecoderConfig, settings: Settings, shapes: Shapes, tokens: int) -> int:
    """What is read, the residual stream, the head's inputs, and as much of a table as is solved at once."""
    d, beside = config.hidden_size, 2 if settings.corrects else 1
    of_token = (4 + 2) * beside * d
    if not settings.packs_ends:
        return _reading(shapes) + tokens * 4 * beside * d
    solving = HESSIANS * 4 * d * min(CHUNK, config.vocab_size) + 2 * shapes.ends
    return _reading(shapes) + tokens * of_token + max(solving, _observing(tokens, d))


def _sweep_bytes(config: DecoderConfig, settings: Settings, shapes: Shapes, tokens: int, length: int) -> int:
    """All blocks' inputs in bfloat16, the gradient in float32; and what is read outside the blocks, with its
    copy in bfloat16 and the logits of one sample, or what a block's backward pass keeps of a batch."""
    tokens, length = (tokens, length) if settings.guide else (min(tokens, BUDGET_TOKENS), BUDGET_LENGTH)
    d = config.hidden_size
    held = tokens * (2 * (config.num_layers + 1) + 4) * d
    logits = _reading(shapes) + 2 * shapes.outer + 4 * 4 * length * config.vocab_size
    batch = min(tokens, BATCH_TOKENS)
    backward = [
        batch * 4 * (3 * _given(kind) + 3 * kind.num_heads * length) + 2 * 4 * size
        for kind, size in zip(config.blocks(), shapes.blocks)
    ]
    return held + max(logits, *backward)


def _given(kind: DecoderConfig) -> int:
    """What the layers of a block give for each token that passes."""
    shapes, count = block_params(kind), 2 * kind.hidden_size
    for group in linear_groups(kind):
        for name in group:
            share = kind.experts_per_token / kind.num_experts if ".experts." in name else 1.0
            count += math.ceil(share * shapes[f"{name}.weight"].shape[1])
    return count


def _tuning_bytes(
    config: DecoderConfig, settings: Settings, shapes: Shapes, samples: int, length: int
) -> int:
    """Packed weights, stacked too; what is learned of their scales in float32 five times (as it is, the best,
    two moments, the gradient); of one step's samples what every product gives; the logits of one sample four
    times; the full-precision model's embedding and head in bfloat16 and, while they are read, as they are;
    and its head's inputs for all samples."""
    learned = 5 * 4 * shapes.scales
    tuned = settings.samples_to_tune(samples) or samples
    step = 4 * settings.tune_batch_size * length * sum(map(_given, config.blocks()))
    logits = 4 * 4 * length * config.vocab_size
    targets = 2 * 2 * tuned * length * config.hidden_size
    packed = 2 * shapes.packed + shapes.ends
    return packed + 2 * shapes.outer + targets + max(_reading(shapes), learned + step + logits)


def available() -> int | None:
    """Returns the bytes that this process may still take, of the first device's memory; None if unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        told = device.memory_stats() or {}
        return told["bytes_limit"] - told.get("bytes_in_use", 0) if "bytes_limit" in told else None
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def peak_bytes() -> int:
    """Returns the most memory that this process, or the first accelerator, has held at once; 0 if unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
