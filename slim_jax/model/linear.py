"""The linear layer, dense or packed: what kind of variable its weight is, and how products are taken."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pallas_kernels import MixedTensor, Prepared, mixed_matmul, sharded_matmul

COMPUTE_DTYPE = jnp.dtype(jnp.bfloat16)
"""Of calibration's products with dense weights: on CPUs too the faster one where many tokens pass at once."""

ROWS = 8
"""Rows of a matrix that one step of :func:`_row_times_matrix` adds up; with 16, XLA's code is far slower."""


class Packed(nnx.Variable):
    """A packed weight, which is no `nnx.Param`: optimizers and gradients of parameters pass it by."""


def platform() -> str:
    """Where products run: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def product_dtype() -> jnp.dtype:
    """Dtype of products with packed weights: float32 on CPUs, bfloat16 where a matrix unit takes it.

    It holds for a model that was just quantized and for one that is loaded.
    """
    return jnp.dtype(jnp.float32 if platform() == "cpu" else jnp.bfloat16)


def dense_product(x: Float[Array, "*batch k"], weight: Float[Array, "k n"]) -> Float[Array, "*batch n"]:
    """``x @ weight`` in the weight's dtype, accumulated in float32, ``float32[..., N]``.

    The product of a single row and a bfloat16 matrix is memory traffic, but XLA takes 10 to 60 times as
    long for it on CPUs as for one in float32 (`python -m bench.rows`). There it is summed in float32,
    converted a few rows at a time: that reads half the bytes of a float32 product and needs no
    float32 copy of the weight. Of two rows or more XLA's own product is no slower in bfloat16.
    """
    if _is_slow(x, weight):
        return _row_times_matrix(x.reshape(-1), weight).reshape(*x.shape[:-1], weight.shape[1])
    return jnp.dot(x.astype(weight.dtype), weight, preferred_element_type=jnp.float32)


def unembed(h: Float[Array, "*batch d"], table: Float[Array, "vocab d"]) -> Float[Array, "*batch vocab"]:
    """``h @ table.T``, otherwise as :func:`dense_product`."""
    if _is_slow(h, table):
        y = jnp.sum(table.astype(jnp.float32) * h.astype(jnp.float32).reshape(1, -1), axis=1)
        return y.reshape(*h.shape[:-1], -1)
    return jnp.einsum("...d,vd->...v", h.astype(table.dtype), table, preferred_element_type=jnp.float32)


def _is_slow(x: jax.Array, weight: jax.Array) -> bool:
    """Whether XLA's product is many times slower than it need be."""
    one_row = math.prod(x.shape[:-1]) == 1
    return one_row and weight.dtype == jnp.bfloat16 and platform() == "cpu"


def _row_times_matrix(x: Float[Array, " k"], weight: Float[Array, "k n"]) -> Float[Array, " n"]:
    x, (k, n) = x.astype(jnp.float32), weight.shape

    def add(i: jax.Array | int, y: jax.Array, count: int = ROWS) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(weight, i * ROWS, count)
        factors = lax.dynamic_slice_in_dim(x, i * ROWS, count)
        for row, factor in zip(rows, factors):
            y = y + factor * row.astype(jnp.float32)
        return y

    y = jnp.zeros(n)
    if k >= ROWS:
        y = lax.fori_loop(0, k // ROWS, add, y)
    return add(k // ROWS, y, k % ROWS) if k % ROWS else y


class Linear(nnx.Module):
    """``y = x @ weight + bias``, weight ``[K, N]`` dense or a :class:`MixedTensor`; ``y`` is float32.

    Attributes:
      weight: an `nnx.Param` where it is dense, :class:`Packed` where it is not.
      mesh: over which a packed weight's output channels are cut; None on one device.
    """

    def __init__(self, k: int, n: int, *, bias: bool, rngs: nnx.Rngs) -> None:
        self.weight: nnx.Variable[Any] = nnx.Param(jax.random.normal(rngs.params(), (k, n)) * k**-0.5)
        self.bias = nnx.Param(jnp.zeros(n)) if bias else None
        self.mesh: Mesh | None = None

    def __call__(self, x: Float[Array, "... k"]) -> Float[Array, "... n"]:
        weight = self.weight.get_value()
        if isinstance(weight, MixedTensor) and self.mesh is not None:
            y = sharded_matmul(x, weight, self.mesh)
        elif isinstance(weight, MixedTensor | Prepared):
            y = mixed_matmul(x, weight)
        else:
            y = dense_product(x, weight)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
