"""The MLP of a block, and mixtures of experts, each an MLP for the tokens that are routed to it.

Experts are separate modules, as they are calibrated and stored. For generation, packed experts are merged
into one (`slim_jax.infer.fuse`): the compiled program then does not grow with their number, and a token
passes only through its own experts.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import Prepared
from pallas_kernels.mlp import few_launches
from pallas_kernels.ragged import by_turns, rows_of_turn
from slim_jax.model.config import DecoderConfig
from slim_jax.model.linear import Linear, outputs, plus_output, prepared_alone

FEW_TOKENS = 8
"""Number of tokens up to which a chunk of stacked experts has no more rows than an expert has on average."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


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
        gate, up = outputs(x, self.gate, self.up)
        if self.limit is not None:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit) + 1
        return activate(gate) * up

    def later(self, x: Float[Array, "... d"]) -> "Later | None":
        """Returns :meth:`hidden`, to be computed together with ``down``; None if no back end does that."""
        gate, down = prepared_alone(self.gate), prepared_alone(self.down)
        if gate is None or down is None or self.up.bias is not None or self.limit is not None:
            return None
        run = few_launches(x, gate, down, self.activation)
        return None if run is None else Later(self, x, run)


@dataclasses.dataclass(frozen=True)
class Later:
    """Input of an MLP's last product, not yet computed: ``run`` computes it from ``x``, and the product."""

    mlp: MLP
    x: jax.Array
    run: Callable[[jax.Array, jax.Array | None], jax.Array]

    def plus_output(self, h: jax.Array | None) -> jax.Array:
        """Returns the MLP's output, added to ``h`` if that is given."""

        def by_xla(x: jax.Array, h: jax.Array | None) -> jax.Array:
            return plus_output(h, self.mlp.hidden(x), self.mlp.down)

        return lax.platform_dependent(self.x, h, cuda=self.run, default=by_xla)


class MoE(nnx.Module):
    """A mixture of experts: each token passes through the few MLPs that a router chooses for it.

    Each expert processes the tokens routed to it in chunks, one after another. A token thus passes through
    ``experts_per_token`` experts, and padding adds less than one chunk per expert.

    Attributes:
      shared: an expert that all tokens pass through; None if there is none.
      shared_gate: gives the gate of that expert's output; None if it has none.
      by_turns: if False, there are no chunks: every expert that any token chose processes all tokens, each in
        its place.
      stacked: all experts merged, with packed weights on a leading axis, or prepared from all blocks of a
        scan segment; ``experts`` is empty then.
      axis: mesh axis over which the experts' hidden channels are split, in a program that runs on each device
        with its own part.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.router = Linear(config.hidden_size, config.num_experts, bias=config.router_bias, rngs=rngs)
        self.experts = nnx.List([MLP(config, rngs=rngs) for _ in range(config.num_experts)])
        self.top_k, self.norm_topk = config.experts_per_token, config.norm_topk
        size, gated = config.shared_expert_size, config.shared_expert_gate
        self.shared = MLP(config, size=size, rngs=rngs) if size else None
        self.shared_gate = Linear(config.hidden_size, 1, bias=False, rngs=rngs) if gated else None
        self.by_turns = True
        self.stacked: MLP | None = nnx.data(None)
        self.axis: str | None = None

    def route(self, x: Float[Array, "b t d"]) -> Float[Array, "b t e"]:
        """Returns the weight of every expert for every token, 0 for experts that the token does not use."""
        probabilities = jax.nn.softmax(self.router(x))
        weights, chosen = jax.lax.top_k(probabilities, self.top_k)
        if self.norm_topk:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        one_hot = jax.nn.one_hot(chosen, probabilities.shape[-1])  # [b, t, k, e]
        return jnp.sum(weights[..., None] * one_hot, axis=-2)

    def shared_output(self, x: Float[Array, "b t d"], hidden: Float[Array, "b t i"]) -> Float[Array, "b t d"]:
        """Returns the output of the shared expert; ``hidden`` is the input of its last layer."""
        assert self.shared is not None
        y = self.shared.down(hidden)
        return y if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * y

    def mix(self, x: Float[Array, "b t d"], routes: Float[Array, "b t e"]) -> Float[Array, "b t d"]:
        """Returns the sum of the experts' outputs, weighted by :meth:`route`."""
        y = self._mix(x, routes) if self.stacked is None else self._mix_stacked(self.stacked, x, routes)
        return y if self.axis is None else lax.psum(y, self.axis)

    def _mix(self, x: jax.Array, routes: jax.Array) -> jax.Array:
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

    def _mix_stacked(self, experts: MLP, x: jax.Array, routes: jax.Array) -> jax.Array:
        """Computes :meth:`mix` in chunks of (token, expert) pairs, sorted by expert."""
        rows, (count, number) = x.reshape(-1, x.shape[-1]), (x.shape[0] * x.shape[1], routes.shape[-1])
        weights, chosen = lax.top_k(routes.reshape(count, number), self.top_k)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        token, sizes = order // self.top_k, jnp.bincount(chosen.reshape(-1), length=number)

        def product(some: jax.Array, index: jax.Array) -> jax.Array:
            expert = _one_of(experts, index, number)
            return expert.down(expert.hidden(some))

        # An expert has at most ``count`` tokens.
        fair = max(1, len(order) // number) if count <= FEW_TOKENS else rows_of_turn(len(order), number)
        y = by_turns(product, x.shape[-1], min(fair, count), rows[token], sizes)
        y = y * weights.reshape(-1)[order][:, None]
        return jnp.zeros_like(rows).at[token].add(y).reshape(x.shape)

    def _at_once(self, tokens: int) -> int:
        """Returns the tokens that an expert processes per chunk: half of an equal share, within limits."""
        return min(tokens, rows_of_turn(tokens * self.top_k, len(self.experts)))


def _add_if_chosen(
    y: jax.Array, expert: MLP, x: jax.Array, weight: jax.Array, rows: jax.Array | None = None
) -> jax.Array:
    """Returns ``y[rows] += weight * expert(x)``, or ``y`` where no token of ``x`` has chosen the expert."""

    def add(y: jax.Array) -> jax.Array:
        part = weight[..., None] * expert.down(expert.hidden(x))
        return y + part if rows is None else y.at[rows].add(part, mode="drop")

    return jax.lax.cond(jnp.any(weight > 0), add, lambda y: y, y)


def _one_of(stacked: MLP, index: jax.Array, number: int) -> MLP:
    """Returns one of ``number`` stacked experts."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Prepared):
            return lax.dynamic_index_in_dim(leaf, index, keepdims=False)
        return leaf.at(index if leaf.layer is None else leaf.layer * number + index)

    return jax.tree.map(one, stacked, is_leaf=lambda value: isinstance(value, Prepared))
