"""Peak memory of a quantization, predicted from the config alone or measured, and the memory available.

A run goes through phases (the model writes calibration text, the gradient sweep, blocks, embedding and LM
head, fine-tuning), and each phase frees its memory at the end. The bytes of a phase are its arrays, the
weights that it reads, and the temporaries of its largest program. Sources are assumed to give float32.
"""

import contextlib
import dataclasses
import functools
import math
import sys
from pathlib import Path

import jax

from slim_jax.calibrate.activations import BATCH_TOKENS
from slim_jax.calibrate.sensitivity import BUDGET_LENGTH, BUDGET_TOKENS, without_choice
from slim_jax.config import Settings
from slim_jax.infer.generate import SAMPLE_ROWS
from slim_jax.method.layer import CHUNK
from slim_jax.model.block import linear_groups
from slim_jax.model.cache import state_bytes
from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import block_params

RUNTIME, OF_TOKEN = 420 * 2**20, 1024
"""Bytes of Python, JAX, compiled programs and a tokenizer, and bytes per vocabulary token; measured."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of a model, from which the bytes of each phase are computed.

    Attributes:
      blocks: number of parameters of each block.
      outer: number of parameters outside the blocks.
      head: number of these in an untied LM head, which is transposed when it is read.
      packed: bytes of all packed layers of the blocks.
      scales: number of scales of these layers.
      embeddings: bytes of the packed embedding and LM head.
    """

    blocks: list[int]
    outer: int
    head: int
    packed: int
    scales: int
    embeddings: int


def phases(
    config: DecoderConfig,
    settings: Settings,
    shapes: Shapes,
    samples: int,
    length: int,
    written: int,
    offload: bool,
) -> dict[str, int]:
    """Returns the peak bytes of each phase of a quantization, without those of the runtime.

    Args:
      config: the decoder's config.
      settings: the quantization's settings.
      shapes: sizes of the model.
      samples: number of calibration windows.
      length: tokens per window.
      written: number of windows that the model writes itself.
      offload: if True, activations are on disk except for one batch.
    """
    tokens = BATCH_TOKENS if offload else (samples - settings.samples_to_tune(samples)) * length
    sizes = zip(config.blocks(), shapes.blocks)
    blocks = [_block_bytes(kind, settings, size, tokens) for kind, size in sizes]
    found = {"blocks": max(blocks), "embeddings": _embedding_bytes(config, settings, shapes, tokens)}
    if written:
        found["writing"] = _writing_bytes(config, shapes, written, length)
    if without_choice(config, settings) is None:
        found["sweep"] = _sweep_bytes(config, shapes, tokens)
    if settings.tune:
        found["tuning"] = _tuning_bytes(config, settings, shapes, samples, length)
    return found


def runtime_bytes(config: DecoderConfig) -> int:
    """Returns the bytes held besides the arrays, on a CPU, where both share the process's memory; else 0."""
    return RUNTIME + OF_TOKEN * config.vocab_size if jax.default_backend() == "cpu" else 0


def _reading(shapes: Shapes) -> int:
    """Bytes of the parameters outside the blocks in float32, and of a copy of the LM head."""
    return 4 * (shapes.outer + shapes.head)


DRAWING = 48
"""Bytes per logit of a step: the logit, its random numbers and the results computed from both."""


def _writing_bytes(config: DecoderConfig, shapes: Shapes, rows: int, length: int) -> int:
    """Bytes held while the model writes text: the model in bfloat16, and the larger of two amounts.

    These are the embedding and LM head while they are read; and one step's table, its cache, which is copied
    to grow, and its logits with random numbers for them.
    """
    model = 2 * (sum(shapes.blocks) + shapes.outer)
    rows = min(rows, SAMPLE_ROWS)
    attended = [kind for kind in config.blocks() if kind.mixer == "attention"]
    cache = sum(2 * 2 * kind.num_kv_heads * kind.head_dim for kind in attended)
    table = 4 * config.vocab_size * (config.embed_size or config.hidden_size)  # XLA's CPU code copies it once
    states = sum(map(state_bytes, config.blocks()))
    step = table + rows * (2 * cache * length + states + DRAWING * config.vocab_size)
    return model + max(_reading(shapes), step)


