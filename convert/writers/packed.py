"""Writing a checkpoint as safetensors to pass on: the packed arrays bit for bit, in a handful of files."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConvertError
from convert.families import by_name
from convert.writers.card import model_card
from convert.writers.export import keep_tokenizer, write_companions
from convert.writers.folder import SHARD_BYTES, new_folder, write_json, write_tensors
from slim_jax.store.checkpoint import CheckpointSource
from slim_jax.store.manifest import FORMAT, MANIFEST, Block, Manifest, Outer, listed, stored_arrays
from slim_jax.store.shards import array_name, digest
from slim_jax.store.source import Source

Measured = Sequence[tuple[str, float]]
"""A text and the perplexity on it."""


def export_packed(
    source: Source,
    out_dir: str | Path,
    *,
    tokenizer: Any = None,
    perplexity: Measured = (),
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a model as it is, packed or not, for `slim_jax.load`, every command and the hub.

    Everything is written to a folder in the target and moved up at the end, so a failure leaves nothing.
    One shard is in memory at a time.

    Args:
      source: the model; of a checkpoint what the manifest tells goes along, but for paths on this machine.
      out_dir: must not exist, or be empty.
      tokenizer: of the model; None takes ``source.tokenizer`` where there is one.
      perplexity: for the model card.
      shard_bytes: a shard has no more, but for an array that is larger.

    Returns:
      The directory.

    Raises:
      CheckpointError: the directory holds something, or another process writes to it.
      ConvertError: it cannot be written.
    """
    out, known = Path(out_dir), source.manifest if isinstance(source, CheckpointSource) else None
    origin = _portable(source.origin if known is None else known.origin)
    settings = None if known is None else known.quantization
    with new_folder(out) as folder:
        entries: list[dict[str, Any]] = []
        write_tensors(_arrays(source, entries), folder, shard_bytes)
        outer = None if known is None else known.outer
        reports = {} if known is None else {i: block.report for i, block in enumerate(known.blocks)}
        manifest = Manifest(
            source.config,
            origin,
            settings,
            complete=True,
            outer=Outer(**entries[0], report=None if outer is None else outer.report),
            blocks=tuple(Block(**entry, report=reports.get(i)) for i, entry in enumerate(entries[1:])),
            tuning=None if known is None else known.tuning,
            files={file.name: digest(file) for file in sorted(folder.glob("*.safetensors"))},
        )
        write_json(folder / MANIFEST, manifest.to_json())
        _write_config(folder, source, tokenizer, manifest)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        card = model_card(out.resolve().name, manifest, size, perplexity)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return out


def _arrays(source: Source, entries: list[dict[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
    """Every array under its name in the files; the fields of the manifest's entries come on the way."""
    for index in (None, *range(source.config.num_layers)):
        params = source.outer() if index is None else source.block(index)
        arrays, packed = stored_arrays(params)
        entries.append({"arrays": listed(arrays), "packed": packed})
        for name, value in arrays.items():
            yield array_name(index, name), np.ascontiguousarray(value).reshape(value.shape)


def _portable(origin: dict[str, Any]) -> dict[str, Any]:
    """Where a model is from, without the folders of this machine; a name on the hub stays."""
    if "path" not in origin:
        return origin
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", str(origin["path"]))
    name = f"{cached[1]}/{cached[2]}" if cached else Path(origin["path"]).name
    return {**origin, "path": name}


def _write_config(folder: Path, source: Source, tokenizer: Any, manifest: Manifest) -> None:
    """Hugging Face's files, by which the hub and its tools know the model; our own reader needs none."""
    try:
        config = by_name(source.config.family).hf.write_config(source.config)
    except ConvertError:  # no class of transformers is such a decoder
        keep_tokenizer(folder, source, tokenizer)
        return
    if any(entry.packed for _, entry in manifest.entries):
        settings = manifest.quantization or {}
        told = {name: settings[name] for name in ("bits", "group_size", "method") if name in settings}
        config["quantization_config"] = {"quant_method": FORMAT, **told}
    write_companions(folder, config, source, tokenizer)
