"""What the layers of a module are given when it is called, and which of them depend on which.

The module runs as it is, outside of jit; the products of its layers are watched (they take the function that
multiplies as an attribute).
"""

import hashlib
import math
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from slim_jax.modules.products import Layer, product_of

KINDS: tuple[type, ...] = typing.get_args(Layer)
"""Classes of layers that are packed; what is derived from them may do something else."""

MULTIPLIES = {nnx.Conv: "conv_general_dilated", nnx.Einsum: "einsum_op"}
"""Attribute that multiplies; "dot_general" of other layers."""

Forward = Callable[[Any, Any], Any]
See = Callable[[str, jax.Array], None]


def layers_of(module: Any) -> dict[str, Layer]:
    """Path and layer of all that can be quantized; a layer that is in several places counts once."""
    return {".".join(map(str, path)): node for path, node in nnx.iter_graph(module) if type(node) in KINDS}


class _Enough(Exception):
    """All that is to be seen of a batch has been seen."""


def watch(
    layers: Mapping[str, Layer],
    run: Callable[[], Any],
    see: See | None = None,
    moved: Collection[str] = (),
) -> dict[str, int]:
    """Runs the module and shows ``see`` the inputs ``[T, K]`` of its layers; calls of each, in order.

    The products of the layers ``moved`` are not what they should be.
    """
    calls: dict[str, int] = {}

    def watched(path: str, layer: Layer, multiply: Callable[..., jax.Array]):
        def product(*arguments: Any, **options: Any) -> jax.Array:
            x = arguments[1] if isinstance(layer, nnx.Einsum) else arguments[0]
            if isinstance(x, jax.core.Tracer):
                raise ValueError(f"{path} is called inside a JAX transformation, expected plain Python")
            calls[path] = calls.get(path, 0) + 1
            if see is not None:
                conv = isinstance(layer, nnx.Conv)
                see(path, _patches(*arguments, **options) if conv else _rows(layer, x))
            y = multiply(*arguments, **options)
            return _moved(y) if path in moved else y

        return product

    attributes = {path: MULTIPLIES.get(type(layer), "dot_general") for path, layer in layers.items()}
    before = {path: getattr(layers[path], name) for path, name in attributes.items()}
    try:
        for path, name in attributes.items():
            multiply = before[path] or lax.dot_general
            setattr(layers[path], name, watched(path, layers[path], multiply))
        run()
    except _Enough:
        pass
    finally:
        for path, name in attributes.items():
            setattr(layers[path], name, before[path])
    return calls


def _moved(y: jax.Array) -> jax.Array:
    """Channels multiplied by different factors, since a norm that follows would undo one for all of them."""
    factors = jnp.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype)
    return y * factors.reshape((1,) * (y.ndim - 1) + (-1,))


def _rows(layer: Layer, x: jax.Array) -> jax.Array:
    """The input of a layer's product, ``[T, K]``."""
    rows = product_of(layer).rows(x)
    return rows.reshape(-1, rows.shape[-1])


def _patches(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """The patches that a kernel ``[..., C, N]`` is multiplied by, ``[T, K]`` in the order of its entries."""
    *window, channels, _ = kernel.shape
    patches = lax.conv_general_dilated_patches(
        x,
        window,
        strides,
        padding,
        lhs_dilation=options["lhs_dilation"],
        rhs_dilation=options["rhs_dilation"],
        dimension_numbers=options["dimension_numbers"],
    )
    # Channels come first there, and last in the kernel.
    patches = patches.reshape(-1, channels, math.prod(window)).swapaxes(1, 2)
    return patches.reshape(patches.shape[0], -1)


def digest(x: Any) -> bytes:
    """Alike for equal arrays of one dtype only."""
    array = np.asarray(x)
    return hashlib.blake2b(f"{array.dtype}{array.shape}".encode() + array.tobytes(), digest_size=16).digest()


def find_stages(layers: Mapping[str, Layer], run: Callable[[], Any]) -> list[list[str]]:
    """The layers in the order in which they can be quantized: those of a stage read nothing that comes of one
    another, or of a later stage.

    What depends on a layer is seen from what changes with its outputs; a run on one batch finds a stage. A
    layer that reads what comes of itself, by a call before, is a stage of its own, and so is every layer of a
    module that does not give the same twice.
    """

    def digests(moved: Collection[str]) -> dict[str, list[bytes]]:
        found: dict[str, list[bytes]] = {}
        watch(layers, run, lambda path, x: found.setdefault(path, []).append(digest(x)), moved)
        return found

    expected = digests(())
    left, stages = list(expected), list[list[str]]()
    while left:
        found = digests(left)
        same = [path for path in left if found.get(path) == expected[path]] or left[:1]
        stages.append(same)
        left = [path for path in left if path not in same]
    return stages


def shared_inputs(
    module: Any, layers: Mapping[str, Layer], batches: Sequence[Any], run: Forward, calls: Mapping[str, int]
) -> list[tuple[list[str], list[jax.Array]]]:
    """Layers that were given the same, and what that was, ``[T, K]`` a call; equal ones are kept once."""
    arrays: dict[bytes, jax.Array] = {}
    seen: dict[str, list[bytes]] = {path: [] for path in layers}
    wanted = sum(calls[path] for path in layers)

    for batch in batches:
        left = wanted

        def see(path: str, x: jax.Array) -> None:
            nonlocal left
            key = digest(x)
            arrays.setdefault(key, x)
            seen[path].append(key)
            left -= 1
            if not left:
                raise _Enough

        watch(layers, partial(run, module, batch), see)
    groups: dict[tuple[bytes, ...], list[str]] = {}
    for path, keys in seen.items():
        groups.setdefault(tuple(keys), []).append(path)
    return [(paths, [arrays[key] for key in keys]) for keys, paths in groups.items()]
