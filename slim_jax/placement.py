"""Where arrays lie when several devices, of one process or of several, share a quantization.

The devices of a mesh stand in one row. While activations pass a block, calibration samples are cut over
them (Gram matrices are then summed over all); while SBA, SQC and GPTQ solve a layer, its output channels
are. Everything else is whole on every device. Where last bits matter each device runs the very program
that it would run alone, on its part; elsewhere XLA's partitioner cuts.

*Panels.* The sums in XLA's CPU code for a matrix differ in their last bits with its number of columns, and
GPTQ turns such a bit into other codes further on. In panels of one width a channel's result does not depend
on how many others stand beside it, so neither on how many devices share a layer.
"""

import dataclasses
from collections.abc import Callable
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
    """How arrays are laid over devices; without a mesh, JAX's default device has all.

    Attributes:
      mesh: any mesh; only its devices count, and they are put in a row.
    """

    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.mesh is not None:
            object.__setattr__(self, "mesh", Mesh(self.mesh.devices.reshape(-1), (AXIS,)))

    @property
    def devices(self) -> int:
        """How many there are."""
        return 1 if self.mesh is None else self.mesh.size

    def whole(self, value: Any) -> jax.Array:
        """The array on every device."""
        return self._put(value, P())

    def tree(self, values: Any) -> Any:
        """Every array of a tree on every device."""
        return values if self.mesh is None else jax.tree.map(self.whole, values)

    def samples(self, value: Any) -> jax.Array:
        """The leading axis, a multiple of the number of devices, cut over them."""
        return self._put(value, P(AXIS))

    def channels(self, value: Any) -> jax.Array:
        """A matrix with its last axis, the output channels, cut over the devices if they divide it.

        Other arrays are whole.
        """
        return self._put(value, self._cut(value.shape))

    def rows(self, value: jax.Array) -> jax.Array:
        """The second of three axes cut over the devices if they divide it; else whole."""
        return self._put(value, P() if value.shape[1] % self.devices else P(None, AXIS))

    def abstract(self, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        """What :meth:`channels` would make of an array."""
        if self.mesh is None:
            sharding: Sharding = SingleDeviceSharding(jax.local_devices()[0])
        else:
            sharding = self._sharding(self._cut(shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def tensor(self, w: MixedTensor) -> MixedTensor:
        """A packed weight with its output channels cut over the devices."""
        if self.mesh is None:
            return w
        return jax.tree.map(self.channels, w)

    def fetch(self, value: jax.Array) -> np.ndarray:
        """The whole array in this process's memory."""
        return np.asarray(value if value.is_fully_addressable else self.whole(value))

    def over_samples(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """``function(whole, samples)``, on every device for its own samples; results are joined."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))

    def over_channels(self, function: Callable[[Any, Any], Any], n: int) -> Callable[[Any, Any], Any]:
        """``function(whole, channels)``, on every device for its own; results are joined.

        Arrays of ``channels``, and all results, end in the ``n`` output channels. They are not cut if the
        devices do not divide ``n``.
        """
        if self.mesh is None or n % self.devices:
            return function

        def last(a: jax.Array | jax.ShapeDtypeStruct) -> P:
            return P(*[None] * (a.ndim - 1), AXIS)

        def cut(whole: Any, channels: Any) -> Any:
            out = jax.tree.map(last, jax.eval_shape(function, whole, channels))
            specs = (P(), jax.tree.map(last, channels))
            # Unchecked: loops start from constants, which no device owns.
            over = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)
            return over(whole, channels)

        return cut

    def of_samples(self) -> NamedSharding | None:
        """The sharding that :meth:`samples` gives, None without a mesh."""
        return None if self.mesh is None else self._sharding(P(AXIS))

    def of_whole(self) -> NamedSharding | None:
        """The sharding that :meth:`whole` gives, None without a mesh."""
        return None if self.mesh is None else self._sharding(P())

    def gathered(self, value: Any) -> Any:
        """Inside jit, what is to be summed over channels: whole, so that sums are those of one device."""
        whole = self.of_whole()
        return value if whole is None else jax.lax.with_sharding_constraint(value, whole)

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
"""JAX's default device."""


def from_host(value: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array that every process holds whole, laid out; nothing is sent between processes."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def in_panels(function: Callable[[Any], Any], channels: Any) -> Any:
    """``function`` of arrays that all end in the same output channels, ``[..., N]``, a panel at a time.

    Its results end in them too. The last panel is filled up with copies of the last channel.
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
