"""Writer of a model, packed or not, as a Hugging Face directory that transformers loads."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConvertError
from convert.families import by_name
from convert.families.family import HFFormat
from convert.families.tensors import Held, held_in
from convert.readers.load import source_tokenizer
from convert.readers.source import file_layout, file_shape, parse_dtype
from convert.tokenizer import save_tokenizer
from convert.writers.folder import SHARD_BYTES, new_folder, write_json, write_tensors
from pallas_kernels import MixedTensor
from slim_jax.model.params import block_buffers
from slim_jax.store.source import Source

DTYPES = ("float32", "bfloat16", "float16")


def export_hf(
    source: Source,
    out_dir: str | Path,
    dtype: Any = None,
    *,
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes config.json, safetensors with dequantized weights and the tokenizer's files.

    Everything is written to a folder inside the target and moved up at the end, so a failure leaves nothing.
    One shard is in memory at a time.

    Args:
      source: the model, with or without packed weights.
      out_dir: must not exist, or must be empty.
      dtype: float32, bfloat16 or float16; None keeps each parameter's type, and a packed weight's own.
      tokenizer: the model's tokenizer; None takes ``source.tokenizer`` if there is one.
      shard_bytes: largest size of a shard, unless one tensor alone is larger.

    Returns:
      The directory.

    Raises:
      CheckpointError: the directory is not empty, or another process writes to it.
      ConvertError: the directory cannot be written, or no class of transformers has this config.
    """
    out, cast = Path(out_dir), parse_dtype(dtype, DTYPES)
    form = by_name(source.config.family).hf
    config = form.write_config(source.config)
    with new_folder(out) as folder:
        sizes = write_tensors(_tensors(source, form, cast), folder, shard_bytes)
        config["dtype"] = max(sizes, key=lambda name: sizes[name])
        write_companions(folder, config, source, tokenizer)
    return out


def write_companions(folder: Path, config: dict[str, Any], source: Source, tokenizer: Any) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files.

    Args:
      folder: the directory to write to.
      config: the model's config in transformers' form.
      source: the model.
      tokenizer: the model's tokenizer; None takes ``source.tokenizer`` if there is one.
    """
    write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config[key] is not None}
    write_json(folder / "generation_config.json", ids)
    keep_tokenizer(folder, source, tokenizer)


def keep_tokenizer(folder: Path, source: Source, tokenizer: Any) -> None:
    """Writes the tokenizer's files; None takes the source's, if it has one."""
    if tokenizer is None:
        with contextlib.suppress(ConvertError, AttributeError):
            tokenizer = source_tokenizer(source)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)


def held_tensors(source: Source, form: HFFormat) -> Iterator[tuple[str, dict[str, Any], Held]]:
    """Yields each tensor's name in the format, our parameters that it holds, in order, and their place.

    Tensors outside the blocks come first, then the blocks in order; one block is in memory at a time.
    """
    blocks = range(source.config.num_layers)
    for index in (None, *blocks):
        params = dict(source.outer() if index is None else source.block(index))
        for name in () if index is None else block_buffers(source.config, index):
            del params[name]
        for name, held in form.names.tensors(params, index).items():
            prefix = "" if held[0].startswith("head.") else form.prefix
            rows = [file_shape(ours, params[ours].shape)[0] for ours in held]
            config = source.config if index is None else source.config.block(index)
            place = held_in(form.names, held, rows, config, index)
            yield prefix + name, {ours: params[ours] for ours in held}, place


def dense_tensor(held: dict[str, Any], place: Held, dtype: np.dtype | None) -> np.ndarray:
    """Returns one tensor in the format's orientation, from the parameters that it holds, dequantized."""
    parts = [_file_layout(ours, value, dtype) for ours, value in held.items()]
    return np.ascontiguousarray(place.join(parts))


def cast_tensor(name: str, held: dict[str, Any], place: Held, dtype: np.dtype) -> np.ndarray:
    """Returns what :func:`dense_tensor` does.

    Raises:
      ConvertError: a value is too large for ``dtype``.
    """
    dense = dense_tensor(held, place, dtype)
    if not np.all(np.isfinite(dense.astype(np.float32))):
        raise ConvertError(f"{name} does not fit {dtype}: export with --dtype bfloat16")
    return dense


def _tensors(source: Source, form: HFFormat, dtype: np.dtype | None) -> Iterator[tuple[str, np.ndarray]]:
    for name, held, place in held_tensors(source, form):
        yield name, dense_tensor(held, place, dtype)


def _file_layout(name: str, value: Any, dtype: np.dtype | None) -> np.ndarray:
    """Converts a parameter to the files' layout; a packed embedding is stored transposed, as a weight."""
    packed = isinstance(value, MixedTensor)
    dense = np.asarray(value.dequantize() if packed else value)
    dense = dense if dtype is None else dense.astype(dtype)
    return dense.T if packed and name == "embed" else file_layout(name, dense)
