"""Perplexity over non-overlapping windows, as GPTQ's authors and those after them measure it."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from slim_jax.eval.windows import select_windows
from slim_jax.infer.forward import most_rows, with_rows
from slim_jax.infer.fuse import with_experts_as_one
from slim_jax.model.block import Block, sequence_positions
from slim_jax.model.decoder import Decoder, embed
from slim_jax.model.params import make_outer, split_params

LOGIT_TOKENS = 256
"""Tokens whose logits are in memory at once."""

BATCH_TOKENS = 8192
"""Tokens of the windows that pass the blocks together: packed weights are dequantized once for all."""


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on a text: ``exp`` of the mean loss per token.

    Attributes:
      perplexity: perplexity of the model.
      tokens: number of tokens in all windows.
      windows: number of windows.
      against: perplexity of the reference model, if there is one; the next two are then known too.
      divergence: ``KL(p || q)`` in nats, mean over tokens: ``p`` of the reference model, ``q`` of this one.
      agreement: fraction of tokens after which both models find the same token most likely.
    """

    perplexity: float
    tokens: int
    windows: int
    against: float | None = None
    divergence: float | None = None
    agreement: float | None = None


@partial(jax.jit, donate_argnames="h")
def _forward(block: Block, h: jax.Array) -> jax.Array:
    return with_experts_as_one(block)(h, sequence_positions(h))[0]


@jax.jit
def _loss(
    outer: Decoder, h: jax.Array, tokens: jax.Array, other: tuple[Decoder, jax.Array] | None = None
) -> dict[str, jax.Array]:
    """Returns means over each of the windows ``tokens[B, T]``, making logits for a part of them at a time.

    ``h[B, T, d]`` is the output of the last block; ``other`` is a reference model without blocks, and the
    output of its last block.
    """

    def of_part(part: dict[str, jax.Array]) -> dict[str, jax.Array]:
        logits = outer.logits(part["h"])
        found = {"loss": _token_losses(logits, part["targets"])}
        if other is not None:
            theirs = other[0].logits(part["other"])
            log_p, log_q = jax.nn.log_softmax(theirs), jax.nn.log_softmax(logits)
            same = jnp.argmax(theirs, axis=1) == jnp.argmax(logits, axis=1)
            found["against"] = _token_losses(theirs, part["targets"])
            found["divergence"] = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)
            found["agreement"] = same.astype(jnp.float32)
        return found

    seen = {"h": h[:, :-1].reshape(-1, h.shape[-1]), "targets": tokens[:, 1:].reshape(-1)}
    if other is not None:
        seen["other"] = other[1][:, :-1].reshape(-1, other[1].shape[-1])
    found = over_parts(of_part, seen)
    return {name: values.reshape(len(tokens), -1).mean(axis=1) for name, values in found.items()}


def over_parts(
    of_part: Callable[[dict[str, jax.Array]], dict[str, jax.Array]], seen: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Applies ``of_part``, which makes logits, to :data:`LOGIT_TOKENS` rows of ``seen`` at a time."""
    count = len(next(iter(seen.values())))
    parts, even = count // LOGIT_TOKENS, count // LOGIT_TOKENS * LOGIT_TOKENS
    # Mapped over parts of several rows, not over tokens, so that each product sees its number of rows.
    in_parts = {name: a[:even].reshape(parts, LOGIT_TOKENS, *a.shape[1:]) for name, a in seen.items()}
    found, rest = lax.map(of_part, in_parts), of_part({name: a[even:] for name, a in seen.items()})
    return {name: jnp.concatenate([found[name].reshape(-1), rest[name]]) for name in found}


def _token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - chosen


class Reader:
    """A model that reads windows, one block at a time."""

    def __init__(self, model: Decoder) -> None:
        self.blocks = list(zip(model.blocks, most_rows(list(model.blocks))))
        self.outer = make_outer(model.config, split_params(model)[0])

    def read(self, tokens: jax.Array) -> jax.Array:
        """Returns the output of the last block for ``tokens[B, T]``."""
        h = embed(self.outer, tokens)
        for block, rows in self.blocks:
            h = _forward(with_rows(block, rows), h)
        return h


def perplexity(
    model: Decoder,
    tokens: np.ndarray,
    window: int = 2048,
    max_windows: int | None = None,
    on_window: Callable[[int, int, float], None] | None = None,
    *,
    against: Decoder | None = None,
    batch: int | None = None,
) -> Perplexity:
    """Measures the perplexity of a model, dense or packed, on a text ``int[T]``.

    One block at a time is compiled and run, so a model of many blocks costs one compilation.

    Args:
      model: the decoder.
      tokens: the text.
      window: tokens per window; each window is evaluated on its own, and its first token is not predicted.
      max_windows: maximum number of windows, evenly spaced over the text.
      on_window: called with the number of windows done, the number of all, and the perplexity so far.
      against: reference model of the same vocabulary to compare with, such as the full-precision one.
      batch: windows that are read together; by default as many as :data:`BATCH_TOKENS` allows.

    Raises:
      ValueError: see :func:`select_windows`; or the window exceeds a model's positions, or the vocabularies
        differ.
    """
    for decoder in (model, against):
        if decoder is not None and window > decoder.config.max_positions:
            positions = decoder.config.max_positions
            raise ValueError(f"window is {window}, the model takes at most {positions} tokens")
    if against is not None and against.config.vocab_size != model.config.vocab_size:
        sizes = f"{against.config.vocab_size} tokens, expected {model.config.vocab_size}"
        raise ValueError(f"the vocabulary of the model to compare with has {sizes}")
    windows = select_windows(tokens, window, max_windows)
    batch = min(batch or max(1, BATCH_TOKENS // window), len(windows))
    reader, other = Reader(model), None if against is None else Reader(against)
    means: dict[str, list[float]] = {}
    for start in range(0, len(windows), batch):
        rows = windows[start : start + batch]
        filled = jnp.asarray(np.resize(rows, (batch, window)), jnp.int32)  # the last batch repeats its rows
        beside = None if other is None else (other.outer, other.read(filled))
        for name, values in _loss(reader.outer, reader.read(filled), filled, beside).items():
            means.setdefault(name, []).extend(np.asarray(values, np.float64)[: len(rows)].tolist())
        for done in range(start + 1, start + len(rows) + 1):
            if on_window is None:
                break
            on_window(done, len(windows), _exp(means["loss"][:done]))
    return Perplexity(
        _exp(means["loss"]),
        windows.size,
        len(windows),
        None if other is None else _exp(means["against"]),
        None if other is None else float(np.mean(means["divergence"])),
        None if other is None else float(np.mean(means["agreement"])),
    )


def _exp(losses: list[float]) -> float:
    return math.exp(min(float(np.mean(losses)), 700.0))
