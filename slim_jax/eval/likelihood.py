"""Log-probabilities of given continuations, and whether greedy decoding would produce them.

Input is token ids, output is numbers; the choice of texts is not this file's concern.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slim_jax.eval.perplexity import BATCH_TOKENS, Reader, over_parts
from slim_jax.infer.lengths import round_up
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder


class Judged(NamedTuple):
    """Evaluation of one continuation.

    Attributes:
      log_probability: log-probability of all its tokens, in nats.
      greedy: True if each of them is the most likely token.
    """

    log_probability: float
    greedy: bool


class _Row(NamedTuple):
    """Tokens to read, the start of the ones to be evaluated, and the index of their pair."""

    tokens: list[int]
    start: int
    pair: int


def judge(
    reader: Reader,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_judged: Callable[[int], None] | None = None,
) -> list[Judged]:
    """Returns the log-probability of every continuation after its context.

    Pairs of similar length are read together, padded on the right to one of the few sizes that the generator
    compiles for. A context that does not fit is truncated at its beginning.

    Args:
      reader: reader of the model.
      pairs: token ids of contexts and continuations, at least one of each.
      batch_tokens: maximum number of tokens in the rows that are read together; at least one row is read.
      on_judged: called with the number of continuations that were just evaluated.

    Returns:
      One result per pair, in order.

    Raises:
      ValueError: a context or continuation is empty, or the model has too few positions for a continuation.
    """
    rows = [_row(reader.outer.config, index, *pair) for index, pair in enumerate(pairs)]
    found: dict[int, Judged] = {}

    def width(row: _Row) -> int:
        return _width(reader.outer.config, len(row.tokens) - 1)

    # The longest first: a row that does not fit into memory fails at once.
    for size, alike in itertools.groupby(sorted(rows, key=width, reverse=True), key=width):
        for batch in itertools.batched(alike, max(1, batch_tokens // size)):
            found |= _judge_batch(reader, batch, size)
            if on_judged is not None:
                on_judged(len(batch))
    return [found[index] for index in range(len(rows))]


def _row(config: DecoderConfig, index: int, context: Sequence[int], continuation: Sequence[int]) -> _Row:
    if not len(context) or not len(continuation):
        raise ValueError(f"pair {index} has no context or no continuation, expected a token of each")
    if len(continuation) > config.max_positions:
        raise ValueError(
            f"continuation {index} has {len(continuation)} tokens, the model {config.max_positions} positions"
        )
    tokens = [*context, *continuation][-(config.max_positions + 1) :]  # the last one is not read
    return _Row(tokens, len(tokens) - len(continuation), index)


def _width(config: DecoderConfig, length: int) -> int:
    """Returns the padded length of a row, never beyond where positions end or their frequencies change."""
    edges = [config.max_positions]
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        edges.append(config.rope_scaling.original_max_positions)
    return min([round_up(length), *(edge for edge in edges if edge >= length)])


def _judge_batch(reader: Reader, rows: Sequence[_Row], width: int) -> dict[int, Judged]:
    most = max(len(row.tokens) - row.start for row in rows)
    shape = (1 << (len(rows) - 1).bit_length(), min(round_up(most), width))
    tokens = np.zeros((shape[0], width), np.int32)
    places, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for i, row in enumerate(rows):
        count = len(row.tokens) - row.start
        tokens[i, : len(row.tokens) - 1] = row.tokens[:-1]
        places[i, :count] = np.arange(row.start - 1, len(row.tokens) - 1)
        targets[i, :count] = row.tokens[row.start :]
    log_p, greedy = map(
        np.asarray, _judge_tokens(reader.outer, reader.read(jnp.asarray(tokens)), places, targets)
    )
    counts = [len(row.tokens) - row.start for row in rows]
    return {
        row.pair: Judged(float(log_p[i, :count].sum(dtype=np.float64)), bool(greedy[i, :count].all()))
        for i, (row, count) in enumerate(zip(rows, counts))
    }


@jax.jit
def _judge_tokens(
    outer: Decoder, h: jax.Array, places: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities of ``targets[B, C]`` after ``places[B, C]`` of ``h[B, T, d]``.

    Also returns, for each target, True if it is the most likely token.
    """

    def of_part(part: dict[str, jax.Array]) -> dict[str, jax.Array]:
        logits = outer.logits(part["h"])
        chosen = jnp.take_along_axis(logits, part["targets"][:, None], axis=1)[:, 0]
        return {
            "log_p": chosen - jax.nn.logsumexp(logits, axis=1),
            "greedy": jnp.argmax(logits, axis=1) == part["targets"],
        }

    at = jnp.take_along_axis(h, places[:, :, None], axis=1)
    found = over_parts(of_part, {"h": at.reshape(-1, h.shape[-1]), "targets": targets.reshape(-1)})
    return found["log_p"].reshape(targets.shape), found["greedy"].reshape(targets.shape)
