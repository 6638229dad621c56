"""The linear layer, dense or packed: the variable that holds its weight, and the products with it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pallas_kernels import MixedTensor, Prepared, chips, mixed_matmul, sharded_matmul
from pallas_kernels.layout import vary_like

COMPUTE_DTYPE = jnp.dtype(jnp.bfloat16)
"""Dtype of calibration's products with dense weights; on CPUs too it is the faster one for many tokens."""

ROWS = 8
"""Rows of a matrix that one step of :func:`_row_times_matrix` adds up; with 16, XLA's code is far slower."""


class Packed(nnx.Variable):
    """A packed weight. It is not an `nnx.Param`, so optimizers and gradients of parameters skip it."""


def product_dtype() -> jnp.dtype:
    """Returns the dtype of products with packed weights: float32 on CPUs, else bfloat16.

    Matrix units take bfloat16. A model that was just quantized and one that is loaded use the same dtype.
    """
    return jnp.dtype(jnp.float32 if chips.of_target().platform == "cpu" else jnp.bfloat16)


def dense_product(x: Float[Array, "*batch k"], weight: Float[Array, "k n"]) -> Float[Array, "*batch n"]:
    """Returns ``x @ weight`` in the weight's dtype, accumulated in float32, ``float32[..., N]``.

    XLA's CPU code multiplies a single row by a bfloat16 matrix at a tenth of the speed of a float32 one.
    There the product is summed in float32 and the weight converted row by row,
    which takes no longer than in float32 and needs no float32 copy of the weight. Two or more rows are left
    to XLA.
    """

    def by_xla(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.dot(x.astype(weight.dtype), weight, preferred_element_type=jnp.float32)

    def by_rows(x: jax.Array, weight: jax.Array) -> jax.Array:
        return _row_times_matrix(x.reshape(-1), weight).reshape(*x.shape[:-1], weight.shape[1])

    if _one_bfloat16_row(x, weight):
        return lax.platform_dependent(x, weight, cpu=by_rows, default=by_xla)
    return by_xla(x, weight)


def packed_product(
    x: Float[Array, "*batch k"], weight: MixedTensor | Prepared, mesh: Mesh | None
) -> Float[Array, "*batch n"]:
    """Returns ``x @ weight``; a `MixedTensor`'s output channels are split over ``mesh`` if that is given."""
    if isinstance(weight, MixedTensor) and mesh is not None:
        return sharded_matmul(x, weight, mesh)
    return mixed_matmul(x, weight)


def look_up(
    table: Float[Array, "vocab d"] | MixedTensor | Prepared, tokens: Array, axis: str | None = None
) -> Float[Array, "... d"]:
    """Returns the tokens' rows of an embedding table, ``float32[..., d]``; a packed one is ``[d, vocab]``.

    ``axis`` is the mesh axis over which the vocabulary is split, if each device has its own part.
    """
    if axis is not None:
        size = table.shape[0 if isinstance(table, jax.Array) else 1]
        own = tokens - lax.axis_index(axis) * size
        rows = look_up(table, jnp.clip(own, 0, size - 1))
        return lax.psum(jnp.where(((own >= 0) & (own < size))[..., None], rows, 0), axis)
    if isinstance(table, MixedTensor | Prepared):
        return table.columns(tokens, jnp.float32)
    return table[tokens].astype(jnp.float32)


def unembed(
    h: Float[Array, "*batch d"],
    table: Float[Array, "vocab d"] | MixedTensor | Prepared,
    mesh: Mesh | None = None,
) -> Float[Array, "*batch vocab"]:
    """Returns ``h @ table.T``, otherwise as :func:`dense_product`.

    A packed table is ``[d, vocab]``, and its product is :func:`packed_product`.
    """
    if isinstance(table, MixedTensor | Prepared):
        return packed_product(h, table, mesh)

    def by_xla(h: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.einsum("...d,vd->...v", h.astype(table.dtype), table, preferred_element_type=jnp.float32)

    def by_sums(h: jax.Array, table: jax.Array) -> jax.Array:
        # Tied to h: else XLA would convert the whole table once, before a loop over tokens, and read that.
        h, table = lax.optimization_barrier((h, table))
        y = jnp.sum(table.astype(jnp.float32) * h.astype(jnp.float32).reshape(1, -1), axis=1)
        return y.reshape(*h.shape[:-1], -1)

    if _one_bfloat16_row(h, table):
        return lax.platform_dependent(h, table, cpu=by_sums, default=by_xla)
    return by_xla(h, table)


def _one_bfloat16_row(x: jax.Array, weight: jax.Array) -> bool:
    return math.prod(x.shape[:-1]) == 1 and weight.dtype == jnp.bfloat16


def _row_times_matrix(x: Float[Array, " k"], weight: Float[Array, "k n"]) -> Float[Array, " n"]:
    x, (k, n) = x.astype(jnp.float32), weight.shape

    def add(i: jax.Array | int, y: jax.Array, count: int = ROWS) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(weight, i * ROWS, count)
        factors = lax.dynamic_slice_in_dim(x, i * ROWS, count)
        for row, factor in zip(rows, factors):
            y = y + factor * row.astype(jnp.float32)
        return y

    y = vary_like(jnp.zeros(n), (x, weight))
    if k >= ROWS:
        y = lax.fori_loop(0, k // ROWS, add, y)
    return add(k // ROWS, y, k % ROWS) if k % ROWS else y


class Linear(nnx.Module):
    """``y = x @ weight + bias``, weight ``[K, N]`` dense or a :class:`MixedTensor`; ``y`` is float32.

    Attributes:
      weight: an `nnx.Param` if dense, :class:`Packed` if packed.
      mesh: mesh over which a packed weight's output channels are split; None on one device.
      axis: mesh axis over which the input channels are split, in a program that runs on each device with its
        own part (`slim_jax.infer.tensor_parallel`); the devices' products are summed.
    """

    axis: str | None = None

    def __init__(self, k: int, n: int, *, bias: bool, rngs: nnx.Rngs) -> None:
        self.weight: nnx.Variable[Any] = nnx.Param(jax.random.normal(rngs.params(), (k, n)) * k**-0.5)
        self.bias = nnx.Param(jnp.zeros(n)) if bias else None
        self.mesh: Mesh | None = None

    def __call__(self, x: Float[Array, "... k"]) -> Float[Array, "... n"]:
        weight = self.weight.get_value()
        if isinstance(weight, MixedTensor | Prepared):
            y = packed_product(x, weight, self.mesh)
        else:
            y = dense_product(x, weight)
        return self._with_bias(y if self.axis is None else lax.psum(y, self.axis))

    def _with_bias(self, y: Float[Array, "... n"]) -> Float[Array, "... n"]:
        if self.bias is None:
            return y
        return y + self.bias[...].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))


def outputs(x: Float[Array, "... k"], *layers: Callable[[jax.Array], jax.Array]) -> list[jax.Array]:
    """Returns the outputs of layers that read one input, one product if :func:`join` merged their weights.

    A layer may be another module, such as `nnx.LoRA` around a :class:`Linear`.
    """
    weight = layers[0].weight.get_value() if isinstance(layers[0], Linear) else None
    if not isinstance(weight, Prepared) or len(weight.sizes) == 1:
        return [layer(x) for layer in layers]
    ends = np.cumsum(weight.sizes[:-1]).tolist()
    parts = jnp.split(mixed_matmul(x, weight), ends, axis=-1)
    return [layer._with_bias(y) for layer, y in zip(layers, parts) if isinstance(layer, Linear)]


def plus_output(
    h: Float[Array, "... n"] | None, x: Float[Array, "... k"], layer: Callable[[jax.Array], jax.Array]
) -> Float[Array, "... n"]:
    """Returns ``h + layer(x)``, or ``layer(x)`` without ``h``; a prepared weight's product adds ``h``."""
    weight = prepared_alone(layer)
    if weight is not None:
        return mixed_matmul(x, weight, residual=h)
    return layer(x) if h is None else h + layer(x)


def prepared_alone(layer: Any) -> Prepared | None:
    """Returns the layer's weight if it is prepared and the layer has neither bias nor axis; else None."""
    if not isinstance(layer, Linear) or layer.bias is not None or layer.axis is not None:
        return None
    weight = layer.weight.get_value()
    return weight if isinstance(weight, Prepared) else None


def join(layers: Sequence[Linear], weight: Prepared) -> None:
    """Gives layers that read one input the one merged weight that :func:`outputs` multiplies with."""
    for i, layer in enumerate(layers):
        layer.weight = Packed(None if i else weight)
