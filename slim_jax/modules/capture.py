"""Captures the inputs of a module's layers when it is called, and finds which layers depend on which.

The module runs unchanged, outside of jit. Its layers take the function that multiplies as an attribute, which
is replaced by one that also records the input.
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
"""Classes of layers that are packed; their subclasses are not, since they may compute something else."""

MULTIPLIES = {nnx.Conv: "conv_general_dilated", nnx.Einsum: "einsum_op"}
"""Name of the attribute that multiplies; "dot_general" for other layers."""

Forward = Callable[[Any, Any], Any]
See = Callable[[str, jax.Array], None]


def layers_of(module: Any) -> dict[str, Layer]:
    """Layers of the supported classes, by path; a layer that is in several places is listed once."""
    return {".".join(map(str, path)): node for path, node in nnx.iter_graph(module) if type(node) in KINDS}


class _Enough(Exception):
    """Raised once all wanted inputs of a batch have been captured."""


def watch(
    layers: Mapping[str, Layer],
    run: Callable[[], Any],
    see: See | None = None,
    moved: Collection[str] = (),
) -> dict[str, int]:
    """Runs the module and passes ``see`` the inputs ``[T, K]`` of its layers.

    The outputs of the layers ``moved`` are changed, to see what depends on them.

    Returns:
      The number of calls of each layer, by path, in the order of the first calls.

    Raises:
      ValueError: a layer is called inside a JAX transformation.
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
    """Multiplies each channel by a different factor; a norm that follows would undo a common factor."""
    factors = jnp.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype)
    return y * factors.reshape((1,) * (y.ndim - 1) + (-1,))


def _rows(layer: Layer, x: jax.Array) -> jax.Array:
    """Input of a layer's product, ``[T, K]``."""
    rows = product_of(layer).rows(x)
    return rows.reshape(-1, rows.shape[-1])


def _patches(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """Patches ``[T, K]`` that a kernel ``[..., C, N]`` multiplies, with ``K`` in the kernel's order."""
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
    # Channels come first in the patches, and last in the kernel.
    patches = patches.reshape(-1, channels, math.prod(window)).swapaxes(1, 2)
    return patches.reshape(patches.shape[0], -1)


def digest(x: Any) -> bytes:
    """Returns a digest of an array's dtype, shape and values."""
    array = np.asarray(x)
    return hashlib.blake2b(f"{array.dtype}{array.shape}".encode() + array.tobytes(), digest_size=16).digest()


def find_stages(layers: Mapping[str, Layer], run: Callable[[], Any]) -> list[list[str]]:
    """Stages of layers, in the order in which they can be quantized.

    The inputs of a stage's layers do not depend on the outputs of any layer in the same or a later stage.
    Dependence is found by changing the outputs of all layers that are left and comparing the inputs, in one
    run on one batch for each stage. A layer whose input depends on its own output from an earlier call is a
    stage of its own, and so is every layer of a module whose runs are not reproducible.
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
    """Groups layers that have the same inputs; returns each group with its inputs, ``[T, K]`` per call.

    Equal inputs are kept in memory only once.
    """
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
