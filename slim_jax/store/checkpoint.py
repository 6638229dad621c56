"""Checkpoints on disk: Orbax folders, one per block, and a manifest `slim.json` with their digests.

    out/slim.json      the manifest: its contents, how it was made, a digest of every file
    out/outer/         embedding, last norm, LM head
    out/blocks/007/    one block
    out/tokenizer/     the tokenizer's own files
    out/drafts/        of an unfinished run: calibration windows, the gradient sweep's result, blocks that
                       fine-tuning will replace
    out/.lock          while it is being written: which process writes it

A finished checkpoint can also be read from safetensors files, the form for sharing (`slim_jax.store.shards`).

The manifest is rewritten as a whole after every block, so a folder whose manifest says
``"complete": false`` is a run that can be resumed.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from slim_jax.model.decoder import Decoder
from slim_jax.model.params import Params
from slim_jax.placement import Placement
from slim_jax.report import Report
from slim_jax.store.checkpoint_sink import CheckpointSink
from slim_jax.store.entries import load_params
from slim_jax.store.files import json_digest
from slim_jax.store.hub import find
from slim_jax.store.manifest import CheckpointError as CheckpointError
from slim_jax.store.manifest import Entry, stored_params, summary
from slim_jax.store.manifest import is_checkpoint as is_checkpoint
from slim_jax.store.manifest import read_manifest as read_manifest
from slim_jax.store.shards import Shards
from slim_jax.store.source import SAMPLED, DecoderSource, FiniteSource, Source, read_decoder


class CheckpointSource:
    """A `slim_jax.store.source.Source` that reads a checkpoint block by block and verifies every file.

    Args:
      path: the checkpoint's folder, of Orbax or of safetensors files, or a name on the hub: ``owner/model``
        or ``owner/model@revision``.
      dtype: dtype of dense parameters and of products with packed ones; by default dense parameters are as
        stored, products as `pallas_kernels.chips.product_dtype` says.
      mesh: the chips that the output channels of every weight are split over; JAX's default device if None.

    Attributes:
      path: the folder.
      manifest: the contents of `slim.json`.

    Raises:
      CheckpointError: on construction as for :func:`read_manifest`, or if the hub does not provide it; on
        reading, if a file is damaged.
    """

    def __init__(self, path: str | Path, dtype: jnp.dtype | None = None, mesh: Mesh | None = None) -> None:
        self.path, self._dtype, self.placement = find(path), dtype, Placement(mesh)
        self.manifest = read_manifest(self.path)
        self.config = self.manifest.decoder
        files = self.manifest.files
        self._shards = None if files is None else Shards(self.path, files)

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """See `Source`."""
        fingerprint = SAMPLED + json_digest(self.manifest.to_json())
        return {"kind": "checkpoint", "path": str(self.path.absolute()), "fingerprint": fingerprint}

    @property
    def packed(self) -> list[str]:
        """Names of the packed parameters of the blocks."""
        return [prefix + name for prefix, entry in self.manifest.entries if prefix for name in entry.packed]

    def outer(self) -> Params:
        """See `Source`."""
        assert self.manifest.outer is not None
        return self._read(self.manifest.outer, None)

    def block(self, index: int) -> Params:
        """See `Source`."""
        return self._read(self.manifest.blocks[index], index)

    def _read(self, entry: Entry, index: int | None) -> Params:
        if self._shards is None:
            folder = "outer" if index is None else f"blocks/{index:03d}"
            return load_params(self.path, entry, folder, self._dtype, self.placement)
        arrays = self._shards.read(index, entry.arrays)
        placed = {name: self.placement.channels(value) for name, value in arrays.items()}
        return stored_params(entry.packed, placed, self._dtype)


def load(path: str | Path, dtype: jnp.dtype | None = None, mesh: Mesh | None = None) -> Decoder:
    """Loads a checkpoint, dense or packed; arguments and errors are those of :class:`CheckpointSource`.

    Examples: ``slim_jax.load("out/q2")``, ``slim_jax.load("owner/model")``.
    """
    source = CheckpointSource(path, dtype, mesh)
    return read_decoder(source, source.placement.mesh)


def inspect(path: str | Path) -> dict[str, Any]:
    """Sizes and bits of a checkpoint, local or on the hub, from its manifest alone.

    Returns:
      ``parameters``, ``bytes`` of all arrays, ``packed_bytes`` and ``bits_per_weight`` of the packed
      layers of the blocks (None if there are none) and ``quantization``; a row per packed layer, in
      ``layers`` for the blocks and in ``embeddings`` for embedding and LM head: ``name``, ``shape``,
      ``group_size``, ``bits`` (groups of each width), ``bits_per_weight``, ``error``, ``mixed``, ``rise``;
      and in ``skipped``, if some layers are packed, the names of the blocks' linear layers that are not.

    Raises:
      CheckpointError: see :func:`read_manifest`; or the hub does not provide it.
    """
    return summary(read_manifest(find(path, weights=False)))


def save_source(source: Source, path: str | Path, on_block: Callable[[int, int], None] | None = None) -> None:
    """Writes any source as a checkpoint, with one block in memory at a time.

    Raises:
      CheckpointError: ``path`` exists and is not an empty folder, or is being written by another process.
      ValueError: a dense parameter is not finite.
    """
    _save(FiniteSource(source), path, None, on_block)


def save(decoder: Decoder, path: str | Path, report: Report | None = None) -> None:
    """Writes a decoder, dense or packed, as a checkpoint, with the report of its quantization if given.

    Raises:
      CheckpointError: ``path`` exists and is not an empty folder, or is being written by another process.
    """
    _save(DecoderSource(decoder), path, report, None)


def _save(
    source: Source, path: str | Path, report: Report | None, on_block: Callable[[int, int], None] | None
) -> None:
    total = source.config.num_layers
    with CheckpointSink(Path(path)) as sink:
        sink.begin(source.config, source.origin, None)
        sink.write_outer(source.outer(), () if report is None else report.embeddings)
        for index in range(total):
            sink.write_block(source.block(index), None if report is None else report.blocks[index])
            if on_block is not None:
                on_block(index + 1, total)
        sink.finish()
