"""Reader of Hugging Face directories: config.json and safetensors, one file or shards with an index."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.errors import UNFIT, ConvertError, first_line, listed
from convert.families import by_architecture
from convert.families.family import Family, field
from convert.readers.config import read_resolved, sections
from convert.readers.quantized import AUXILIARY, DequantizingStore, describe
from convert.readers.source import (
    FURTHER,
    ModelSource,
    TensorStore,
    blocks_after,
    count_left_out,
    file_origin,
    parse_dtype,
    sampled,
)
from convert.tokenizer import load_tokenizer
from slim_jax.model.config import DecoderConfig
from slim_jax.store.hub import INDEX, SINGLE

READABLE = ("F32", "F16", "BF16")

EIGHT_BITS = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
"""Types that safetensors does not give as NumPy arrays."""

LEFT_OUT = {
    "projector": r"(.*\.)?(multi_modal_projector|mm_projector|embed_vision|embed_audio|visual\.merger)\..*",
    "vision tower": r"(.*\.)?(visual|vision_tower|vision_model|vision_encoder)\..*",
    "audio tower": r"(.*\.)?(audio_tower|audio_model|audio_encoder)\..*",
    FURTHER: r"(.*\.)?mtp\..*",
}
"""Kinds of tensors that no text model reads -> patterns of their names."""


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
      dtypes: the type of every tensor, as safetensors names it.
      fingerprint: SHA-256 over sizes and headers of all shards, and up to 12 KiB of every tensor.
    """

    def __init__(self, directory: Path, prefixes: tuple[str, ...] = (), *, any_dtype: bool = False) -> None:
        """Reads the headers of all shards.

        Args:
          directory: holds one file, or shards and an index.
          prefixes: prefixes that are taken off names.
          any_dtype: if True, tensors may have types that only :meth:`raw` can read.

        Raises:
          ConvertError: a shard is missing, damaged or of an unsupported dtype, or the index names a tensor
            that no shard holds.
        """
        self.path = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        self._any_dtype = any_dtype
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
                    if tensor.get_dtype() not in READABLE and not self._any_dtype:
                        raise ConvertError(
                            f"{path}: {name} is {tensor.get_dtype()}, expected one of {', '.join(READABLE)}"
                        )
                    if ours in self._places:
                        raise ConvertError(
                            f"{path}: {name} and {self._places[ours][1]} are the same parameter"
                        )
                    self.shapes[ours] = tuple(tensor.get_shape())
                    self.dtypes[ours] = tensor.get_dtype()
                    self._places[ours] = (path, name)
        except (SafetensorError, OSError) as error:
            raise ConvertError(f"{path} is truncated or no safetensors file: {first_line(error)}") from None

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """See :class:`convert.readers.source.TensorStore`. float16 becomes float32: TPUs cannot load it.

        Raises:
          ConvertError: a shard is missing or damaged.
        """
        return {
            name: value.astype(np.float32) if value.dtype == np.float16 else value
            for name, value in self.raw(names).items()
        }

    def raw(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Reads tensors in their stored types.

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
                    for name in wanted:
                        if self.dtypes[name] in EIGHT_BITS:
                            tensors[name] = self._eight_bits(name)
                        else:
                            tensors[name] = shard.get_tensor(self._places[name][1])
            except (OSError, SafetensorError) as error:
                raise ConvertError(f"{path} cannot be read: {first_line(error)}") from None
        return tensors

    def _eight_bits(self, name: str) -> np.ndarray:
        (path, stored), shape = self._places[name], self.shapes[name]
        offset = _offsets(path, path.stat().st_mtime_ns)[stored]
        flat = np.fromfile(path, EIGHT_BITS[self.dtypes[name]], math.prod(shape), offset=offset)
        return flat.reshape(shape)


def _header(path: Path) -> tuple[int, bytes]:
    """Returns the offset of a shard's data, and its header as JSON."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, file.read(size)


@functools.lru_cache(maxsize=4)
def _offsets(path: Path, changed: int) -> dict[str, int]:
    """Returns the offset of each tensor of a shard that was last ``changed`` then."""
    start, header = _header(path)
    entries = json.loads(header)
    return {name: start + entry["data_offsets"][0] for name, entry in entries.items() if "dtype" in entry}


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
    start, header = _header(path)
    tensors = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
    spans = [(start + begin, end - begin) for begin, end in tensors]
    return f"{path.name} {path.stat().st_size}\n".encode() + header + sampled(path, spans)


def read_config(directory: Path) -> tuple[Family, DecoderConfig]:
    """Reads family and config of a Hugging Face directory, from its JSON files alone.

    Raises:
      ConvertError: config.json is missing or invalid, or the weights are quantized in a way that is not read.
    """
    path = directory / "config.json"
    if not path.is_file():
        others = sorted(p.name for p in directory.iterdir() if p.suffix == ".gguf")
        hint = f"; to read {others[0]}, give the file itself" if others else ""
        raise ConvertError(f"{directory} has no config.json{hint}")
    hf = read_json(path)
    generation = directory / "generation_config.json"
    if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
        hf = {**hf, "eos_token_id": eos}
    try:
        if told := _quantization(hf):
            describe(told)  # which refuses what cannot be read
        architectures = field(hf, "architectures", list, []) or ["none"]
        family = by_architecture(str(architectures[0]))
        config = read_resolved(hf, family.hf)
    except UNFIT as error:
        raise ConvertError(f"{path}: {first_line(error)}") from None
    if config.tied_head and not any("tie_word_embeddings" in part for part in sections(hf)):
        head, names = family.hf.names.of("head.weight"), _tensor_names(directory)
        if any(_without_prefix(name, family.hf.prefixes) == head for name in names):
            config = dataclasses.replace(config, tied_head=False)
    return family, config


def _quantization(hf: dict[str, Any]) -> Any:
    """Returns the ``quantization_config`` of config.json or of its text tower; None if there is none."""
    for part in sections(hf):
        if told := part.get("quantization_config") or part.get("compression_config"):
            return told
    return None


def _tensor_names(directory: Path) -> list[str]:
    """Returns the names of the stored tensors, by the index alone if there is one; none without weights."""
    if (directory / INDEX).is_file() and not (directory / SINGLE).is_file():
        return list(_index(directory))
    try:
        header = json.loads(_header(directory / SINGLE)[1])
    except (OSError, ValueError, MemoryError, OverflowError, RecursionError):
        return []  # a damaged file is reported where weights are read
    return [name for name in header if name != "__metadata__"] if isinstance(header, dict) else []


def _left_out_kinds(hf: dict[str, Any], config: DecoderConfig, blocks: str) -> dict[str, str]:
    """Returns the kinds of tensors that are not read; extra blocks predict several tokens at once."""
    more = field(sections(hf)[-1], "num_nextn_predict_layers", int, 0)
    extra = blocks_after(blocks, config.num_layers, more)
    return {**LEFT_OUT, FURTHER: f"{LEFT_OUT[FURTHER]}|{extra}"}


def notes(directory: Path, family: Family, config: DecoderConfig) -> dict[str, Any]:
    """Returns ``left_out`` and ``quantized`` of :attr:`ModelSource.origin`, by the JSON files alone.

    Without an index, the header of the weights' file is read if it is here.
    """
    names = [_without_prefix(name, family.hf.prefixes) for name in _tensor_names(directory)]
    hf = read_json(directory / "config.json")
    if told := _quantization(hf):
        names = [name for name in names if not AUXILIARY.fullmatch(name)]
    counts = count_left_out(names, _left_out_kinds(hf, config, family.hf.names.blocks))[1]
    return {**({"left_out": counts} if counts else {}), **({"quantized": describe(told)} if told else {})}


def load_hf(directory: Path, dtype: Any = None) -> ModelSource:
    """Opens the model of a Hugging Face directory.

    Args:
      directory: holds config.json and safetensors.
      dtype: float32 or bfloat16; None keeps the file's (float16 becomes float32).

    Raises:
      ConvertError: the directory, its config or its tensors are not what is expected.
    """
    family, config = read_config(directory)
    path = directory / "config.json"
    hf = read_json(path)
    told = _quantization(hf)
    stored = SafetensorsStore(directory, family.hf.prefixes, any_dtype=bool(told))
    digest = hashlib.sha256(path.read_bytes() + stored.fingerprint.encode()).hexdigest()
    origin = file_origin("hf", directory, digest)
    store: TensorStore = stored
    if told:
        store = dequantizing = DequantizingStore(stored, told, parse_dtype(dtype))
        if dequantizing.quantized:
            origin["quantized"] = dequantizing.quantized
    return ModelSource(
        config,
        origin,
        store,
        (family.hf.names, *family.hf.others),
        lambda: load_tokenizer(directory),
        dtype=parse_dtype(dtype),
        ignored=family.hf.ignored,
        left_out=_left_out_kinds(hf, config, family.hf.names.blocks),
    )
