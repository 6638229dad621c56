"""Writer of checkpoints as safetensors to share: the packed arrays bit for bit, in a few files."""

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
"""Names of texts and the perplexity on each."""


def export_packed(
    source: Source,
    out_dir: str | Path,
    *,
    tokenizer: Any = None,
    perplexity: Measured = (),
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a model, packed or not, as `slim_jax.load`, every command and the hub read it.

    Everything is written to a folder inside the target and moved up at the end, so a failure leaves nothing.
    One shard is in memory at a time.

    Args:
      source: the model; a checkpoint's manifest is kept, except for paths on this machine.
      out_dir: must not exist, or must be empty.
      tokenizer: the model's tokenizer; None takes ``source.tokenizer`` if there is one.
      perplexity: perplexities for the model card.
      shard_bytes: largest size of a shard, unless one array alone is larger.

    Returns:
      The directory.

    Raises:
      CheckpointError: the directory is not empty, or another process writes to it.
      ConvertError: the directory cannot be written.
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
    """Yields every array with its name in the files; appends the manifest's entries to ``entries``."""
    for index in (None, *range(source.config.num_layers)):
        params = source.outer() if index is None else source.block(index)
        arrays, packed = stored_arrays(params)
        entries.append({"arrays": listed(arrays), "packed": packed})
        for name, value in arrays.items():
            yield array_name(index, name), np.ascontiguousarray(value).reshape(value.shape)


def _portable(origin: dict[str, Any]) -> dict[str, Any]:
    """Removes this machine's folders from a model's origin; a name on the hub stays."""
    if "path" not in origin:
        return origin
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", str(origin["path"]))
    name = f"{cached[1]}/{cached[2]}" if cached else Path(origin["path"]).name
    return {**origin, "path": name}


def _write_config(folder: Path, source: Source, tokenizer: Any, manifest: Manifest) -> None:
    """Writes Hugging Face's files, with which the hub recognizes the model; our own reader needs none."""
    try:
        config = by_name(source.config.family).hf.write_config(source.config)
    except ConvertError:  # no class of transformers matches this decoder
        keep_tokenizer(folder, source, tokenizer)
        return
    if any(entry.packed for _, entry in manifest.entries):
        settings = manifest.quantization or {}
        told = {name: settings[name] for name in ("bits", "group_size", "method") if name in settings}
        config["quantization_config"] = {"quant_method": FORMAT, **told}
    write_companions(folder, config, source, tokenizer)
