"""How a Flax layer multiplies, brought to one form: an input ``[..., K]`` by a matrix ``[K, N]``."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Layer = nnx.Linear | nnx.LinearGeneral | nnx.Conv | nnx.Einsum


@dataclasses.dataclass(frozen=True)
class Product:
    """The axes of a layer's product, and in which order the layer has them.

    Attributes:
      in_shape: axes of the kernel that are summed over, ``K`` in all.
      out_shape: the other ones, ``N`` in all.
      before: transposition of an input, as `jnp.einsum` takes it, that puts the axes to sum over last; empty
        where they are.
      weight: transposition of the kernel to ``[*in_shape, *out_shape]``.
      after: transposition of an output ``[..., *out_shape]`` to the layer's.
      bias_shape: the shape in which a bias is added to the layer's output.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    before: str = ""
    weight: str = ""
    after: str = ""
    bias_shape: tuple[int, ...] = ()

    def rows(self, x: jax.Array) -> jax.Array:
        """A layer's input as ``[..., K]``."""
        x = jnp.einsum(self.before, x) if self.before else x
        return x.reshape(*x.shape[: x.ndim - len(self.in_shape)], math.prod(self.in_shape))

    def output(self, y: jax.Array) -> jax.Array:
        """A product ``[..., N]`` as the layer's output."""
        y = y.reshape(*y.shape[:-1], *self.out_shape)
        return jnp.einsum(self.after, y) if self.after else y

    def matrix(self, kernel: jax.Array) -> jax.Array:
        """A layer's kernel as ``[K, N]``."""
        kernel = jnp.einsum(self.weight, kernel) if self.weight else kernel
        return kernel.reshape(math.prod(self.in_shape), math.prod(self.out_shape))

    def kernel(self, matrix: jax.Array) -> jax.Array:
        """The inverse of :meth:`matrix`."""
        kernel = matrix.reshape(*self.in_shape, *self.out_shape)
        given, _, made = self.weight.partition("->")
        return jnp.einsum(f"{made}->{given}", kernel) if self.weight else kernel


def product_of(layer: Layer) -> Product:
    """How a layer multiplies.

    Raises:
      ValueError: no matrix product of one input and the kernel gives what an `nnx.Einsum` does.
    """
    shape = tuple(layer.kernel.shape)
    if isinstance(layer, nnx.Einsum):
        return einsum_product(layer.einsum_str, shape)
    outputs = layer.out_features if isinstance(layer.out_features, tuple) else (layer.out_features,)
    cut = len(shape) - len(outputs)
    return Product(shape[:cut], shape[cut:], bias_shape=shape[cut:])


def einsum_product(equation: str, shape: Sequence[int]) -> Product:
    """The matrix product that an einsum of an input and a kernel of ``shape`` is, as of ``"BTD,DNH->BTNH"``.

    Raises:
      ValueError: it is none.
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
