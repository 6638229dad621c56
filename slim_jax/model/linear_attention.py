"""Linear attention with the gated delta rule: a state of fixed size in place of keys and values.

Each head holds a matrix ``S [key_dim, value_dim]`` that maps keys to values. A token decays it, corrects what
it gives for the token's key, and reads it with the token's query (Gated DeltaNet, arXiv:2412.06464):

    S_t = exp(g_t) S_{t-1} + k_t u_t^T,    u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t),    y_t = S_t^T q_t

Several tokens are processed in chunks: with ``G`` the sums of ``g`` from the chunk's start and ``S`` the
state before it, the chunk's ``u`` solve the unit triangular system

    u_t + beta_t sum_{j<t} exp(G_t - G_j) (k_t . k_j) u_j = beta_t (v_t - exp(G_t) S^T k_t).

Before that, queries, keys and values pass through a causal convolution over a few tokens, each feature by
itself. All of this is in float32: errors of a state would add up.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

from pallas_kernels.layout import vary_like
from slim_jax.model.cache import Recurrent
from slim_jax.model.config import DecoderConfig
from slim_jax.model.linear import Linear
from slim_jax.model.norm import GatedNorm

CHUNK = 64
"""Tokens that are processed at once."""

_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Convolution(nnx.Module):
    """Causal convolution of each feature over ``size`` tokens, followed by SiLU if ``activated``."""

    def __init__(self, size: int, features: int, *, activated: bool = True) -> None:
        self.activated = activated
        self.weight = nnx.Param(jnp.full((size, 1, features), 1 / size))

    def __call__(
        self, x: Float[Array, "b t c"], before: Float[Array, "b s c"]
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b s c"]]:
        """Convolves the tokens ``x``, and returns the last ``size - 1`` tokens too; ``before`` are those
        before ``x``."""
        weight, time = self.weight[...].astype(jnp.float32), x.shape[1]
        every = jnp.concatenate([before, x], axis=1)
        y = sum((w[None] * every[:, i : i + time] for i, w in enumerate(weight)), jnp.zeros_like(x))
        return jax.nn.silu(y) if self.activated else y, every[:, time:]


class GatedDelta(nnx.Module):
    """Linear attention, in place of a block's attention; ``z`` gives the gate of its output.

    Attributes:
      decay: gives, with ``log_decay``, the logarithm of each value head's decay ``g``.
      beta: gives how far each value head corrects its state.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        d, heads = config.hidden_size, config.linear_value_heads
        keys, values = config.linear_key_heads * config.linear_key_dim, heads * config.linear_value_dim
        layer = partial(Linear, bias=False, rngs=rngs)
        self.q, self.k, self.v, self.z = layer(d, keys), layer(d, keys), layer(d, values), layer(d, values)
        self.decay, self.beta = Linear(d, heads, bias=True, rngs=rngs), layer(d, heads)
        self.log_decay = nnx.Param(jnp.zeros(heads))
        self.conv = Convolution(config.conv_size, 2 * keys + values)
        self.norm = GatedNorm(config.linear_value_dim, config.norm_eps)
        self.o = layer(values, d)
        self.config = config

    def attend(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"] | None = None,
        cache: Recurrent | None = None,
    ) -> tuple[Float[Array, "b t hd"], Recurrent | None]:
        """Computes linear attention up to the output projection.

        Args:
          x: the tokens, which follow those of the cache.
          positions: positions of the tokens; those of padding are -1, which leaves the state as it is. All
            tokens count without them.
          cache: state of the tokens before; None where these are the first.
        """
        config, (batch, time, _) = self.config, x.shape
        q, k, v, z = self.q(x), self.k(x), self.v(x), self.z(x)
        mixed, beta = jnp.concatenate([q, k, v], axis=-1), jax.nn.sigmoid(self.beta(x))
        rate = -jnp.exp(self.log_decay[...].astype(jnp.float32)).reshape(1, 1, -1)
        g = rate * jax.nn.softplus(self.decay(x))
        if positions is not None:
            real = (positions >= 0)[..., None]
            mixed, beta, g = (jnp.where(real, a, 0) for a in (mixed, beta, g))
        state, before = empty_state(config, x) if cache is None else cache.read()
        ends = (q.shape[-1], 2 * q.shape[-1])
        heads = config.linear_value_heads, config.linear_value_dim
        mixed, before = self.conv(mixed, before)
        q, k, v = jnp.split(mixed, ends, axis=-1)
        q, k = (_unit(a.reshape(batch, time, -1, config.linear_key_dim)) for a in (q, k))
        q = q * config.linear_key_dim**-0.5
        y, state = delta_rule(q, k, v.reshape(batch, time, *heads), g, beta, state)
        y = self.norm(y, z.reshape(batch, time, *heads)).reshape(batch, time, -1)
        return y, None if cache is None else cache.write(state, before)


