"""Expresses the product of any Flax layer in one form: an input ``[..., K]`` times a matrix ``[K, N]``."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Layer = nnx.Linear | nnx.LinearGeneral | nnx.Conv | nnx.Einsum


@dataclasses.dataclass(frozen=True)
class Product:
    """Axes of a layer's product, and their order in the layer.

    The transpositions are equations for `jnp.einsum`, empty if there is nothing to transpose.

    Attributes:
      in_shape: sizes of the kernel axes that are summed over, with product ``K``.
      out_shape: sizes of the other kernel axes, with product ``N``.
      before: transposition of an input that puts the axes to sum over last.
      weight: transposition of the kernel to ``[*in_shape, *out_shape]``.
      after: transposition of an output ``[..., *out_shape]`` to the layer's order.
      bias_shape: shape in which a bias is added to the layer's output.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    before: str = ""
    weight: str = ""
    after: str = ""
    bias_shape: tuple[int, ...] = ()

    def rows(self, x: jax.Array) -> jax.Array:
        """Reshapes a layer's input to ``[..., K]``."""
        x = jnp.einsum(self.before, x) if self.before else x
        return x.reshape(*x.shape[: x.ndim - len(self.in_shape)], math.prod(self.in_shape))

    def output(self, y: jax.Array) -> jax.Array:
        """Reshapes a product ``[..., N]`` to the layer's output."""
        y = y.reshape(*y.shape[:-1], *self.out_shape)
        return jnp.einsum(self.after, y) if self.after else y

    def matrix(self, kernel: jax.Array) -> jax.Array:
        """Reshapes a layer's kernel to ``[K, N]``."""
        kernel = jnp.einsum(self.weight, kernel) if self.weight else kernel
        return kernel.reshape(math.prod(self.in_shape), math.prod(self.out_shape))

    def kernel(self, matrix: jax.Array) -> jax.Array:
        """Reshapes a matrix ``[K, N]`` to the layer's kernel, the inverse of :meth:`matrix`."""
        kernel = matrix.reshape(*self.in_shape, *self.out_shape)
        given, _, made = self.weight.partition("->")
        return jnp.einsum(f"{made}->{given}", kernel) if self.weight else kernel


def product_of(layer: Layer) -> Product:
    """Returns the product of a layer.

    Raises:
      ValueError: the layer is an `nnx.Einsum` that is not a matrix product of one input and the kernel.
    """
    shape = tuple(layer.kernel.shape)
    if isinstance(layer, nnx.Einsum):
        return einsum_product(layer.einsum_str, shape)
    outputs = layer.out_features if isinstance(layer.out_features, tuple) else (layer.out_features,)
    cut = len(shape) - len(outputs)
    return Product(shape[:cut], shape[cut:], bias_shape=shape[cut:])


def einsum_product(equation: str, shape: Sequence[int]) -> Product:
    """Returns the product of an einsum, such as ``"BTD,DNH->BTNH"``, of an input and a kernel of ``shape``.

    Raises:
      ValueError: the einsum is not a matrix product.
    """
    operands, _, output = equation.partition("->")
    x, _, weight = operands.partition(",")
    inner = "".join(axis for axis in weight if axis in x and axis not in output)
    outer = "".join(axis for axis in weight if axis in output and axis not in x)
    rows = "".join(axis for axis in x if axis not in inner)
    expected = f"its equation is {equation}, expected"
    if each := "".join(axis for axis in weight if axis in x and axis in output and axis != "."):
        raise ValueError(f"{expected} one matrix, not one for each {', '.join(each)}")
    plain = [part.replace("...", "", 1) for part in (x, weight, output)]
    if any(len(set(part)) < len(part) for part in plain) or "." in weight:
        raise ValueError(f"{expected} every axis by name, once, and ... for an input's first ones at most")
    if not inner or not outer or sorted(inner + outer + rows + outer) != sorted(weight + output):
        raise ValueError(f"{expected} a sum over axes that input and kernel share, and over no others")
    if not output.startswith("...") and "." in output:
        raise ValueError(f"{expected} ... for an output's first axes alone")
    sizes = dict(zip(weight, shape, strict=True))
    return Product(
        in_shape=tuple(sizes[axis] for axis in inner),
        out_shape=tuple(sizes[axis] for axis in outer),
        before=f"{x}->{rows}{inner}",
        weight=f"{weight}->{inner}{outer}",
        after=f"{rows}{outer}->{output}",
        bias_shape=tuple(sizes[axis] if axis in outer else 1 for axis in plain[2]),
    )
