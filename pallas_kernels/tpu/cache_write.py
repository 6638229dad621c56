"""Writes one slot of a layer's keys and values in place on a TPU.

XLA can write one slot as well, but it chooses an order of axes for the whole cache in which the heads of a
slot are adjacent, and transposes all of the cache into that order and back. A kernel takes arrays as they
are.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.tpu.config import SUBLANES


def write_slot(
    keys: Float[Array, "L b kv s d"],
    values: Float[Array, "L b kv s d"],
    k: Float[Array, "b kv 1 d"],
    v: Float[Array, "b kv 1 d"],
    layer: Int[Array, ""],
    start: Int[Array, ""],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "L b kv s d"], Float[Array, "L b kv s d"]]:
    """Writes one token's keys and values into slot ``start`` of a layer, in the arguments' own memory.

    Args:
      keys: of all layers and slots, in bfloat16 or float32.
      values: of all layers and slots.
      k: the token's keys.
      v: the token's values.
      layer: index of the layer.
      start: index of the slot.
      interpret: as in ``pl.pallas_call``.

    Returns:
      ``keys`` and ``values`` with the token's.
    """
    _, batch, heads, _, width = keys.shape
    rows = SUBLANES * 4 // keys.dtype.itemsize  # of a register, the least that can be copied

    def block(sample, layer, start):
        return layer[0], sample, 0, start[0] // rows, 0

    cached = pl.BlockSpec((1, 1, heads, rows, width), block)
    token = pl.BlockSpec((1, heads, 1, width), lambda sample, layer, start: (sample, 0, 0, 0))
    return pl.pallas_call(  # type: ignore[no-any-return]
        _kernel,
        name="write_slot",
        out_shape=[jax.typeof(keys), jax.typeof(values)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch,),
            in_specs=[cached, cached, token, token],
            out_specs=[cached, cached],
        ),
        input_output_aliases={2: 0, 3: 1},  # indices that count layer and start
        interpret=interpret,
    )(layer[None], start[None], keys, values, k, v)


def _kernel(layer, start, keys, values, k, v, new_keys, new_values):  # type: ignore[no-untyped-def]
    """Writes the block of slots that contains the new one, for all heads of a sample."""
    for old, token, new in ((keys, k, new_keys), (values, v, new_values)):
        slots = old[0, 0].astype(jnp.float32)
        row = lax.broadcasted_iota(jnp.int32, slots.shape, 1)
        own = jnp.broadcast_to(token[0].astype(jnp.float32), slots.shape)
        new[0, 0] = jnp.where(row == start[0] % slots.shape[1], own, slots).astype(new.dtype)
