"""Where a model's weights come from, one block at a time."""

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

SAMPLED = "sampled:"
"""Begins the fingerprints that say something of the weights themselves; earlier ones did of their sizes."""


@runtime_checkable
class Source(Protocol):
    """A model that can be read block by block, so that it need not fit in memory.

    Attributes:
      config: the decoder that the parameters are for.
      origin: where they come from, as JSON values: kind, path, and a fingerprint, which changes with the
        weights and does not with the path. Goes into the manifest.
    """

    config: DecoderConfig

    @property
    def origin(self) -> dict[str, Any]:
        """See above."""
        ...

    def outer(self) -> Params:
        """Parameters outside the blocks, named as in :func:`slim_jax.model.params.outer_params`."""
        ...

    def block(self, index: int) -> Params:
        """Parameters of block ``index``, named as in :func:`slim_jax.model.params.block_params`."""
        ...


def check_finite(arrays: Mapping[str, Any]) -> None:
    """Refuses arrays with NaN or infinity; packed weights are not looked at.

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
      source: what is read.
      config: that of ``source``.
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
      source: of the model.
      mesh: over which packed weights lie, if they do.
      rounded: dense matrices come in bfloat16, half of what float32 takes.
    """
    prepared = computed if rounded else dict
    blocks = [prepared(source.block(index)) for index in range(source.config.num_layers)]
    return make_decoder(source.config, prepared(source.outer()), blocks, mesh)


def _some_rows(value: jax.Array) -> np.ndarray:
    """The first, the middle and the last row of an array; nothing of one that other processes share."""
    if not value.is_fully_addressable:
        return np.empty(0)
    here = all(device.platform == "cpu" for device in value.devices())
    rows = np.asarray(value) if here or len(value.devices()) > 1 else value  # not the whole of it off a GPU
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
        """The packed parameters of the blocks."""
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
