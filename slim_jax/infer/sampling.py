"""Choice of the next token from logits, as pure functions of arrays, which a loop on a device may call."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings, as a caller asks for them.

    Attributes:
      temperature: 0 takes the most likely token; otherwise logits are divided by it and sampled from.
      top_k: number of most likely tokens to sample from; 0 for all.
      top_p: sampling is limited to the fewest of these whose probabilities sum to at least this.
      min_p: minimum probability of the sampled token, as a fraction of the most likely token's.
      repetition_penalty: logits of tokens that the row has seen are divided by this where positive,
        multiplied where negative; at temperature 0 too.

    Raises:
      ValueError: a setting is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or math.isinf(self.temperature):
            raise ValueError(f"temperature is {self.temperature}, expected 0 or a positive number")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k is {self.top_k}, expected a whole number, 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected a number above 0 and up to 1")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p is {self.min_p}, expected a number from 0 to below 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}, expected a positive number")

    def start(self, seed: int, batch: int, vocab_size: int) -> "Choice":
        """Returns the settings as arrays for a device, before ``batch`` rows have seen any token."""
        seen = None
        if self.repetition_penalty != 1:
            seen = jnp.zeros((batch, vocab_size), bool)
        return Choice(
            jax.random.key(seed),
            jnp.float32(self.temperature),
            jnp.int32(min(self.top_k, vocab_size)),
            jnp.float32(self.top_p),
            jnp.float32(self.min_p),
            jnp.float32(self.repetition_penalty),
            seen,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """Sampling settings on a device, and the state of sampling that changes from token to token.

    Attributes:
      key: random key of the draws.
      temperature: ``float32[]``; this and the next four as in :class:`Sampling`.
      top_k: ``int32[]``.
      top_p: ``float32[]``.
      min_p: ``float32[]``.
      repetition_penalty: ``float32[]``.
      seen: ``bool[B, vocab]``, tokens that each row has seen; None where there is no penalty.
    """

    key: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seen: jax.Array | None

    def reads(self, tokens: Int32[Array, "b t"], positions: Int32[Array, "b t"]) -> "Choice":
        """Returns the choice after rows have seen these tokens; tokens at position -1 are ignored."""
        if self.seen is None:
            return self
        rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
        column = jnp.where(positions >= 0, tokens, self.seen.shape[1])  # past the end: dropped
        return dataclasses.replace(self, seen=self.seen.at[rows, column].set(True, mode="drop"))

    def next(self, logits: Float[Array, "b vocab"], step: Int32[Array, ""]) -> Int32[Array, " b"]:
        """Chooses one token per row; each ``step`` draws differently."""
        key = jax.random.fold_in(self.key, step.astype(jnp.uint32))
        if self.seen is not None:
            logits = penalized(logits, self.seen, self.repetition_penalty)
        scaled = logits / jnp.where(self.temperature > 0, self.temperature, 1.0)
        some = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)
        # One program for all settings: only the selected branch runs, and only the last one sorts.
        return lax.switch(
            jnp.where(self.temperature > 0, jnp.where(some, 2, 1), 0),
            [
                lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
                lambda: sample(scaled, key),
                lambda: sample(filter_logits(scaled, self.top_k, self.top_p, self.min_p), key),
            ],
        )


def penalized(
    logits: Float[Array, "b vocab"], seen: Bool[Array, "b vocab"], penalty: Float[Array, ""]
) -> Float[Array, "b vocab"]:
    """Divides the logits of seen tokens by ``penalty`` where positive, multiplies them where negative."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(
    logits: Float[Array, "b vocab"], top_k: Int32[Array, ""], top_p: Float[Array, ""], min_p: Float[Array, ""]
) -> Float[Array, "b vocab"]:
    """Sets logits to -inf outside the tokens that may be drawn, see :class:`Sampling`; ties stay in."""
    descending = -jnp.sort(-logits, axis=-1)
    place = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    p = jax.nn.softmax(jnp.where((place < top_k) | (top_k == 0), descending, -jnp.inf))
    before = jnp.cumsum(p, axis=-1) - p
    # Each of the three limits keeps a prefix of the descending order, and always its first token.
    kept = ((before < top_p) | (top_p >= 1)) & (p > 0) & (p >= min_p * p[:, :1])
    last = jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), 1) - 1
    return jnp.where(logits >= jnp.take_along_axis(descending, last, axis=-1), logits, -jnp.inf)


def sample(logits: Float[Array, "b vocab"], key: jax.Array) -> Int32[Array, " b"]:
    """Samples one token per row; a row's draw depends on its place in the batch, not on the other rows."""
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(logits.shape[0], dtype=jnp.uint32))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
