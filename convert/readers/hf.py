"""Reader of Hugging Face directories: config.json and safetensors, one file or shards with an index."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from convert.errors import UNFIT, ConvertError, first_line, listed
from convert.families import by_architecture
from convert.families.family import Family, field
from convert.readers.source import ModelSource, file_origin, parse_dtype, sampled
from convert.tokenizer import load_tokenizer
from slim_jax.model.config import DecoderConfig
from slim_jax.store.hub import INDEX, SINGLE

READABLE = ("F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      ConvertError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise ConvertError(f"{path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path} is not JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise ConvertError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


class SafetensorsStore:
    """The tensors of a directory; a :class:`convert.readers.source.TensorStore`.

    Shards are mapped only while tensors are read, so that their pages do not count as our memory afterwards.

    Attributes:
      path: the directory.
      shapes: the shape of every tensor, by its name without the family's prefix.
      fingerprint: SHA-256 over sizes and headers of all shards, and up to 12 KiB of every tensor.
    """

    def __init__(self, directory: Path, prefixes: tuple[str, ...] = ()) -> None:
        """Reads the headers of all shards.

        Raises:
          ConvertError: a shard is missing, damaged or of an unsupported dtype, or the index names a tensor
            that no shard holds.
        """
        self.path = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        digest = hashlib.sha256()
        index = _index(directory)
        for shard in sorted(set(index.values())) if index else [SINGLE]:
            self._scan(directory / shard, index, prefixes)
            digest.update(_digest(directory / shard))
        stored = {name for _, name in self._places.values()}
        lost = [f"{name} ({shard})" for name, shard in index.items() if name not in stored]
        if lost:
            raise ConvertError(f"{directory / INDEX} names tensors that no file holds: {listed(lost)}")
        self.fingerprint = digest.hexdigest()

    def _scan(self, path: Path, index: dict[str, str], prefixes: tuple[str, ...]) -> None:
        if not path.is_file():
            raise ConvertError(f"{path} is missing" + (f", which {INDEX} names" if index else ""))
        try:
            with safe_open(path, framework="numpy") as shard:
                for name in shard.keys():  # noqa: SIM118
                    if index.get(name, path.name) != path.name:
                        continue
                    tensor, ours = shard.get_slice(name), _without_prefix(name, prefixes)
                    if tensor.get_dtype() not in READABLE:
                        raise ConvertError(
                            f"{path}: {name} is {tensor.get_dtype()}, expected one of {', '.join(READABLE)}"
                        )
                    if ours in self._places:
                        raise ConvertError(
                            f"{path}: {name} and {self._places[ours][1]} are the same parameter"
                        )
                    self.shapes[ours] = tuple(tensor.get_shape())
                    self._places[ours] = (path, name)
        except (SafetensorError, OSError) as error:
            raise ConvertError(f"{path} is truncated or no safetensors file: {first_line(error)}") from None

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """See :class:`convert.readers.source.TensorStore`. float16 becomes float32: TPUs cannot load it.

        Raises:
          ConvertError: a shard is missing or damaged.
        """
        by_shard: dict[Path, list[str]] = {}
        for name in names:
            by_shard.setdefault(self._places[name][0], []).append(name)
        tensors: dict[str, np.ndarray] = {}
        for path, wanted in by_shard.items():
            try:
                with safe_open(path, framework="numpy") as shard:
                    tensors |= {name: _loadable(shard.get_tensor(self._places[name][1])) for name in wanted}
            except (OSError, SafetensorError) as error:
                raise ConvertError(f"{path} cannot be read: {first_line(error)}") from None
        return tensors


def _loadable(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype == np.float16 else value


def _without_prefix(name: str, prefixes: tuple[str, ...]) -> str:
    return next((name[len(p) :] for p in prefixes if name.startswith(p)), name)


def _index(directory: Path) -> dict[str, str]:
    """Reads tensor name -> shard from the index; empty if the directory holds a single file.

    Raises:
      ConvertError: there are no safetensors, or the index is malformed.
    """
    if (directory / SINGLE).is_file():
        return {}
    if not (directory / INDEX).is_file():
        pickles = sorted(p.name for p in directory.iterdir() if p.name.startswith("pytorch_model"))
        if pickles:
            raise ConvertError(
                f"{directory} holds only {pickles[0]}, whose pickles are not read; save it as safetensors "
                "with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
            )
        raise ConvertError(f"{directory} has neither {SINGLE} nor {INDEX}")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{directory / INDEX} has no weight_map")
    outside = [str(s) for s in weight_map.values() if not isinstance(s, str) or Path(s).name != s]
    if outside:
        raise ConvertError(f"{directory / INDEX} names {outside[0]!r}, expected a file beside it")
    return weight_map


def _digest(path: Path) -> bytes:
    """Name, size, header and up to 12 KiB of every tensor of a shard, for the fingerprint."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
    tensors = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
    spans = [(8 + size + begin, end - begin) for begin, end in tensors]
    return f"{path.name} {path.stat().st_size}\n".encode() + header + sampled(path, spans)


def read_config(directory: Path) -> tuple[Family, DecoderConfig]:
    """Reads family and config of a Hugging Face directory, from its JSON files alone.

    Raises:
      ConvertError: config.json is missing or invalid, or the weights are already quantized.
    """
    path = directory / "config.json"
    if not path.is_file():
        others = sorted(p.name for p in directory.iterdir() if p.suffix == ".gguf")
        hint = f"; to read {others[0]}, give the file itself" if others else ""
        raise ConvertError(f"{directory} has no config.json{hint}")
    hf = read_json(path)
    if told := hf.get("quantization_config"):
        method = told.get("quant_method", "unknown") if isinstance(told, dict) else told
        raise ConvertError(
            f"{path}: the weights are quantized already ({method}), expected a plain checkpoint"
        )
    generation = directory / "generation_config.json"
    if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
        hf = {**hf, "eos_token_id": eos}
    try:
        architectures = field(hf, "architectures", list, []) or ["none"]
        family = by_architecture(str(architectures[0]))
        return family, family.hf.read_config(hf)
    except UNFIT as error:
        raise ConvertError(f"{path}: {first_line(error)}") from None


def load_hf(directory: Path, dtype: Any = None) -> ModelSource:
    """Opens the model of a Hugging Face directory.

    Args:
      directory: holds config.json and safetensors.
      dtype: float32 or bfloat16; None keeps the file's (float16 becomes float32).

    Raises:
      ConvertError: the directory, its config or its tensors are not what is expected.
    """
    family, config = read_config(directory)
    store = SafetensorsStore(directory, family.hf.prefixes)
    path = directory / "config.json"
    digest = hashlib.sha256(path.read_bytes() + store.fingerprint.encode()).hexdigest()
    return ModelSource(
        config,
        file_origin("hf", directory, digest),
        store,
        family.hf.names,
        lambda: load_tokenizer(directory),
        dtype=parse_dtype(dtype),
        ignored=family.hf.ignored,
    )