def held_bytes(kind: DecoderConfig, settings: Settings, size: int, tokens: int) -> int:
    """Returns the bytes of the arrays that are held while the layers of a block are observed and solved.

    These are the residual stream in float32, before the block and inside it (also the full-precision one if
    upstream errors are compensated, and two targets for "slim-plus"), the inputs of two stages in bfloat16,
    and the block's parameters twice in float32.
    """
    passes = 2 if settings.corrects else 1
    streams = passes + (4 if settings.method == "slim-plus" else passes)
    of_token = 4 * streams * kind.hidden_size + 2 * passes * (kind.hidden_size + _widest(kind))
    return tokens * of_token + 2 * 4 * size


def _block_bytes(kind: DecoderConfig, settings: Settings, size: int, tokens: int) -> int:
    """Sums :func:`held_bytes` and the bytes of observing or solving the layer with the most inputs."""
    solving = max(_observing(tokens, _widest(kind)), HESSIANS * 4 * _widest(kind) ** 2)
    return held_bytes(kind, settings, size, tokens) + solving


HESSIANS = 8
"""Number of ``[K, K]`` matrices held at once: two observed ones, the Hessian, its factors, and copies."""

OBSERVED = 18
"""Bytes per input channel of each token in an observed batch: copies in bfloat16 and in float32."""


def _observing(tokens: int, channels: int) -> int:
    return OBSERVED * min(tokens, BATCH_TOKENS) * channels + 2 * 4 * channels**2


@functools.cache
def _widest(kind: DecoderConfig) -> int:
    shapes = block_params(kind)
    return max(shapes[f"{group[0]}.weight"].shape[0] for group in linear_groups(kind))


def _embedding_bytes(config: DecoderConfig, settings: Settings, shapes: Shapes, tokens: int) -> int:
    """Bytes held while the embedding and LM head are solved.

    These are what is read, the residual stream, the head's inputs, and the part of a table that is solved at
    once.
    """
    d, passes = config.hidden_size, 2 if settings.corrects else 1
    of_token = (4 + 2) * passes * d
    if not settings.packs_embeddings:
        return _reading(shapes) + tokens * 4 * passes * d
    solving = HESSIANS * 4 * d * min(CHUNK, config.vocab_size) + 2 * shapes.embeddings
    return _reading(shapes) + tokens * of_token + max(solving, _observing(tokens, d))


def _sweep_bytes(config: DecoderConfig, shapes: Shapes, tokens: int) -> int:
    """Bytes held in the gradient sweep: all blocks' inputs in bfloat16, the gradient in float32, and a peak.

    The peak is the larger of two amounts: the parameters outside the blocks as they are read, their copy in
    bfloat16 and the logits of one sample; or what a block's backward pass keeps of a batch.
    """
    tokens, length = min(tokens, BUDGET_TOKENS), BUDGET_LENGTH
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
    """Number of values per token that the layers of a block output."""
    shapes, count = block_params(kind), 2 * kind.hidden_size
    for group in linear_groups(kind):
        for name in group:
            share = kind.experts_per_token / kind.num_experts if ".experts." in name else 1.0
            count += math.ceil(share * shapes[f"{name}.weight"].shape[1])
    return count


def _tuning_bytes(
    config: DecoderConfig, settings: Settings, shapes: Shapes, samples: int, length: int
) -> int:
    """Bytes held in fine-tuning.

    These are the packed weights, also stacked; the parameters learned for their scales in float32 five times
    (current, best, two moments, gradient); the output of every product for one step's samples; the logits of
    one sample four times; the full-precision model's embedding and LM head in bfloat16 and, while they are
    read, as they are; and the inputs of its head for all samples.
    """
    learned = 5 * 4 * shapes.scales
    tuned = settings.samples_to_tune(samples) or samples
    step = 4 * settings.tune_batch_size * length * sum(map(_given, config.blocks()))
    logits = 4 * 4 * length * config.vocab_size
    targets = 2 * 2 * tuned * length * config.hidden_size
    packed = 2 * shapes.packed + shapes.embeddings
    return packed + 2 * shapes.outer + targets + max(_reading(shapes), learned + step + logits)


def available() -> int | None:
    """Returns the bytes that this process may still take of the first device's memory; None if unknown."""
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
