"""Placement of arrays where several devices, of one process or of several, share a quantization.

The devices of a mesh form one row. While activations pass through a block, calibration samples are split over
the devices (Gram matrices are then summed over all devices); while SBA, SQC and GPTQ solve a layer, its
output channels are. Everything else is replicated on every device. Where the last bits of a result matter,
each device runs on its part the very program that it would run alone; elsewhere XLA's partitioner splits the
work.

*Panels.* In XLA's CPU code, the last bits of the sums for a matrix depend on its number of columns, and GPTQ
turns a difference in such a bit into different codes later. In panels of one width, a channel's result does
not depend on how many other channels are computed with it, and so not on how many devices share a layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import MixedTensor

AXIS = "devices"

PANEL = 192
"""Output channels of a panel on CPUs, where this width costs no time. Accelerators take all at once."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Layout of arrays over devices; without a mesh, all arrays are on JAX's default device.

    Attributes:
      mesh: any mesh; only its devices matter, and they are arranged in one row.
    """

    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.mesh is not None:
            object.__setattr__(self, "mesh", Mesh(self.mesh.devices.reshape(-1), (AXIS,)))

    @property
    def devices(self) -> int:
        """Number of devices."""
        return 1 if self.mesh is None else self.mesh.size

    def whole(self, value: Any) -> jax.Array:
        """Replicates an array on every device."""
        return self._put(value, P())

    def tree(self, values: Any) -> Any:
        """Replicates every array of a tree on every device."""
        return values if self.mesh is None else jax.tree.map(self.whole, values)

    def samples(self, value: Any) -> jax.Array:
        """Splits an array along its leading axis, a multiple of the number of devices."""
        return self._put(value, P(AXIS))

    def channels(self, value: Any) -> jax.Array:
        """Splits a matrix along its last axis, the output channels, if the number of devices divides it.

        Other arrays are replicated.
        """
        return self._put(value, self._cut(value.shape))

    def rows(self, value: jax.Array) -> jax.Array:
        """Splits an array of three axes along the second if the number of devices divides it.

        Otherwise the array is replicated.
        """
        return self._put(value, P() if value.shape[1] % self.devices else P(None, AXIS))

    def abstract(self, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        """Returns shape, dtype and sharding of the array that :meth:`channels` would make."""
        if self.mesh is None:
            sharding: Sharding = SingleDeviceSharding(jax.local_devices()[0])
        else:
            sharding = self._sharding(self._cut(shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def tensor(self, w: MixedTensor) -> MixedTensor:
        """Splits a packed weight along its output channels."""
        if self.mesh is None:
            return w
        return jax.tree.map(self.channels, w)

    def told(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns parameters, split by :meth:`channels`, whose packed weights know the mesh they lie over."""
        return {
            name: dataclasses.replace(value, mesh=self.mesh) if isinstance(value, MixedTensor) else value
            for name, value in params.items()
        }

    def fetch(self, value: jax.Array) -> np.ndarray:
        """Returns the whole array in this process's memory."""
        return np.asarray(value if value.is_fully_addressable else self.whole(value))

    def over_samples(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """Maps ``function(whole, samples)`` over devices, each with its own samples; joins the results."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))

    def over_channels(self, function: Callable[[Any, Any], Any], n: int) -> Callable[[Any, Any], Any]:
        """Maps ``function(whole, channels)`` over devices, each with its own channels; joins the results.

        The last axis of each array in ``channels``, and of each result, is the ``n`` output channels. They
        are not split if the number of devices does not divide ``n``.
        """
        if self.mesh is None or n % self.devices:
            return function

        def last(a: jax.Array | jax.ShapeDtypeStruct) -> P:
            return P(*[None] * (a.ndim - 1), AXIS)

        def cut(whole: Any, channels: Any) -> Any:
            out = jax.tree.map(last, jax.eval_shape(function, whole, channels))
            specs = (P(), jax.tree.map(last, channels))
            # Unchecked: loop carries start from constants, which do not vary over the devices.
            over = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)
            return over(whole, channels)

        return cut

    def over_panels(self, function: Callable[[Any, Any], Any], whole: Any, channels: Any) -> Any:
        """Applies ``function(whole, channels)`` to each device's own channels, panel by panel; see
        :meth:`over_channels` and :func:`in_panels`."""
        n = jax.tree.leaves(channels)[0].shape[-1]

        def own(whole: Any, channels: Any) -> Any:
            return in_panels(lambda panel: function(whole, panel), channels)

        return self.over_channels(own, n)(whole, channels)

    def of_samples(self) -> NamedSharding | None:
        """Sharding that :meth:`samples` gives; None without a mesh."""
        return None if self.mesh is None else self._sharding(P(AXIS))

    def of_whole(self) -> NamedSharding | None:
        """Sharding that :meth:`whole` gives; None without a mesh."""
        return None if self.mesh is None else self._sharding(P())

    def gathered(self, value: Any) -> Any:
        """Replicates, inside jit, what is summed over channels, so that sums equal those of one device."""
        whole = self.of_whole()
        return value if whole is None else jax.lax.with_sharding_constraint(value, whole)

    def split_batch(self, batch: Any) -> Any:
        """Splits, inside jit, the samples of a batch, a tree, if the number of devices divides theirs."""
        sharding = self.of_samples()
        if sharding is None or len(jax.tree.leaves(batch)[0]) % self.devices:
            return batch
        return jax.lax.with_sharding_constraint(batch, sharding)

    def _cut(self, shape: tuple[int, ...]) -> P:
        return P(None, AXIS) if len(shape) == 2 and shape[1] % self.devices == 0 else P()

    def _sharding(self, spec: P) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, spec)

    def _put(self, value: Any, spec: P) -> jax.Array:
        if self.mesh is None:
            return jnp.asarray(value)
        sharding = self._sharding(spec)
        if isinstance(value, jax.Array) and (sharding.is_fully_addressable or not value.is_fully_addressable):
            return jax.device_put(value, sharding)
        return from_host(np.asarray(value), sharding)


ONE_DEVICE = Placement()
"""Placement on JAX's default device."""


def from_host(value: np.ndarray, sharding: Sharding) -> jax.Array:
    """Lays out an array that every process holds whole; nothing is sent between processes."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def in_panels(function: Callable[[Any], Any], channels: Any) -> Any:
    """Applies ``function`` to arrays that all end in the same output channels, ``[..., N]``, panel by panel.

    Its results end in the output channels too. The last panel is padded with copies of the last channel.
    """
    n = jax.tree.leaves(channels)[0].shape[-1]
    width = PANEL if jax.default_backend() == "cpu" else n

    def split(a: jax.Array) -> jax.Array:
        filled = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -n % width)], mode="edge")
        return jnp.moveaxis(filled.reshape(*a.shape[:-1], -1, width), -2, 0)

    def join(a: jax.Array) -> jax.Array:
        a = jnp.moveaxis(a, 0, -2)
        return a.reshape(*a.shape[:-2], -1)[..., :n]

    return jax.tree.map(join, lax.map(function, jax.tree.map(split, channels)))
