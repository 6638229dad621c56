"""Sources of a model's weights, read one block at a time."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pallas_kernels import MixedTensor
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import Params, computed, make_decoder, split_params
from slim_jax.placement import Placement

SAMPLED = "sampled:"
"""Prefix of fingerprints that depend on the weights themselves; earlier ones depended on their sizes."""


@runtime_checkable
class Source(Protocol):
    """A model that can be read block by block, so that it need not fit in memory.

    Attributes:
      config: config of the decoder that the parameters are for.
      origin: the origin of the parameters, as JSON values for the manifest: kind, path, and a fingerprint,
        which depends on the weights but not on the path.
    """

    config: DecoderConfig

    @property
    def origin(self) -> dict[str, Any]:
        """Origin of the parameters, see above."""
        ...

    def outer(self) -> Params:
        """Reads the parameters outside the blocks, named as in :func:`slim_jax.model.params.outer_params`."""
        ...

    def block(self, index: int) -> Params:
        """Reads the parameters of block ``index``, named as in :func:`slim_jax.model.params.block_params`."""
        ...


def check_finite(arrays: Mapping[str, Any]) -> None:
    """Raises an error for arrays with NaN or infinity; packed weights are not checked.

    Raises:
      ValueError: the message names the first such array and counts its values.
    """
    for name, value in arrays.items():
        if isinstance(value, MixedTensor) or not jnp.issubdtype(value.dtype, jnp.floating):
            continue
        finite = (np if isinstance(value, np.ndarray) else jnp).isfinite(value)
        if not bool(finite.all()):
            bad = value.size - int(finite.sum())
            raise ValueError(f"{name} has {bad:,} of {value.size:,} values that are NaN or infinite")


class FiniteSource:
    """A :class:`Source` whose dense parameters are checked (:func:`check_finite`) when they are first read.

    Attributes:
      source: the source that is read.
      config: config of ``source``.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.config = source, source.config
        self._checked: set[int | None] = set()

    @property
    def origin(self) -> dict[str, Any]:
        """See :class:`Source`."""
        return self.source.origin

    def outer(self) -> Params:
        """See :class:`Source`.

        Raises:
          ValueError: a parameter is not finite.
        """
        return self._check(None, self.source.outer())

    def block(self, index: int) -> Params:
        """See :class:`Source`.

        Raises:
          ValueError: a parameter is not finite.
        """
        return self._check(index, self.source.block(index))

    def _check(self, index: int | None, params: Params) -> Params:
        if index not in self._checked:
            prefix = "" if index is None else f"blocks.{index}."
            try:
                check_finite({prefix + name: value for name, value in params.items()})
            except ValueError as error:
                path = self.origin.get("path")
                raise ValueError(f"{path}: {error}" if path else str(error)) from None
            self._checked.add(index)
        return params


def read_decoder(source: Source, mesh: Mesh | None = None, *, rounded: bool = False) -> Decoder:
    """Returns the whole model in memory.

    Args:
      source: source of the model.
      mesh: the chips that packed weights are split over, if they are.
      rounded: if True, dense matrices are converted to bfloat16, half the memory of float32.
    """
    placement = Placement(mesh)

    def prepared(params: Params) -> dict[str, Any]:
        return placement.told(computed(params) if rounded else params)

    blocks = [prepared(source.block(index)) for index in range(source.config.num_layers)]
    return make_decoder(source.config, prepared(source.outer()), blocks)


def _some_rows(value: jax.Array) -> np.ndarray:
    """Returns the first, middle and last row of an array; nothing if it is shared with other processes."""
    if not value.is_fully_addressable:
        return np.empty(0)
    here = all(device.platform == "cpu" for device in value.devices())
    rows = np.asarray(value) if here or len(value.devices()) > 1 else value  # only some rows leave a GPU
    some = rows if value.ndim < 2 else rows[np.array([0, len(value) // 2, len(value) - 1])]
    return np.ascontiguousarray(some)


class DecoderSource:
    """A :class:`Source` that reads a decoder in memory."""

    def __init__(self, decoder: Decoder) -> None:
        self.config: DecoderConfig = decoder.config
        self._outer, self._blocks = split_params(decoder)

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """See :class:`Source`."""
        digest = hashlib.sha256()
        for params in (self._outer, *self._blocks):
            for path, value in jax.tree.leaves_with_path(params):
                digest.update(f"{jax.tree_util.keystr(path)} {value.dtype}{value.shape}".encode())
                digest.update(_some_rows(value).tobytes())
        return {"kind": "memory", "fingerprint": SAMPLED + digest.hexdigest()}

    @property
    def packed(self) -> list[str]:
        """Names of the packed parameters of the blocks."""
        return [
            f"blocks.{i}.{name}"
            for i, block in enumerate(self._blocks)
            for name, value in block.items()
            if isinstance(value, MixedTensor)
        ]

    def outer(self) -> Params:
        """See :class:`Source`."""
        return self._outer

    def block(self, index: int) -> Params:
        """See :class:`Source`."""
        return self._blocks[index]
