"""Products with dense weights, by XLA."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.layout import vary_like

ROWS = 8
"""Rows of a matrix that one step of :func:`_row_times_matrix` adds up; with 16, XLA's code is far slower."""


def dense_matmul(
    x: Float[Array, "*batch k"], w: Float[Array, "a b"], *, transposed: bool = False
) -> Float[Array, "*batch n"]:
    """Returns ``x @ w``, or ``x @ w.T``, in the weight's dtype, accumulated in float32, ``float32[..., N]``.

    XLA's CPU code multiplies a single row by a bfloat16 matrix at a tenth of the speed of a float32 one.
    There the product is summed in float32 and the weight converted row by row, which takes no longer than in
    float32 and needs no float32 copy of the weight. Two or more rows are left to XLA.
    """

    def by_xla(x: jax.Array, w: jax.Array) -> jax.Array:
        product = partial(jnp.einsum, "...k,nk->...n") if transposed else jnp.dot
        return product(x.astype(w.dtype), w, preferred_element_type=jnp.float32)

    def by_rows(x: jax.Array, w: jax.Array) -> jax.Array:
        return _row_times_matrix(x.reshape(-1), w).reshape(*x.shape[:-1], w.shape[1])

    def by_sums(x: jax.Array, w: jax.Array) -> jax.Array:
        # Tied to x: else XLA would convert the whole weight once, before a loop over tokens, and read that.
        x, w = lax.optimization_barrier((x, w))
        y = jnp.sum(w.astype(jnp.float32) * x.astype(jnp.float32).reshape(1, -1), axis=1)
        return y.reshape(*x.shape[:-1], -1)

    if math.prod(x.shape[:-1]) == 1 and w.dtype == jnp.bfloat16:
        return lax.platform_dependent(x, w, cpu=by_sums if transposed else by_rows, default=by_xla)
    return by_xla(x, w)


def _row_times_matrix(x: Float[Array, " k"], w: Float[Array, "k n"]) -> Float[Array, " n"]:
    x, (k, n) = x.astype(jnp.float32), w.shape

    def add(i: jax.Array | int, y: jax.Array, count: int = ROWS) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(w, i * ROWS, count)
        factors = lax.dynamic_slice_in_dim(x, i * ROWS, count)
        for row, factor in zip(rows, factors):
            y = y + factor * row.astype(jnp.float32)
        return y

    y = vary_like(jnp.zeros(n), (x, w))
    if k >= ROWS:
        y = lax.fori_loop(0, k // ROWS, add, y)
    return add(k // ROWS, y, k % ROWS) if k % ROWS else y
