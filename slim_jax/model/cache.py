"""State of a batch: what each layer keeps of the tokens it has read, and that of all layers."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import attention, by_kernel
from slim_jax.model.config import DecoderConfig
from slim_jax.model.rotary import Rotation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """Rows ``[..., d]`` in 8 bits, each with its own scale: ``codes * scale``.

    A key or value of 128 numbers takes 132 bytes, instead of 256 in bfloat16.

    Attributes:
      codes: ``int8[..., d]``.
      scale: ``float32[..., 1]``.
    """

    codes: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, rows: jax.Array) -> "Int8Rows":
        """Rounds rows to the nearest codes; the largest number of a row is exact."""
        rows = rows.astype(jnp.float32)
        scale = jnp.max(jnp.abs(rows), axis=-1, keepdims=True) / 127
        codes = jnp.round(rows / jnp.where(scale > 0, scale, 1))
        return cls(codes.astype(jnp.int8), scale)

    def decode(self) -> jax.Array:
        """Returns the rows in float32."""
        return self.codes.astype(jnp.float32) * self.scale


Rows = jax.Array | Int8Rows
"""Keys or values."""


def of_layer[T](arrays: T, layer: jax.Array | None) -> T:
    """Returns one layer's part of arrays with a leading axis of layers; all of them if ``layer`` is None."""
    if layer is None:
        return arrays
    one = partial(lax.dynamic_index_in_dim, index=layer, keepdims=False, allow_negative_indices=False)
    return jax.tree.map(one, arrays)  # type: ignore[no-any-return]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys and values of the tokens that a layer has seen, and the slot of the next ones.

    Attributes:
      keys: ``[B, num_kv_heads, S, head_dim]``, or ``[L, B, ...]`` for all layers.
      values: values, in the same shape.
      positions: ``int32[B, S]``, position of the token in each slot, including tokens about to be written; -1
        in empty slots.
      start: ``int32[]``, the slot of the next token.
      layer: ``int32[]``, index of this layer; None if there is only one.
      one_device: if True, all arrays are on one device, and kernels may be used where the target has them.
    """

    keys: Rows
    values: Rows
    positions: jax.Array
    start: jax.Array
    layer: jax.Array | None = None
    one_device: bool = dataclasses.field(default=False, metadata={"static": True})

    def write(self, k: jax.Array, v: jax.Array) -> "KeyValues":
        """Returns the cache with the next tokens' rows, ``[B, num_kv_heads, T, head_dim]``, written.

        Nothing else is written.
        """

        def put(a: jax.Array, new: jax.Array) -> jax.Array:
            new = new.astype(a.dtype)
            if self.layer is None:
                return lax.dynamic_update_slice(a, new, (0, 0, self.start, 0))
            place = (self.layer, 0, 0, self.start, 0)
            return lax.dynamic_update_slice(a, new[None], place, allow_negative_indices=False)

        def put_rows(all_rows: Rows, new: jax.Array) -> Rows:
            encoded = Int8Rows.of(new) if isinstance(all_rows, Int8Rows) else new
            return jax.tree.map(put, all_rows, encoded)

        def by_xla(keys: Rows, values: Rows, k: jax.Array, v: jax.Array, *at: jax.Array):
            return put_rows(keys, k), put_rows(values, v)

        rows = self.keys, self.values, k, v
        if self._by_kernel and self.layer is not None and k.shape[2] == 1:
            keys, values = by_kernel("write_token", by_xla, *rows, self.layer, self.start)
        else:
            keys, values = by_xla(*rows)
        return dataclasses.replace(self, keys=keys, values=values)

    @property
    def _by_kernel(self) -> bool:
        """True if a kernel may read and write the arrays, where there is one."""
        return self.one_device and not isinstance(self.keys, Int8Rows)

    def attend(
        self,
        q: Float[Array, "b t h d"],
        k: Float[Array, "b t kv d"],
        v: Float[Array, "b t kv d"],
        positions: Int[Array, "b t"],
        *,
        rotation: Rotation | None,
        scale: float,
        window: int | jax.Array | None,
        softcap: float | None,
        sinks: Float[Array, " h"] | None = None,
    ) -> tuple[Float[Array, "b t hd"], "KeyValues"]:
        """Returns attention over the cache, which the tokens of ``q``, ``k`` and ``v`` join, and the cache.

        ``rotation`` is the rotation still to be applied to queries and keys, None if none is left; for the
        other arguments see :func:`pallas_kernels.attention`.
        """

        def by_xla(q: jax.Array, k: jax.Array, v: jax.Array, keys: Rows, values: Rows, *at: Any):
            if rotation is not None:
                q, k = rotation(q, positions), rotation(k, positions)
            cache = dataclasses.replace(self, keys=keys, values=values)
            cache = cache.write(k.swapaxes(1, 2), v.swapaxes(1, 2))
            places = positions, cache.positions
            how: Any = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
            y = attention(q, *cache.read(), *places, **how)
            return y, cache.keys, cache.values

        operands = q, k, v, self.keys, self.values
        if self._by_kernel and self.layer is None and q.shape[1] == 1 and sinks is None:
            factors = None if rotation is None else rotation.by_feature(positions[:, 0])
            seen = jnp.int32(jnp.iinfo(jnp.int32).max if window is None else window)
            at = factors, positions[:, 0], self.positions, self.start, seen
            y, keys, values = by_kernel("attend", by_xla, *operands, *at, scale=scale, softcap=softcap)
        else:
            y, keys, values = by_xla(*operands)
        return y, dataclasses.replace(self, keys=keys, values=values)

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Returns the layer's keys and values, ``[B, num_kv_heads, S, head_dim]``."""
        own = of_layer((self.keys, self.values), self.layer)
        k, v = (rows.decode() if isinstance(rows, Int8Rows) else rows for rows in own)
        return k, v


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recurrent:
    """State of linear attention or of a short convolution, whose size no number of tokens changes.

    Attributes:
      state: ``float32[B, linear_value_heads, linear_key_dim, linear_value_dim]``, or ``[L, B, ...]`` for all
        layers; empty for short convolutions.
      before: ``float32[B, conv_size - 1, features]``, inputs of the convolution from the last tokens, or
        ``[L, B, ...]``.
      layer: ``int32[]``, index of this layer; None if there is only one.
    """

    state: jax.Array
    before: jax.Array
    layer: jax.Array | None = None

    @staticmethod
    def sizes(kind: DecoderConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of ``state`` and ``before`` of one sequence."""
        heads, key, value = kind.linear_value_heads, kind.linear_key_dim, kind.linear_value_dim
        features = 2 * kind.linear_key_heads * key + heads * value
        if kind.mixer == "short_conv":
            heads, features = 0, kind.hidden_size
        return (heads, key, value), (kind.conv_size - 1, features)

    @classmethod
    def empty(cls, kind: DecoderConfig, *leading: int) -> "Recurrent":
        """Returns the state before any token; ``leading`` are the axes before those of one sequence."""
        return cls(*(jnp.zeros((*leading, *size)) for size in cls.sizes(kind)))

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Returns the layer's arrays."""
        return of_layer((self.state, self.before), self.layer)

    def write(self, state: jax.Array, before: jax.Array) -> "Recurrent":
        """Returns the cache with the layer's arrays replaced."""
        if self.layer is None:
            return Recurrent(state, before)
        put = partial(lax.dynamic_update_index_in_dim, index=self.layer, axis=0, allow_negative_indices=False)
        return Recurrent(put(self.state, state), put(self.before, before), self.layer)


Cache = KeyValues | Recurrent


def state_bytes(kind: DecoderConfig) -> int:
    """Returns the bytes that a block keeps of a sequence of any length; 0 for attention."""
    if kind.mixer == "attention":
        return 0
    return 4 * sum(map(math.prod, Recurrent.sizes(kind)))


class Run(NamedTuple):
    """A scan segment: adjacent blocks that are alike.

    Attributes:
      kind: the config of each block.
      blocks: number of blocks.
      stacked: True if the blocks are scanned over.
    """

    kind: DecoderConfig
    blocks: int
    stacked: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """State of a batch: keys and values of the tokens it has read. Slots ``>= length`` are empty.

    Attributes:
      kv: keys and values of every scan segment, each ``[L, B, num_kv_heads, S, head_dim]`` if its blocks are
        scanned over; else one such pair without ``L`` per block, each of which is updated in place. Blocks
        of linear attention have a :class:`Recurrent` in place of a pair.
      positions: ``int32[B, S]``, position of the token in each slot, -1 in slots without a token.
      length: ``int32[]``, number of slots in use.
    """

    kv: Any
    positions: jax.Array
    length: jax.Array

    @classmethod
    def empty(
        cls,
        runs: Sequence[Run],
        batch: int,
        size: int,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> "State":
        """Returns a state without tokens and with room for ``size``.

        If ``dtype`` is int8, keys and values are :class:`Int8Rows`.
        """

        def rows(kind: DecoderConfig, *leading: int) -> Rows:
            shape = (*leading, batch, kind.num_kv_heads, size)
            codes = jnp.zeros((*shape, kind.head_dim), dtype)
            if codes.dtype != jnp.int8:
                return codes
            return Int8Rows(codes, jnp.zeros((*shape, 1), jnp.float32))

        def empty(kind: DecoderConfig, *leading: int) -> Any:
            if kind.mixer != "attention":
                return Recurrent.empty(kind, *leading, batch)
            return rows(kind, *leading), rows(kind, *leading)

        kv: list[Any] = []  # Buffers are separate, because each is donated.
        for kind, blocks, stacked in runs:
            kv.append(empty(kind, blocks) if stacked else [empty(kind) for _ in range(blocks)])
        return cls(kv, jnp.full((batch, size), -1, jnp.int32), jnp.zeros((), jnp.int32))

    def grown(self, size: int) -> "State":
        """Returns the state with room for ``size`` tokens, whether its blocks are scanned over or not."""
        more = size - self.positions.shape[-1]

        def of_fixed_size(value: Any) -> bool:
            return isinstance(value, Recurrent)

        def pad(x: Any) -> Any:
            if of_fixed_size(x):
                return x
            return jnp.pad(x, [(0, more if axis == x.ndim - 2 else 0) for axis in range(x.ndim)])

        leading = ((0, 0),) * (self.positions.ndim - 1)
        positions = jnp.pad(self.positions, (*leading, (0, more)), constant_values=-1)
        kv = jax.tree.map(pad, self.kv, is_leaf=of_fixed_size)
        return State(kv, positions, self.length)
