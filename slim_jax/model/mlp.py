"""The MLP of a block, and mixtures of experts, each an MLP for the tokens that are routed to it.

Experts are separate modules, as they are calibrated and stored.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.ragged import chunk_rows
from slim_jax.model.config import DecoderConfig
from slim_jax.model.linear import Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}

SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
"""Functions that turn a router's outputs into weights."""


class MLP(nnx.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` where the family has no gate."""

    def __init__(self, config: DecoderConfig, *, size: int = 0, rngs: nnx.Rngs) -> None:
        d, inner = config.hidden_size, size or config.intermediate_size
        self.gate = Linear(d, inner, bias=config.mlp_bias, rngs=rngs) if config.gated else None
        self.up = Linear(d, inner, bias=config.mlp_bias, rngs=rngs)
        self.down = Linear(inner, d, bias=config.mlp_bias, rngs=rngs)
        self.activation, self.limit = config.activation, config.glu_limit

    def hidden(self, x: Float[Array, "... d"]) -> Float[Array, "... inner"]:
        """Returns the input of ``down``."""
        activate = ACTIVATIONS[self.activation]
        if self.gate is None:
            return activate(self.up(x))
        gate, up = self.gate(x), self.up(x)
        if self.limit is not None:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit) + 1
        return activate(gate) * up


class MoE(nnx.Module):
    """A mixture of experts: each token passes through the few MLPs that a router chooses for it.

    Each expert processes the tokens routed to it in chunks, one after another. A token thus passes through
    ``experts_per_token`` experts, and padding adds less than one chunk per expert.

    Attributes:
      shared: an expert that all tokens pass through; None if there is none.
      shared_gate: gives the gate of that expert's output; None if it has none.
      by_turns: if False, there are no chunks: every expert that any token chose processes all tokens, each in
        its place.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.router = Linear(config.hidden_size, config.num_experts, bias=config.router_bias, rngs=rngs)
        self.experts = nnx.List([MLP(config, rngs=rngs) for _ in range(config.num_experts)])
        self.score_bias = nnx.Param(jnp.zeros(config.num_experts)) if config.router_score_bias else None
        self.groups, self.top_groups = config.router_groups, config.router_top_groups
        self.scores, self.routed_scale = config.router, config.routed_scale
        self.top_k, self.norm_topk = config.experts_per_token, config.norm_topk
        size, gated = config.shared_expert_size, config.shared_expert_gate
        self.shared = MLP(config, size=size, rngs=rngs) if size else None
        self.shared_gate = Linear(config.hidden_size, 1, bias=False, rngs=rngs) if gated else None
        self.by_turns = True

    def route(self, x: Float[Array, "b t d"]) -> Float[Array, "b t e"]:
        """Returns the weight of every expert for every token, 0 for experts that the token does not use."""
        scores = SCORES[self.scores](self.router(x))
        ranked = self._ranked(scores)
        weights, chosen = jax.lax.top_k(ranked, self.top_k)
        if ranked is not scores:
            weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if self.norm_topk:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        if self.routed_scale != 1:
            weights = weights * self.routed_scale
        one_hot = jax.nn.one_hot(chosen, scores.shape[-1])  # [b, t, k, e]
        return jnp.sum(weights[..., None] * one_hot, axis=-2)

    def _ranked(self, scores: Float[Array, "b t e"]) -> Float[Array, "b t e"]:
        """Returns the numbers by which experts are chosen; ``scores`` unchanged if by these."""
        if self.score_bias is not None:
            scores = scores + self.score_bias[...].astype(jnp.float32).reshape(1, 1, -1)
        if self.groups == 1:
            return scores
        grouped = scores.reshape(*scores.shape[:2], self.groups, -1)  # [b, t, g, e / g]
        best, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
        _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), self.top_groups)
        seen = jnp.sum(jax.nn.one_hot(chosen, self.groups), axis=-2) > 0
        return jnp.where(seen[..., None], grouped, -jnp.inf).reshape(scores.shape)

    def shared_output(self, x: Float[Array, "b t d"], hidden: Float[Array, "b t i"]) -> Float[Array, "b t d"]:
        """Returns the output of the shared expert; ``hidden`` is the input of its last layer."""
        assert self.shared is not None
        y = self.shared.down(hidden)
        return y if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * y

    def mix(self, x: Float[Array, "b t d"], routes: Float[Array, "b t e"]) -> Float[Array, "b t d"]:
        """Returns the sum of the experts' outputs, weighted by :meth:`route`."""
        count = x.shape[0] * x.shape[1]
        at_once = self._at_once(count)
        y = jnp.zeros_like(x)
        if at_once == count or not self.by_turns:
            for i, expert in enumerate(self.experts):
                y = _add_if_chosen(y, expert, x, routes[..., i])
            return y
        rows, weights = x.reshape(count, -1), routes.reshape(count, -1)
        # For each expert, its own tokens come first; tokens of weight 0 fill its last chunk.
        order = jnp.argsort(weights <= 0, axis=0, stable=True)
        order = jnp.pad(order, ((0, -count % at_once), (0, 0)), constant_values=count)
        y = y.reshape(rows.shape)
        for i, expert in enumerate(self.experts):

            def add(y: jax.Array, some: jax.Array, expert: MLP = expert, i: int = i):
                weight = weights.at[some, i].get(mode="fill", fill_value=0)
                return _add_if_chosen(y, expert, rows.at[some].get(mode="clip"), weight, some), None

            y, _ = jax.lax.scan(add, y, order[:, i].reshape(-1, at_once))
        return y.reshape(x.shape)

    def _at_once(self, tokens: int) -> int:
        """Returns the tokens that an expert processes per chunk: half of an equal share, within limits."""
        return min(tokens, chunk_rows(tokens * self.top_k, len(self.experts)))


def _add_if_chosen(
    y: jax.Array, expert: MLP, x: jax.Array, weight: jax.Array, rows: jax.Array | None = None
) -> jax.Array:
    """Returns ``y[rows] += weight * expert(x)``, or ``y`` where no token of ``x`` has chosen the expert."""

    def add(y: jax.Array) -> jax.Array:
        part = weight[..., None] * expert.down(expert.hidden(x))
        return y + part if rows is None else y.at[rows].add(part, mode="drop")

    return jax.lax.cond(jnp.any(weight > 0), add, lambda y: y, y)
