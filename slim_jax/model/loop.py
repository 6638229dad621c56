"""The loop over tokens, which runs on the device: reading a prompt, then several tokens a dispatch.

Every function takes a generator's weights as a structure and a flat list of leaves, and is shared by all
generators, so that a second one of the same shapes compiles nothing.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from slim_jax.model.cache import State
from slim_jax.model.sampling import Choice, sample
from slim_jax.model.step import forward

CHUNK = 16
"""Tokens that one dispatch writes at most."""


class Tokens(NamedTuple):
    """Where a batch stands between two dispatches.

    Attributes:
      last: ``int32[B]``, the token of each row that has not been read yet.
      positions: ``int32[B]``, its position.
      ended: ``bool[B]``, rows that have chosen a stop token.
    """

    last: jax.Array
    positions: jax.Array
    ended: jax.Array


Carry = tuple[jax.Array, jax.Array, Tokens, State, Choice]


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(
    treedef: Any,
    leaves: list[jax.Array],
    state: State,
    tokens: jax.Array,
    positions: jax.Array,
    choice: Choice,
) -> tuple[jax.Array, State, Choice]:
    """Reads ``tokens[B, T]`` and chooses the next of each row, ``int32[B]``."""
    outer, runs = jax.tree.unflatten(treedef, leaves)
    logits, state = forward(outer, runs, state, tokens, positions)
    choice = choice.reads(tokens, positions)
    return choice.next(logits, state.length), state, choice


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def write(
    treedef: Any,
    leaves: list[jax.Array],
    state: State,
    at: Tokens,
    choice: Choice,
    stops: jax.Array,
    steps: jax.Array,
) -> tuple[jax.Array, jax.Array, State, Choice]:
    """Up to ``steps`` tokens a row, fewer if every row has ended before.

    Args:
      treedef: with ``leaves``, the model.
      leaves: see ``treedef``.
      state: what has been seen, ``at.last`` excluded.
      at: where the batch stands.
      choice: how tokens are chosen.
      stops: ``int32[n]``, tokens that end a row.
      steps: ``int32[]``, at most :data:`CHUNK`.

    Returns:
      The tokens ``int32[CHUNK, B]``, how many of their rows were written, and state and choice that have
      seen all of them but the last.
    """
    outer, runs = jax.tree.unflatten(treedef, leaves)

    def more(carry: Carry) -> jax.Array:
        _, done, at, *_ = carry
        return (done < steps) & ~jnp.all(at.ended)

    def step(carry: Carry) -> Carry:
        written, done, at, state, choice = carry
        tokens, positions = at.last[:, None], at.positions[:, None]
        logits, state = forward(outer, runs, state, tokens, positions)
        choice = choice.reads(tokens, positions)
        token = choice.next(logits, state.length)
        ended = at.ended | jnp.any(token[:, None] == stops[None], axis=1)
        written = lax.dynamic_update_slice_in_dim(written, token[None], done, axis=0)
        return written, done + 1, Tokens(token, at.positions + 1, ended), state, choice

    written = jnp.zeros((CHUNK, at.last.shape[0]), jnp.int32)
    written, done, _, state, choice = lax.while_loop(more, step, (written, jnp.int32(0), at, state, choice))
    return written, done, state, choice


@partial(jax.jit, static_argnums=0)
def next_logits(treedef: Any, leaves: list[jax.Array], state: State, tokens: jax.Array) -> jax.Array:
    """Logits after ``tokens[B, 1]`` at position 0; the state is only looked at."""
    outer, runs = jax.tree.unflatten(treedef, leaves)
    return forward(outer, runs, state, tokens, jnp.zeros_like(tokens))[0]


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def write_text(
    treedef: Any, leaves: list[jax.Array], state: State, token: jax.Array, steps: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, State]:
    """``steps`` tokens a row at temperature 1: the last ``[B]``, all ``[steps, B]`` and the state."""
    outer, runs = jax.tree.unflatten(treedef, leaves)

    def step(carry: tuple[jax.Array, State], _: None) -> tuple[tuple[jax.Array, State], jax.Array]:
        token, state = carry
        positions = jnp.broadcast_to(state.length, (token.shape[0], 1))
        step_key = jax.random.fold_in(key, state.length.astype(jnp.uint32))
        logits, state = forward(outer, runs, state, token[:, None], positions)
        token = sample(logits, step_key)
        return (token, state), token

    (token, state), tokens = lax.scan(step, (token, state), None, length=steps)
    return token, tokens, state
