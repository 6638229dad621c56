"""Packed weights over several devices: sharded in place, or cut into stacked parts, one for each device.

:func:`sharded_matmul` takes a weight whose arrays are sharded over a mesh along its output channels. With
:func:`stack_parts` a program writes its own `jax.shard_map`, over output or input channels. A part is a
complete packed weight with its own groups and widths, so inside `jax.shard_map` every kernel works as it does
on one device:

    w = stack_parts(w, 4, over="k")                     # leaves [4, ...]

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(None, "model"), P("model")), out_specs=P())
    def product(x, w):
        return jax.lax.psum(mixed_matmul(x, part(w)), "model")

Over output channels (``over="n"``) ``x`` is replicated, the parts of ``y`` are side by side
(``out_specs=P(None, "model")``), and nothing is summed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.api import mixed_matmul
from pallas_kernels.layout import MixedTensor
from pallas_kernels.packing import pack

Axes = str | Sequence[str]
"""One axis of a mesh, or several."""


def sharded_matmul(
    x: jax.Array,
    w: MixedTensor,
    mesh: Mesh,
    *,
    model: Axes | None = None,
    data: Axes = (),
    over: Literal["n", "k"] = "n",
) -> jax.Array:
    """:func:`~pallas_kernels.mixed_matmul` on every device of a mesh, each with its part of the weight.

    Args:
      x: ``[..., K]``, its first axis sharded over ``data``. Over ``model`` it is replicated if output
        channels are sharded, and sharded along ``K`` if input channels are.
      w: over "n" a weight ``[K, N]`` whose words, scales and zeros are sharded along ``N``, or replicated if
        ``N`` is not a multiple of the number of devices; over "k" the result of :func:`stack_parts`, with one
        part for each device of the axes ``model``.
      mesh: the devices.
      model: the axes that shard the weight; all axes that are not in ``data`` if None.
      data: the axes that shard the rows of ``x``.
      over: "n" to shard output channels, as for a layer's first products (q, k, v, gate, up); "k" to shard
        input channels, as for the products that read their results (o, down), and to sum over ``model``.

    Returns:
      float32 ``[..., N]``: its first axis sharded as that of ``x``, and over "n" its last as that of ``w``.

    Raises:
      ValueError: an axis is not in the mesh or is named twice, or there are not as many parts as devices.
    """
    data_axes = (data,) if isinstance(data, str) else tuple(data)
    others = tuple(name for name in mesh.axis_names if name not in data_axes)
    model_axes = others if model is None else (model,) if isinstance(model, str) else tuple(model)
    named = (*data_axes, *model_axes)
    if not set(named) <= set(mesh.axis_names) or len(set(named)) < len(named):
        raise ValueError(f"axes are data {data_axes} and model {model_axes}, the mesh has {mesh.axis_names}")
    devices = math.prod(mesh.shape[name] for name in model_axes)
    rows = [data_axes or None, *[None] * (x.ndim - 2)] if x.ndim > 1 else []
    if over == "k":
        if w.ndim != 3 or len(w) != devices:
            raise ValueError(f"w has {len(w) if w.ndim == 3 else 1} parts over k, expected {devices}")

        def summed(x: jax.Array, w: MixedTensor) -> jax.Array:
            return jax.lax.psum(mixed_matmul(x, part(w)), model_axes)

        specs: Any = (P(*rows, model_axes), P(model_axes))
        return jax.shard_map(summed, mesh=mesh, in_specs=specs, out_specs=P(*rows))(x, w)
    k, n = w.shape
    cut, own = (None, n) if n % devices else (model_axes, n // devices)

    def local(x: jax.Array, w: MixedTensor) -> jax.Array:
        return mixed_matmul(x, dataclasses.replace(w, shape=(k, own), mesh=None))

    leaves, structure = jax.tree.flatten(w)
    specs = jax.tree.unflatten(structure, [P(None, cut) if leaf.ndim == 2 else P() for leaf in leaves])
    return jax.shard_map(local, mesh=mesh, in_specs=(P(*rows), specs), out_specs=P(*rows, cut))(x, w)


def stack_parts(w: MixedTensor, parts: int, *, over: Literal["k", "n"]) -> MixedTensor:
    """Cuts a packed weight into equal parts; leaves gain a leading axis, ``shape`` is that of a part.

    Args:
      w: the weight ``[K, N]``.
      parts: number of parts.
      over: input channels "k" (whole groups stay together), or output channels "n".

    Returns:
      The parts in the order of their channels. If one part has more bits than others, their words are padded
      to its length.

    Raises:
      ValueError: ``K`` is not a multiple of ``parts * group_size``, or ``N`` not one of ``parts``.
    """
    unit = w.group_size if over == "k" else 1
    size = w.shape[0 if over == "k" else 1]
    if parts < 1 or size % (parts * unit):
        raise ValueError(
            f"{over.upper()} is {size}, expected a multiple of {parts * unit} for {parts} parts over {over}"
        )
    return _over_k(w, parts) if over == "k" else _over_n(w, parts)


def part(w: MixedTensor, index: int = 0) -> MixedTensor:
    """One of the stacked parts; inside `jax.shard_map` the only one is number 0."""
    return w[index]


def side_by_side(parts: Sequence[MixedTensor]) -> MixedTensor:
    """Concatenates the output channels of weights whose groups have the same bits in the same order.

    If dtypes of scales differ, the result has bfloat16 scales, which represent every 8-bit scale exactly.

    Raises:
      ValueError: K, the group size, widths, dtypes, or the bits or order of groups differ.
    """
    first, places = parts[0], [(np.asarray(w.order), np.asarray(w.segments)) for w in parts]
    if len({w.scale.dtype for w in parts}) > 1:
        parts = [w.with_bfloat16_scales() for w in parts]
    static = [(w.shape[0], w.group_size, w.widths, w.dtype) for w in parts]
    if static.count(static[0]) < len(parts) or not all(
        np.array_equal(one, other) for pair in places for one, other in zip(places[0], pair)
    ):
        raise ValueError("weights have groups of different bits, expected the same in all")

    def join(name: str) -> jax.Array:
        return jnp.asarray(np.concatenate([np.asarray(getattr(w, name)) for w in parts], axis=1))

    shape = (first.shape[0], sum(w.shape[1] for w in parts))
    return dataclasses.replace(
        first, words=join("words"), scale=join("scale"), zero=join("zero"), shape=shape
    )


def _over_n(w: MixedTensor, parts: int) -> MixedTensor:
    def columns(leaf: jax.Array) -> jax.Array:
        return jnp.stack(jnp.split(leaf, parts, axis=1))

    def copies(leaf: jax.Array) -> jax.Array:
        return jnp.broadcast_to(leaf, (parts, *leaf.shape))

    return dataclasses.replace(
        w,
        words=columns(w.words),
        scale=columns(w.scale),
        zero=columns(w.zero),
        order=copies(w.order),
        segments=copies(w.segments),
        shape=(w.shape[0], w.shape[1] // parts),
    )


def _over_k(w: MixedTensor, parts: int) -> MixedTensor:
    original = np.argsort(np.asarray(w.order))
    whole = (np.asarray(w.codes()), np.asarray(w.scale)[original], np.asarray(w.zero_codes())[original])
    pieces = [np.split(value, parts) for value in (*whole, w.bits())]
    packed = [
        pack(codes, scale, zero, bits, group_size=w.group_size, widths=w.widths, dtype=w.dtype)
        for codes, scale, zero, bits in zip(*pieces)
    ]
    rows = max(piece.words.shape[0] for piece in packed)
    packed = [
        dataclasses.replace(piece, words=jnp.pad(piece.words, ((0, rows - piece.words.shape[0]), (0, 0))))
        for piece in packed
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *packed)
