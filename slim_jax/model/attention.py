"""Causal attention over grouped key-value heads.

On accelerators it is `jax.nn.dot_product_attention` for several tokens. On CPUs that function writes all
scores of all heads to memory several times; here one key-value head at a time keeps them in cache, which is
three to five times faster (2 x86-64 cores, 512 tokens prefilled or 64 rows decoded). On NVIDIA GPUs one new
token against the cache is one launch (`pallas_kernels.gpu.attend`).
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import devices
from slim_jax.model.cache import Int8Rows, KeyValues
from slim_jax.model.rotary import Rotation

QUERIES = 128
"""Queries that are scored at once; their later keys are never touched."""


def attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b kv s d"],
    v: Float[Array, "b kv s d"],
    positions: Int[Array, "b t"],
    key_positions: Int[Array, "b s"],
    *,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
) -> Float[Array, "b t hd"]:
    """``softmax(scale * q k^T) v`` over the keys at or before each query's position.

    Args:
      q: queries; head ``i`` reads key-value head ``i // (h // kv)``.
      k: keys. Where there are as many as queries, they belong to the same tokens, in ascending order
        of position.
      v: values.
      positions: of the queries; -1 for padding, whose output means nothing.
      key_positions: of the keys; -1 for empty slots, which are not read.
      scale: of the scores.
      window: a query sees this many positions, its own included; all by default.
      softcap: scores ``s`` become ``softcap * tanh(s / softcap)``.
    """
    mask = _visible(positions, key_positions, window)
    on_cpu = devices.of_target().platform == "cpu"
    # JAX's function knows no soft cap, and wants axes in another order, for which XLA would turn round all of
    # a cache for one token.
    if not on_cpu and softcap is None and q.shape[1] > 1:
        k, v = (a.swapaxes(1, 2).astype(q.dtype) for a in (k, v))
        y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale)
        return y.reshape(*q.shape[:2], -1)
    b, t, h, d = q.shape
    heads = q.reshape(b, t, k.shape[1], -1, d).transpose(0, 2, 3, 1, 4)  # [b, kv, h / kv, t, d]
    attend = partial(_attend, scale=scale, softcap=softcap, dtype=q.dtype if on_cpu else k.dtype)
    if t == 1 or not on_cpu:
        y = attend(heads, k, v, mask[:, None, None])
    else:
        y = _head_by_head(attend, heads, k, v, mask)
    return y.transpose(0, 3, 1, 2, 4).reshape(b, t, h * d)


def attend_cached(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t kv d"],
    v: Float[Array, "b t kv d"],
    positions: Int[Array, "b t"],
    cache: KeyValues,
    *,
    rotation: Rotation | None,
    scale: float,
    window: int | Int[Array, ""] | None = None,
    softcap: float | None = None,
    one_device: bool = False,
) -> tuple[Float[Array, "b t hd"], KeyValues]:
    """:func:`attention` over the cache that the tokens of ``q``, ``k`` and ``v`` join, and that cache.

    ``rotation`` is still to be done to queries and keys, if to any. ``one_device``: whether all lies on one:
    then kernels may take it where the target has them.
    """

    def by_xla(q: jax.Array, k: jax.Array, v: jax.Array, cache: KeyValues) -> tuple[jax.Array, KeyValues]:
        if rotation is not None:
            q, k = rotation(q, positions), rotation(k, positions)
        cache = cache.write(k.swapaxes(1, 2), v.swapaxes(1, 2), one_device=one_device)
        keys, values = cache.read()
        places = positions, cache.positions
        return attention(q, keys, values, *places, scale=scale, window=window, softcap=softcap), cache

    if not one_device or q.shape[1] > 1 or cache.layer is not None or isinstance(cache.keys, Int8Rows):
        return by_xla(q, k, v, cache)
    from pallas_kernels.gpu import attend  # takes a second that CPUs need not spend

    device, (batch, heads, slots, width) = devices.of_target(), cache.keys.shape
    if not attend.supported(device, width, cache.keys.dtype):
        return by_xla(q, k, v, cache)

    def by_kernel(q: jax.Array, k: jax.Array, v: jax.Array, cache: KeyValues) -> tuple[jax.Array, KeyValues]:
        assert isinstance(cache.keys, jax.Array)
        assert isinstance(cache.values, jax.Array)
        # As one product gave them, which XLA sees if they are put together as they were cut.
        token = jnp.concatenate([a.reshape(batch, 1, -1) for a in (q, k, v)], axis=2)
        y, keys, values = attend.attend(
            token[:, 0],
            None if rotation is None else rotation.by_feature(positions[:, 0]),
            *(cache.keys, cache.values, positions[:, 0], cache.positions, cache.start),
            jnp.int32(jnp.iinfo(jnp.int32).max if window is None else window),
            scores=attend.Scores(scale, softcap),
            parts=attend.parts_of(device, batch * heads, slots),
        )
        return y[:, None], dataclasses.replace(cache, keys=keys, values=values)

    return lax.platform_dependent(q, k, v, cache, cuda=by_kernel, default=by_xla)


def _visible(positions: jax.Array, key_positions: jax.Array, window: int | jax.Array | None) -> jax.Array:
    """Which keys each query sees, ``bool[B, T, S]``."""
    distance = positions[:, :, None] - key_positions[:, None, :]
    mask = (distance >= 0) & (key_positions >= 0)[:, None, :]
    return mask if window is None else mask & (distance < window)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    dtype: jnp.dtype,
) -> jax.Array:
    """Queries ``[..., r, t, d]`` against the keys ``[..., s, d]`` of their head, products in ``dtype``."""

    def product(terms: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(terms, *(a.astype(dtype) for a in operands), preferred_element_type=jnp.float32)

    scores = product("...rtd,...sd->...rts", q, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    y = product("...rts,...sd->...rtd", weights, v)
    return y / jnp.sum(weights, axis=-1, keepdims=True)


def _head_by_head(
    attend: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """``[b, kv, r, t, d]``: a loop over samples and key-value heads, and in it over runs of queries."""
    t, s = mask.shape[1:]
    visible = [min(start + QUERIES, t) if t == s else s for start in range(0, t, QUERIES)]

    def head(one: tuple[jax.Array, jax.Array, jax.Array], mask: jax.Array) -> jax.Array:
        q, k, v = one
        runs = [slice(start, min(start + QUERIES, t)) for start in range(0, t, QUERIES)]
        parts = [attend(q[:, run], k[:n], v[:n], mask[None, run, :n]) for run, n in zip(runs, visible)]
        return jnp.concatenate(parts, axis=1)

    def sample(one: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        *heads, mask = one
        return lax.map(lambda head_of: head(head_of, mask), tuple(heads))

    return lax.map(sample, (q, k, v, mask))
