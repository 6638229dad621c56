"""Perplexity over non-overlapping windows, as GPTQ's authors and everyone after them measure it."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from slim_jax.model.decoder import Block, Decoder, embed, sequence_positions
from slim_jax.model.params import make_outer, split_params
from slim_jax.model.step import most_rows, with_rows
from slim_jax.model.windows import select_windows

LOGIT_TOKENS = 256
"""Tokens whose logits are in memory at once."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """``exp`` of the mean loss per token; ``tokens`` is what the windows hold."""

    perplexity: float
    tokens: int
    windows: int


@partial(jax.jit, donate_argnames="h")
def _forward(block: Block, h: jax.Array) -> jax.Array:
    return block(h, sequence_positions(h))[0]


@jax.jit
def _loss(outer: Decoder, h: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean loss of the window ``tokens[1, T]``; logits are made for a part of it at a time."""

    def token_losses(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        h, targets = part
        logits = outer.logits(h)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - chosen

    seen, targets = h[0, :-1], tokens[0, 1:]
    parts, even = len(seen) // LOGIT_TOKENS, len(seen) // LOGIT_TOKENS * LOGIT_TOKENS
    # Parts of whole rows, not a map of tokens: a product knows how many rows it has.
    in_parts = [a[:even].reshape(parts, LOGIT_TOKENS, *a.shape[1:]) for a in (seen, targets)]
    losses = lax.map(token_losses, tuple(in_parts)).reshape(-1)
    return jnp.mean(jnp.concatenate([losses, token_losses((seen[even:], targets[even:]))]))


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
    outer = make_outer(model.config, params)
    rows, losses = most_rows(list(model.blocks)), list[float]()
    for row in windows:
        batch = jnp.asarray(row, jnp.int32)[None]
        h = embed(outer, batch)
        for block in model.blocks:
            h = _forward(with_rows(block, rows), h)
        losses.append(float(_loss(outer, h, batch)))
        if on_window is not None:
            on_window(len(losses), len(windows), math.exp(min(np.mean(losses), 700.0)))
    return Perplexity(math.exp(min(float(np.mean(losses)), 700.0)), windows.size, len(windows))
