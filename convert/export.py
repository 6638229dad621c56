"""Writing a model, packed or not, as a Hugging Face directory that transformers loads."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from convert.errors import ConvertError, first_line
from convert.families import by_name
from convert.families.family import HFFormat
from convert.hf import INDEX, SINGLE
from convert.source import file_layout, parse_dtype
from convert.tokenizer import save_tokenizer
from pallas_kernels import MixedTensor
from slim_jax.model.params import block_buffers
from slim_jax.run.source import Source

DTYPES = ("float32", "bfloat16", "float16")
SHARD_BYTES = 2 << 30


def export_hf(
    source: Source,
    out_dir: str | Path,
    dtype: Any = None,
    *,
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes config.json, safetensors with dequantized weights and the tokenizer's files.

    Everything is written beside the target and moved there at the end, so a failure leaves nothing.
    One shard is in memory at a time.

    Args:
      source: the model, with or without packed weights.
      out_dir: must not exist, or be empty.
      dtype: float32, bfloat16 or float16; None keeps each parameter's, and a packed weight's own.
      tokenizer: of the model; None takes ``source.tokenizer`` where there is one.
      shard_bytes: about the size of a shard.

    Returns:
      The directory.

    Raises:
      ConvertError: the directory holds something, or no class of transformers has this config.
    """
    out, cast = Path(out_dir), parse_dtype(dtype, DTYPES)
    form = by_name(source.config.family).hf
    config = form.write_config(source.config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConvertError(f"{out} exists and is not an empty directory")
    tokenizer = tokenizer if tokenizer is not None else getattr(source, "tokenizer", None)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        config["dtype"] = _write_weights(_tensors(source, form, cast), temporary, shard_bytes)
        _write_json(temporary / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config[key] is not None}
        _write_json(temporary / "generation_config.json", ids)
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        temporary.chmod(0o755)  # mkdtemp and save_file keep theirs to the owner
        for file in temporary.iterdir():
            file.chmod(0o644)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise ConvertError(f"{out} cannot be written: {first_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _tensors(source: Source, form: HFFormat, dtype: np.dtype | None) -> Iterator[tuple[str, np.ndarray]]:
    """Their names and tensors, in their orientation, one after another."""
    blocks = range(source.config.num_layers)
    for index in (None, *blocks):
        params = dict(source.outer() if index is None else source.block(index))
        for name in () if index is None else block_buffers(source.config, index):
            del params[name]
        for name, held in form.names.tensors(params, index).items():
            parts = [_file_layout(ours, params[ours], dtype) for ours in held]
            prefix = "" if held[0].startswith("head.") else form.prefix
            yield prefix + name, np.ascontiguousarray(np.concatenate(parts))


def _file_layout(name: str, value: Any, dtype: np.dtype | None) -> np.ndarray:
    """A parameter as files have it; a packed embedding lies as the weight of a product."""
    packed = isinstance(value, MixedTensor)
    dense = np.asarray(value.dequantize() if packed else value)
    dense = dense if dtype is None else dense.astype(dtype)
    return dense.T if packed and name == "embed" else file_layout(name, dense)


def _write_weights(tensors: Iterator[tuple[str, np.ndarray]], directory: Path, shard_bytes: int) -> str:
    """Writes one file, or shards and their index; returns the dtype that most weights have."""
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}

    def flush() -> None:
        save_file(pending, directory / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    total = pending_bytes = 0
    for name, value in tensors:
        if pending and pending_bytes + value.nbytes > shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = value
        pending_bytes, total = pending_bytes + value.nbytes, total + value.nbytes
        sizes[value.dtype.name] = sizes.get(value.dtype.name, 0) + value.nbytes
    flush()
    if len(shards) == 1:
        (directory / "0.part").rename(directory / SINGLE)
        return max(sizes, key=lambda name: sizes[name])
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        (directory / f"{i}.part").rename(directory / file)
    weight_map = {name: file for file, names in zip(files, shards) for name in names}
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return max(sizes, key=lambda name: sizes[name])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
