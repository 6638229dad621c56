"""Writing a model, packed or not, as a Hugging Face directory that transformers loads."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConvertError
from convert.families import by_name
from convert.families.family import HFFormat
from convert.readers.load import source_tokenizer
from convert.readers.source import file_layout, parse_dtype
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

    Everything is written to a folder in the target and moved up at the end, so a failure leaves nothing.
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
      CheckpointError: the directory holds something, or another process writes to it.
      ConvertError: it cannot be written, or no class of transformers has this config.
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
    """What lies beside the weights: config.json, generation_config.json and the tokenizer's files.

    Args:
      folder: where.
      config: of the model, as transformers has it.
      source: of the model.
      tokenizer: of the model; None takes ``source.tokenizer`` where there is one.
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


def held_tensors(source: Source, form: HFFormat) -> Iterator[tuple[str, dict[str, Any]]]:
    """Their name of every tensor, and our parameters that it holds, one after another, in its order.

    Blocks come first to last behind what stands outside them; one of them is in memory at a time.
    """
    blocks = range(source.config.num_layers)
    for index in (None, *blocks):
        params = dict(source.outer() if index is None else source.block(index))
        for name in () if index is None else block_buffers(source.config, index):
            del params[name]
        for name, held in form.names.tensors(params, index).items():
            prefix = "" if held[0].startswith("head.") else form.prefix
            yield prefix + name, {ours: params[ours] for ours in held}


def dense_tensor(held: dict[str, Any], dtype: np.dtype | None) -> np.ndarray:
    """One of their tensors, from what it holds, dequantized, in their orientation."""
    parts = [_file_layout(ours, value, dtype) for ours, value in held.items()]
    return np.ascontiguousarray(np.concatenate(parts))


def _tensors(source: Source, form: HFFormat, dtype: np.dtype | None) -> Iterator[tuple[str, np.ndarray]]:
    for name, held in held_tensors(source, form):
        yield name, dense_tensor(held, dtype)


def _file_layout(name: str, value: Any, dtype: np.dtype | None) -> np.ndarray:
    """A parameter as files have it; a packed embedding lies as the weight of a product."""
    packed = isinstance(value, MixedTensor)
    dense = np.asarray(value.dequantize() if packed else value)
    dense = dense if dtype is None else dense.astype(dtype)
    return dense.T if packed and name == "embed" else file_layout(name, dense)
