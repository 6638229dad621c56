"""The generation loop, which runs on the device: prefill of a prompt, then several decode steps a dispatch.

Every function takes a generator's weights as a structure and a flat list of leaves, and is shared by all
generators, so that a second one of the same shapes compiles nothing. With tensor parallelism
(`slim_jax.infer.tensor_parallel`), the whole loop runs on each device, with its own part of weights and
state.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from slim_jax.infer.forward import forward
from slim_jax.infer.sampling import Choice, sample
from slim_jax.infer.tensor_parallel import AXIS
from slim_jax.model.cache import State

CHUNK = 16
"""Maximum number of tokens per row that one dispatch writes."""


class Structure(NamedTuple):
    """Layout of the weights; static.

    Attributes:
      tree: tree structure of the leaves.
      mesh: mesh whose devices each have a part of every leaf, on a leading axis; None on one device.
    """

    tree: Any
    mesh: Mesh | None


class Tokens(NamedTuple):
    """Progress of a batch between two dispatches.

    Attributes:
      last: ``int32[B]``, the token of each row that has not been read yet.
      positions: ``int32[B]``, its position.
      ended: ``bool[B]``, rows that have chosen a stop token.
    """

    last: jax.Array
    positions: jax.Array
    ended: jax.Array


Carry = tuple[jax.Array, jax.Array, Tokens, State, Choice]


def _on_each_device(*gives: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Runs ``function(tree, leaves, state, *rest)`` on every device of a :class:`Structure`'s mesh.

    Each device has its own leaves and state, and the same other arguments; ``gives`` has one value per
    result, True if it is a state.
    """
    specs = tuple(P(AXIS) if is_state else P() for is_state in gives)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(structure: Structure, leaves: Any, state: Any, *rest: Any, **static: Any) -> Any:
            if structure.mesh is None:
                return function(structure.tree, leaves, state, *rest, **static)

            def local(leaves: Any, state: Any, rest: Any) -> Any:
                own = jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), (leaves, state))
                found = function(structure.tree, *own, *rest, **static)
                results = found if len(gives) > 1 else (found,)
                return tuple(
                    jax.tree.map(lambda leaf: leaf[None], result) if is_state else result
                    for result, is_state in zip(results, gives, strict=True)
                )

            found = jax.shard_map(
                local,
                mesh=structure.mesh,
                in_specs=(P(AXIS), P(AXIS), P()),
                out_specs=specs,
                check_vma=False,
            )(leaves, state, rest)
            return found if len(gives) > 1 else found[0]

        return run

    return decorate


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@_on_each_device(False, True, False)
def read(
    tree: Any,
    leaves: list[jax.Array],
    state: State,
    tokens: jax.Array,
    positions: jax.Array,
    choice: Choice,
) -> tuple[jax.Array, State, Choice]:
    """Reads ``tokens[B, T]`` and chooses the next token of each row, ``int32[B]``."""
    outer, runs = jax.tree.unflatten(tree, leaves)
    logits, state = forward(outer, runs, state, tokens, positions)
    choice = choice.reads(tokens, positions)
    return choice.next(logits, state.length), state, choice


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@_on_each_device(False, False, True, False)
def write(
    tree: Any,
    leaves: list[jax.Array],
    state: State,
    at: Tokens,
    choice: Choice,
    stops: jax.Array,
    steps: jax.Array,
) -> tuple[jax.Array, jax.Array, State, Choice]:
    """Writes up to ``steps`` tokens per row, fewer if every row ends earlier.

    Args:
      tree: structure of the model's weights.
      leaves: leaves of the model's weights.
      state: state of the batch before ``at.last`` is read.
      at: progress of the batch.
      choice: sampling settings and state.
      stops: ``int32[n]``, tokens that end a row.
      steps: ``int32[]``, at most :data:`CHUNK`.

    Returns:
      The tokens ``int32[CHUNK, B]``, how many of their rows were written, and state and choice after all
      written tokens but the last.
    """
    outer, runs = jax.tree.unflatten(tree, leaves)

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
@_on_each_device(False)
def next_logits(tree: Any, leaves: list[jax.Array], state: State, tokens: jax.Array) -> jax.Array:
    """Returns logits after ``tokens[B, 1]`` at position 0; the state is not changed."""
    outer, runs = jax.tree.unflatten(tree, leaves)
    return forward(outer, runs, state, tokens, jnp.zeros_like(tokens))[0]


@partial(jax.jit, static_argnums=0, donate_argnums=2, static_argnames="steps")
@_on_each_device(False, False, True)
def write_text(
    tree: Any, leaves: list[jax.Array], state: State, token: jax.Array, key: jax.Array, *, steps: int
) -> tuple[jax.Array, jax.Array, State]:
    """Writes ``steps`` tokens per row at temperature 1.

    Returns the last tokens ``[B]``, all tokens ``[steps, B]`` and the state.
    """
    outer, runs = jax.tree.unflatten(tree, leaves)

    def step(carry: tuple[jax.Array, State], _: None) -> tuple[tuple[jax.Array, State], jax.Array]:
        token, state = carry
        positions = jnp.broadcast_to(state.length, (token.shape[0], 1))
        step_key = jax.random.fold_in(key, state.length.astype(jnp.uint32))
        logits, state = forward(outer, runs, state, token[:, None], positions)
        token = sample(logits, step_key)
        return (token, state), token

    (token, state), tokens = lax.scan(step, (token, state), None, length=steps)
    return token, tokens, state
