"""Products of operands that lie over several devices: what JAX says of that while a program is traced.

Along axes of a mesh that are explicit, every operand's type says how it is cut, and each device takes the
product of its own part (`jax.shard_map`). Along automatic axes nothing is known but the mesh, and no kernel
can be divided. A program of one device, or inside a `jax.shard_map` of all axes, knows neither.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.layout import MixedTensor


class Spread(NamedTuple):
    """Over what operands lie.

    Attributes:
      mesh: theirs, or that of the context.
      explicit: whether some of its axes are.
      auto: whether XLA would have to divide what is computed along others.
    """

    mesh: AbstractMesh
    explicit: bool
    auto: bool

    @property
    def several(self) -> bool:
        """Whether a kernel cannot take all of them as they are."""
        return self.explicit or self.auto


def spread(*operands: Any) -> Spread:
    """Over what arrays, or trees of them, lie."""
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(operands)]
    mesh = next((mesh for mesh in meshes if not mesh.empty), jax.sharding.get_abstract_mesh())
    divided = math.prod(mesh.shape[name] for name in mesh.auto_axes) > 1 or bool(mesh.manual_axes)
    return Spread(mesh, bool(mesh.explicit_axes), bool(mesh.auto_axes) and divided)


def _spec(a: jax.Array) -> tuple[Any, ...]:
    sharding = jax.typeof(a).sharding
    return (None,) * a.ndim if sharding.mesh.empty else tuple(sharding.spec)


def _axes(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


@partial(jax.jit, static_argnums=(0, 1, 2))
def per_device(
    product: Callable[..., jax.Array],
    static: tuple[Any, ...],
    mesh: AbstractMesh,
    x: jax.Array,
    w: Any,
    residual: jax.Array | None,
) -> jax.Array:
    """``product(*static, x, w, residual)`` of each device's own rows and output channels, by explicit axes.

    What ``x`` is cut along ``K``, and prepared weights at all, is gathered first.

    Args:
      product: gives ``[..., N]``.
      static: what it takes first.
      mesh: of the operands.
      x: ``[..., K]``.
      w: the weight ``[K, N]``.
      residual: ``[..., N]``.
    """
    packed, (k, n) = isinstance(w, MixedTensor), w.shape
    cut = _spec(w.words)[1] if packed else None
    rows = [None if set(_axes(entry)) & set(_axes(cut)) else entry for entry in _spec(x)[:-1]]
    own = n // math.prod(mesh.shape[name] for name in _axes(cut))
    specs = (
        P(*rows, None),
        jax.tree.map(lambda leaf: P(None, cut) if packed and leaf.ndim == 2 else P(), w),
        None if residual is None else P(*rows, cut),
    )

    def local(x: jax.Array, w: Any, residual: jax.Array | None) -> jax.Array:
        return product(*static, x, dataclasses.replace(w, shape=(k, own)) if packed else w, residual)

    return _on_each(local, mesh, (x, w, residual), specs, P(*rows, cut))


@partial(jax.jit, static_argnums=(0, 1, 2))
def gathered(
    product: Callable[..., jax.Array], static: tuple[Any, ...], mesh: AbstractMesh, *operands: Any
) -> jax.Array:
    """``product(*static, *operands)`` by every device, of whole operands."""
    specs = jax.tree.map(lambda leaf: P(), operands)
    return _on_each(partial(product, *static), mesh, operands, specs, P())


def _on_each(
    local: Callable[..., jax.Array], mesh: AbstractMesh, operands: Any, specs: Any, out: P
) -> jax.Array:
    places = jax.tree.map(partial(NamedSharding, mesh), specs)
    operands, axes = jax.tree.map(jax.sharding.reshard, operands, places), set(mesh.explicit_axes)
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, axis_names=axes)
    return run(*operands)  # type: ignore[no-any-return]
