"""Reads a few columns of a packed table in place on a TPU.

XLA can read single columns as well, but if the table fits into VMEM, XLA first copies all of it there, for
every token.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, UInt32

from pallas_kernels.tpu.config import LANES

MOST = 8
"""Most columns for which reading 128 for each is less than reading all columns."""


def columns_of(
    words: UInt32[Array, "R n"], index: Int[Array, " c"], *, interpret: bool = False
) -> UInt32[Array, "R c"]:
    """``words[:, index]``.

    Args:
      words: words of a table; ``n`` is a multiple of 128.
      index: indices of a few columns.
      interpret: as in ``pl.pallas_call``.
    """
    rows, count = words.shape[0], index.shape[0]
    if not interpret:
        words = pltpu.with_memory_space_constraint(words, pltpu.HBM)
    strips = pl.pallas_call(
        _kernel,
        name="columns_of",
        out_shape=jax.ShapeDtypeStruct((count, rows, LANES), words.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(count,),
            in_specs=[pl.BlockSpec((rows, LANES), lambda i, index: (0, index[i] // LANES))],
            out_specs=pl.BlockSpec((1, rows, LANES), lambda i, index: (i, 0, 0)),
        ),
        interpret=interpret,
    )(index.astype(jnp.int32), words)
    lane = lax.broadcasted_iota(jnp.int32, (1, 1, LANES), 2)
    mine = lane == (index % LANES)[:, None, None]
    return jnp.sum(jnp.where(mine, strips, 0), axis=2, dtype=words.dtype).T


def _kernel(index, strip, out) -> None:  # type: ignore[no-untyped-def]
    del index
    out[0] = strip[...]
