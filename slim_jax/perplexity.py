"""Perplexity over non-overlapping windows, as GPTQ's authors and everyone after them measure it."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from slim_jax.decoder import Block, Decoder, make_decoder, split_params


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """``exp`` of the mean loss per token; ``tokens`` is what the windows hold."""

    perplexity: float
    tokens: int
    windows: int


def select_windows(tokens: np.ndarray, window: int, max_windows: int | None = None) -> np.ndarray:
    """Windows ``[W, window]`` of a text, the rest dropped; of ``total``, every ``ceil(total / max)``-th.

    Raises:
      ValueError: the text is shorter than one window, or a number is too small.
    """
    if window < 2 or (max_windows is not None and max_windows < 1):
        raise ValueError(f"window is {window} and max_windows {max_windows}, expected at least 2 and 1")
    total = len(tokens) // window
    if not total:
        raise ValueError(f"the text has {len(tokens)} tokens, expected at least one window of {window}")
    step = 1 if max_windows is None else math.ceil(total / max_windows)
    return np.asarray(tokens[: total * window]).reshape(total, window)[::step]


@jax.jit
def _embed(outer: Decoder, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    return outer.embed_tokens(tokens, positions)


@jax.jit
def _forward(block: Block, h: jax.Array, positions: jax.Array) -> jax.Array:
    return block(h, positions)[0]


@jax.jit
def _loss(outer: Decoder, h: jax.Array, tokens: jax.Array) -> jax.Array:
    logits = outer.logits(h[:, :-1])
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def perplexity(
    model: Decoder,
    tokens: np.ndarray,
    window: int = 2048,
    max_windows: int | None = None,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Perplexity of a model, dense or packed, on a text ``int[T]``.

    One block at a time is compiled and run, so a model of many blocks costs one compilation.

    Args:
      model: the decoder.
      tokens: the text.
      window: tokens per window; each is judged on its own, the first token unpredicted.
      max_windows: at most this many windows, evenly spread.
      on_window: called with windows done, windows in all, and the perplexity so far.

    Raises:
      ValueError: see :func:`select_windows`; or the window exceeds the model's positions.
    """
    if window > model.config.max_positions:
        raise ValueError(f"window is {window}, the model takes at most {model.config.max_positions} tokens")
    windows = select_windows(tokens, window, max_windows)
    params, _ = split_params(model)
    outer = make_decoder(dataclasses.replace(model.config, num_layers=0), params, [])
    positions = jnp.arange(window, dtype=jnp.int32)[None]
    losses: list[float] = []
    for row in windows:
        batch = jnp.asarray(row, jnp.int32)[None]
        h = _embed(outer, batch, positions)
        for block in model.blocks:
            h = _forward(block, h, positions)
        losses.append(float(_loss(outer, h, batch)))
        if on_window is not None:
            on_window(len(losses), len(windows), math.exp(min(np.mean(losses), 700.0)))
    return Perplexity(math.exp(min(float(np.mean(losses)), 700.0)), windows.size, len(windows))
