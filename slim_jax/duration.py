"""Estimated time of a quantization: the operations of its large products, divided by this machine's rate.

Counted are the products of tokens with weights in each pass through the model, and of layer inputs with
themselves. The search of scales, the solver and the sampling of written tokens are entered as the number of
operations that would take the same time. Compilation, a minute or two, is not counted.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from slim_jax.calibrate.activations import BATCH_TOKENS
from slim_jax.calibrate.sensitivity import BUDGET_TOKENS, without_choice
from slim_jax.config import Settings, SlimConfig
from slim_jax.model.block import linear_groups
from slim_jax.model.config import DecoderConfig
from slim_jax.model.linear import COMPUTE_DTYPE
from slim_jax.model.params import block_params, outer_params

TUNING = 6.0
"""Operations per weight and token in a step of fine-tuning: the forward pass, and twice as many backward."""

LEARNING = 5.0
"""Operations per weight and token in an epoch of "slim-plus", from its time relative to that of the
full-precision gradient (docs/tried.md)."""

SOLVED, ROUNDED = 1.2e5, 3e4
"""Operations that take as long as to search and solve one weight: of a layer, and of the embedding or LM
head. The second is also used for layers whose scales are not searched. Measured on Qwen2.5-Coder 0.5B on a
CPU."""

DRAWN = 1.5e4
"""Operations that take as long as to sample a token that the model writes, per token of the vocabulary."""

LARGEST = 2048
"""Maximum number of rows and of columns of the matrix whose product is timed."""

REACHED = 0.75
"""Rate of a whole quantization as a fraction of the rate of one product (SmolLM2 on a CPU core)."""


def operations(
    config: DecoderConfig, settings: SlimConfig, samples: int, length: int, written: int = 0
) -> float:
    """Floating-point operations of quantizing a model on windows, ``written`` of which it writes itself."""
    settings = settings.resolved()
    tuned = settings.samples_to_tune(samples) * length
    solved = samples * length - tuned
    weights = sum(_weights(kind) for kind in config.blocks())
    attended = sum(2 * length * kind.num_heads * kind.head_dim for kind in config.blocks())
    forward = 2.0 * (weights + attended)
    head = 2.0 * config.hidden_size * config.vocab_size
    count = written * length * (forward + head + DRAWN * config.vocab_size) + _solving(config, settings)
    if settings.method != "rtn":
        count += solved * sum(_observed(kind, settings) for kind in config.blocks())
    count += solved * forward * (2 if settings.corrects or settings.method == "slim-plus" else 1)
    if settings.method == "slim-plus":
        count += solved * (forward + settings.epochs * LEARNING * (weights + attended))
    if without_choice(config, settings) is None:
        count += min(BUDGET_TOKENS, samples * length) * (4 * forward + 3 * head)
    if settings.tune:
        steps = settings.tune_epochs * (tuned or solved)
        count += steps * (TUNING * (weights + attended) + 4 * head) + tuned * forward
    return count


def _solving(config: DecoderConfig, settings: Settings) -> float:
    """Operations that do not depend on the number of tokens."""
    if settings.method == "rtn":
        return 0.0
    outer = outer_params(config)
    tables = sum(math.prod(outer[name].shape) for name in ("embed", "head.weight") if name in outer)
    layers = sum(math.prod(block_params(k)[f"{n}.weight"].shape) for k in config.blocks() for n in _linear(k))
    of_layer = SOLVED if settings.sqc == "search" else ROUNDED
    return of_layer * layers + ROUNDED * tables * settings.packs_embeddings


def _linear(kind: DecoderConfig) -> Iterator[str]:
    return itertools.chain(*linear_groups(kind))


def _weights(kind: DecoderConfig) -> float:
    """Number of weights in a block's linear layers that one token passes through."""
    shapes, count = block_params(kind), 0.0
    for name in _linear(kind):
        share = kind.experts_per_token / kind.num_experts if ".experts." in name else 1.0
        count += share * math.prod(shapes[f"{name}.weight"].shape)
    return count


def _observed(kind: DecoderConfig, settings: Settings) -> float:
    """Operations per token of summing the statistics of the inputs of a block's layers."""
    shapes, count = block_params(kind), 0.0
    for group in linear_groups(kind):
        k, n = shapes[f"{group[0]}.weight"].shape
        expert = ".experts." in group[0]
        count += 1.5 * k * k
        if settings.corrects and not expert:
            count += 2.0 * k * k + (2.0 * k * n if group[0].endswith((".o", ".down")) else 0.0)
    return count


def rate(config: DecoderConfig) -> float:
    """Operations per second that a quantization of this model reaches.

    It is derived from one product, timed in less than a second on the first device: a batch of calibration
    tokens with a matrix of the model's MLP, cut to :data:`LARGEST`.
    """
    k, n = min(config.hidden_size, LARGEST), min(config.intermediate_size, LARGEST)
    x, w = jnp.ones((BATCH_TOKENS, k), COMPUTE_DTYPE), jnp.ones((k, n), COMPUTE_DTYPE)

    @jax.jit
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.dot(x, w, preferred_element_type=jnp.float32)

    return REACHED * 2.0 * BATCH_TOKENS * k * n / least_seconds(lambda: product(x, w))


def least_seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """Shortest wall time of ``repeats`` runs in seconds, after a warm-up run."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return min(found)


def in_words(seconds: float) -> str:
    """Formats an approximate duration: ``"3 minutes"``, ``"2.5 hours"``."""
    minutes = seconds / 60
    if minutes < 1.5:
        return "a minute"
    if minutes < 90:
        return f"{minutes:.0f} minutes"
    return f"{minutes / 60:.1f} hours"