def empty_state(config: DecoderConfig, x: Float[Array, "b t d"]) -> tuple[jax.Array, jax.Array]:
    """Returns the arrays of a `Recurrent` before the tokens ``x``, which vary between devices as these do."""
    state, before = Recurrent.empty(config, len(x)).read()
    return vary_like(state, x), vary_like(before, x)


def _unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def delta_rule(
    q: Float[Array, "b t kh k"],
    k: Float[Array, "b t kh k"],
    v: Float[Array, "b t h v"],
    g: Float[Array, "b t h"],
    beta: Float[Array, "b t h"],
    state: Float[Array, "b h k v"],
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Returns the outputs of the gated delta rule, and the state after the tokens.

    Args:
      q: queries; key head ``i`` serves the value heads from ``i * (h // kh)`` on.
      k: keys.
      v: values.
      g: logarithm of the decay, at most 0.
      beta: strength of the correction, 0 to 1. A token with ``g`` and ``beta`` 0 leaves the state as it is.
      state: state before the tokens.
    """
    time, repeats = v.shape[1], v.shape[2] // k.shape[2]
    by_head = [a.swapaxes(1, 2) for a in (*(jnp.repeat(a, repeats, axis=2) for a in (q, k)), v, g, beta)]
    if time == 1:
        y, state = _step(state, *(a[:, :, 0] for a in by_head))
        return y[:, None], state
    size = min(CHUNK, time)

    def cut(a: jax.Array) -> jax.Array:  # [b, h, t, ...] -> [chunks, b, h, size, ...]
        a = jnp.pad(a, [(0, -time % size if axis == 2 else 0) for axis in range(a.ndim)])
        return jnp.moveaxis(a.reshape(*a.shape[:2], -1, size, *a.shape[3:]), 2, 0)

    state, y = lax.scan(_chunk, state, tuple(map(cut, by_head)))
    y = jnp.moveaxis(y, 0, 2).reshape(*v.shape[:1], v.shape[2], -1, v.shape[3])
    return y[:, :, :time].swapaxes(1, 2), state


def _step(
    state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Processes one token, arrays ``[b, h, ...]``, by sums, which are exact on matrix units' chips too."""
    state = state * jnp.exp(g)[..., None, None]
    u = beta[..., None] * (v - jnp.sum(state * k[..., None], axis=-2))
    state = state + k[..., None] * u[..., None, :]
    return jnp.sum(state * q[..., None], axis=-2), state


def _chunk(state: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """Processes one chunk, arrays ``[b, h, tokens, ...]``; see the module's docstring."""
    q, k, v, g, beta = inputs
    total = jnp.cumsum(g, axis=-1)
    seen = jnp.tril(jnp.ones((g.shape[-1], g.shape[-1]), bool))[None, None]
    apart = total[..., :, None] - total[..., None, :]
    decay = jnp.exp(jnp.where(seen, apart, -jnp.inf))
    since, left = jnp.exp(total)[..., None], jnp.exp(total[..., -1:] - total)[..., None]
    system = beta[..., None] * decay * _einsum("bhtk,bhjk->bhtj", k, k)
    wanted = beta[..., None] * (v - since * _einsum("bhtk,bhkv->bhtv", k, state))
    u = solve_triangular(system, wanted, lower=True, unit_diagonal=True)
    y = since * _einsum("bhtk,bhkv->bhtv", q, state)
    y = y + _einsum("bhtj,bhjv->bhtv", decay * _einsum("bhtk,bhjk->bhtj", q, k), u)
    return since[:, :, -1:] * state + _einsum("bhtk,bhtv->bhkv", left * k, u), y
