"""Products of operands over several devices: the sharding that JAX knows while a program is traced.

Along explicit axes of a mesh, every operand's type states how it is sharded, and each device computes the
product of its own part (`jax.shard_map`). Along automatic axes only the mesh is known, and no kernel can be
partitioned. A program for one device, or inside a `jax.shard_map` over all axes, has neither.
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
    """The mesh that operands lie over.

    Attributes:
      mesh: the operands' mesh, or that of the context.
      explicit: True if some of its axes are explicit.
      auto: True if XLA would have to partition the computation along automatic axes.
    """

    mesh: AbstractMesh
    explicit: bool
    auto: bool

    @property
    def several(self) -> bool:
        """True if a kernel cannot take all operands as they are."""
        return self.explicit or self.auto


def spread(*operands: Any) -> Spread:
    """The mesh that arrays, or trees of them, lie over."""
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
    """``product(*static, x, w, residual)`` of each device's own rows and output channels, over explicit axes.

    ``x`` is gathered along ``K``, and prepared weights are gathered entirely.

    Args:
      product: returns ``[..., N]``.
      static: the first arguments of ``product``.
      mesh: mesh of the operands.
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
    """``product(*static, *operands)`` on every device, with all operands gathered."""
    specs = jax.tree.map(lambda leaf: P(), operands)
    return _on_each(partial(product, *static), mesh, operands, specs, P())


def _on_each(
    local: Callable[..., jax.Array], mesh: AbstractMesh, operands: Any, specs: Any, out: P
) -> jax.Array:
    places = jax.tree.map(partial(NamedSharding, mesh), specs)
    operands, axes = jax.tree.map(jax.sharding.reshard, operands, places), set(mesh.explicit_axes)
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, axis_names=axes)
    return run(*operands)  # type: ignore[no-any-return]
