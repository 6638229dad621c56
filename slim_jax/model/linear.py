"""The linear layer, dense or packed: the variable that holds its weight, and the products with it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import matmul

COMPUTE_DTYPE = jnp.dtype(jnp.bfloat16)
"""Dtype of calibration's products with dense weights; on CPUs too it is the faster one for many tokens."""


class Packed(nnx.Variable):
    """A packed weight. It is not an `nnx.Param`, so optimizers and gradients of parameters skip it."""


def look_up(table: Any, tokens: Array) -> Float[Array, "... d"]:
    """Returns the tokens' rows of an embedding table, ``float32[..., d]``.

    ``table`` is dense, ``[vocab, d]``, or packed, ``[d, vocab]``.
    """
    if isinstance(table, jax.Array):
        return table[tokens].astype(jnp.float32)
    return table.columns(tokens, jnp.float32)  # type: ignore[no-any-return]


def unembed(h: Float[Array, "*batch d"], table: Any) -> Float[Array, "*batch vocab"]:
    """Returns the product of ``h`` and the transposed embedding table, which is as in :func:`look_up`."""
    return matmul(h, table, transposed=isinstance(table, jax.Array))


class Linear(nnx.Module):
    """``y = x @ weight + bias``, weight ``[K, N]`` dense or packed; ``y`` is float32.

    Attributes:
      weight: an `nnx.Param` if dense, :class:`Packed` if packed.
    """

    def __init__(self, k: int, n: int, *, bias: bool, rngs: nnx.Rngs) -> None:
        self.weight: nnx.Variable[Any] = nnx.Param(jax.random.normal(rngs.params(), (k, n)) * k**-0.5)
        self.bias = nnx.Param(jnp.zeros(n)) if bias else None

    def __call__(self, x: Float[Array, "... k"]) -> Float[Array, "... n"]:
        return self.plus_bias(matmul(x, self.weight.get_value()))

    def plus_bias(self, y: Float[Array, "... n"]) -> Float[Array, "... n"]:
        """Returns ``y + bias``."""
        if self.bias is None:
            return y
        return y + self.bias[...].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
