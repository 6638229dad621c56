"""What `slim.json` says of a checkpoint: sizes and bits without reading any array."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pallas_kernels import MixedTensor
from slim_jax.model.block import linear_names
from slim_jax.model.config import DecoderConfig
from slim_jax.model.linear import product_dtype
from slim_jax.model.params import Params, block_buffers
from slim_jax.run.files import CheckpointError as CheckpointError

FORMAT = "slim-jax"
VERSION = 2
"""Of what is written; 1, which is read too, has scales in bfloat16 alone."""

MANIFEST = "slim.json"
LEAVES = ("words", "scale", "zero", "order", "segments")


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder has a manifest."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(path: str | Path, *, complete: bool = True) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
      CheckpointError: it is missing, damaged, of a newer format, or of an unfinished run though
        ``complete`` asks for a whole one.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except OSError:
        raise CheckpointError(f"{path} is no slim-jax checkpoint: it has no {MANIFEST}") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not a slim-jax manifest")
    if manifest.get("version", 0) > VERSION:
        raise CheckpointError(
            f"{file} has format version {manifest['version']}, expected at most {VERSION}: upgrade slim-jax"
        )
    if complete and not manifest.get("complete"):
        done, total = len(manifest["blocks"]), manifest["decoder"]["num_layers"]
        how = "convert it again" if manifest["quantization"] is None else "quantize with --resume"
        raise CheckpointError(f"{path} is unfinished, {done} of {total} blocks are done: {how}")
    return manifest


def new_manifest(
    config: DecoderConfig, origin: dict[str, Any], quantization: dict[str, Any] | None, *, complete: bool
) -> dict[str, Any]:
    """A manifest without entries, as JSON values."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "complete": complete,
        "decoder": config.to_json(),
        "origin": origin,
        "quantization": quantization,
        "outer": None,
        "blocks": [],
    }
    return json.loads(json.dumps(manifest))


def stored_arrays(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters as the arrays that are stored, by name, and what an entry's ``packed`` says of them."""
    arrays: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, MixedTensor):
            static = {"group_size": value.group_size, "widths": list(value.widths)}
            packed[name] = {"shape": list(value.shape), **static}
            arrays |= {f"{name}.{leaf}": getattr(value, leaf) for leaf in LEAVES}
        else:
            arrays[name] = value
    return arrays, packed


def stored_params(
    packed: Mapping[str, Any], arrays: Mapping[str, Any], dtype: jnp.dtype | None = None
) -> dict[str, Any]:
    """The inverse of :func:`stored_arrays`; ``dtype`` of all that is computed with, as stored and
    `product_dtype` without."""
    arrays, params = dict(arrays), dict[str, Any]()
    for name, static in packed.items():
        leaves = {leaf: arrays.pop(f"{name}.{leaf}") for leaf in LEAVES}
        params[name] = MixedTensor(
            **leaves,
            shape=tuple(static["shape"]),
            group_size=static["group_size"],
            widths=tuple(static["widths"]),
            dtype=product_dtype() if dtype is None else jnp.dtype(dtype),
        )
    return params | {name: value if dtype is None else value.astype(dtype) for name, value in arrays.items()}


def listed(arrays: dict[str, Any]) -> dict[str, Any]:
    """What an entry's ``arrays`` says of arrays: ``[shape, dtype]`` by name."""
    return {name: [list(value.shape), str(value.dtype)] for name, value in arrays.items()}


def summary(manifest: dict[str, Any]) -> dict[str, Any]:
    """What `slim_jax.inspect` returns, of a manifest that need not be complete."""
    buffers = block_buffers(DecoderConfig.from_json(manifest["decoder"]), 0)
    layers, ends = list[dict[str, Any]](), list[dict[str, Any]]()
    total_bytes = parameters = 0
    outer = [] if manifest["outer"] is None else [("", manifest["outer"])]
    for prefix, entry in [*outer, *((f"blocks.{i}.", block) for i, block in enumerate(manifest["blocks"]))]:
        sizes = {name: array_bytes(*array) for name, array in entry["arrays"].items()}
        total_bytes += sum(sizes.values())
        reports = {layer["name"]: layer for layer in layer_reports(entry)}
        for name, static in entry["packed"].items():
            stored = sum(sizes.pop(f"{name}.{leaf}") for leaf in LEAVES)
            row = _row(prefix + name.removesuffix(".weight"), static, stored, reports)
            (layers if prefix else ends).append(row)
            parameters += math.prod(static["shape"])
        dense = [name for name in sizes if name not in buffers]
        parameters += sum(math.prod(entry["arrays"][name][0]) for name in dense)
    weights = sum(math.prod(row["shape"]) for row in layers)
    stored = sum(row["bytes"] for row in layers)
    return {
        "format_version": manifest["version"],
        "family": manifest["decoder"]["family"],
        "origin": manifest["origin"],
        "quantization": manifest["quantization"],
        "parameters": parameters,
        "bytes": total_bytes,
        "packed_bytes": stored,
        "bits_per_weight": 8 * stored / weights if weights else None,
        "layers": layers,
        "ends": ends,
        "skipped": _skipped(manifest) if layers else [],
    }


def _skipped(manifest: dict[str, Any]) -> list[str]:
    """The linear layers of the blocks that are not packed."""
    names = linear_names(DecoderConfig.from_json(manifest["decoder"]))
    written = range(len(manifest["blocks"]))
    stored = {f"blocks.{i}.{name}" for i in written for name in manifest["blocks"][i]["arrays"]}
    return [name for name in names if f"{name}.weight" in stored]


def layer_reports(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The reports of the layers of an entry of the manifest, as JSON values."""
    return (entry.get("report") or {"layers": []})["layers"]


def _row(name: str, static: dict[str, Any], stored: int, reports: dict[str, Any]) -> dict[str, Any]:
    """A packed layer in `slim_jax.inspect`; groups by width are known without a report where there is one."""
    (k, n), g, report = static["shape"], static["group_size"], reports.get(name, {})
    one_width = {str(static["widths"][0]): -(-k // g)} if len(static["widths"]) == 1 else None
    return {
        "name": name,
        "shape": [k, n],
        "group_size": g,
        "bits": report.get("bits", one_width),
        "bytes": stored,
        "bits_per_weight": 8 * stored / (k * n),
        "error": report.get("error"),
        "worst": report.get("worst"),
        "mixed": report.get("mixed"),
        "rise": report.get("rise"),
    }


def array_bytes(shape: list[int], dtype: str) -> int:
    """Bytes of an array as the manifest lists it."""
    return math.prod(shape) * jnp.dtype(dtype).itemsize
