"""Reader of GGUF files: metadata, tensor table, and tensors dequantized to float32.

The header is parsed here, in about 0.1 s for a vocabulary of 49,152; the `gguf` package's reader takes
seconds and keeps the file mapped. Block formats and their arithmetic come from that package.
"""

import hashlib
import math
import mmap
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from convert.errors import UNFIT, ConvertError, first_line
from convert.families import by_gguf
from convert.families.family import field
from convert.readers.source import FURTHER, ModelSource, blocks_after, file_origin, parse_dtype, sampled
from convert.tokenizer import gguf_tokenizer

MAGIC, VERSIONS = b"GGUF", (2, 3)

FLOATS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)

ROWS = 8192
"""Rows of a tensor that are dequantized at once."""

NUMBER_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


class _Cursor:
    """Reads little-endian values one after another; raises ``struct.error`` past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def numbers(self, format: str, count: int = 1) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{format}")
        values = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return values

    def string(self) -> str:
        (size,) = self.numbers("Q")
        if self.at + size > len(self.data):
            raise struct.error("a string reaches past the end of the file")
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.numbers(NUMBER_FORMATS[GGUFValueType(kind)])[0]
        item, count = self.numbers("I")[0], self.numbers("Q")[0]
        if item == GGUFValueType.ARRAY:
            raise ValueError("the metadata has an array of arrays, expected numbers or strings")
        if item == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        return list(self.numbers(NUMBER_FORMATS[GGUFValueType(item)], count))


class GGUFStore:
    """The tensors of a GGUF file; a :class:`convert.readers.source.TensorStore`.

    Attributes:
      path: the file.
      metadata: all of its key-value pairs.
      shapes: the shape of every tensor, in NumPy's order (linear weights ``[N, K]``).
      fingerprint: SHA-256 over size, header and up to 12 KiB of every tensor.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
          ConvertError: the file is no GGUF, is truncated, or has another version or an unknown block format.
        """
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[GGMLQuantizationType, int]] = {}
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != MAGIC:
                raise ConvertError(f"{path} is no GGUF file: it begins with {magic!r}, expected {MAGIC!r}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                try:
                    begin = self._parse(_Cursor(data))
                except (struct.error, OverflowError, MemoryError):
                    raise ConvertError(f"{path} is truncated: its header ends early") from None
                except ValueError as error:
                    raise ConvertError(f"{path}: {first_line(error)}") from None
                for name, (_, offset) in self._places.items():
                    if (end := offset + self._nbytes(name)) > size:
                        raise ConvertError(
                            f"{path} is truncated: {name} ends at byte {end}, the file at {size}"
                        )
                digest = hashlib.sha256(str(size).encode() + data[:begin])
        digest.update(sampled(path, [(at, self._nbytes(name)) for name, (_, at) in self._places.items()]))
        self.fingerprint = digest.hexdigest()

    def _parse(self, cursor: _Cursor) -> int:
        """Fills metadata and tensor table; returns the offset of the data."""
        cursor.at = len(MAGIC)
        (version,) = cursor.numbers("I")
        if version not in VERSIONS:
            raise ConvertError(f"GGUF version is {version}, expected one of {VERSIONS}")
        tensors, pairs = cursor.numbers("Q", 2)
        for _ in range(pairs):
            key = cursor.string()
            if key in self.metadata:
                raise ValueError(f"the metadata has {key} twice, expected once")
            self.metadata[key] = cursor.value(cursor.numbers("I")[0])
        for _ in range(tensors):
            name = cursor.string()
            if name in self.shapes:
                raise ValueError(f"there are two tensors {name}, expected one")
            self.shapes[name] = tuple(reversed(cursor.numbers("Q", cursor.numbers("I")[0])))
            kind, offset = GGMLQuantizationType(cursor.numbers("I")[0]), cursor.numbers("Q")[0]
            self._places[name] = (kind, offset)
            if math.prod(self.shapes[name][-1:]) % GGML_QUANT_SIZES[kind][0]:
                shape, block = list(self.shapes[name]), GGML_QUANT_SIZES[kind][0]
                raise ValueError(f"{name} is {shape} of {kind.name}, expected rows of {block}-weight blocks")
        alignment = field(self.metadata, "general.alignment", int, 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment}, expected a power of two")
        begin = -(-cursor.at // alignment) * alignment
        self._places = {name: (kind, begin + offset) for name, (kind, offset) in self._places.items()}
        return begin

    @property
    def quantized(self) -> str:
        """The types of the quantized tensors, the one with most weights first; empty if there are none."""
        sizes: dict[str, int] = {}
        for name, (kind, _) in self._places.items():
            if kind not in FLOATS:
                sizes[kind.name] = sizes.get(kind.name, 0) + math.prod(self.shapes[name])
        return f"GGUF, {', '.join(sorted(sizes, key=lambda kind: -sizes[kind]))}" if sizes else ""

    def _nbytes(self, name: str) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self._places[name][0]]
        return math.prod(self.shapes[name]) // block * block_bytes

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """See :class:`convert.readers.source.TensorStore`. All but bfloat16 are returned as float32.

        Raises:
          ConvertError: a tensor has a block format that cannot be dequantized.
        """
        return {name: self._tensor(name) for name in names}

    def _tensor(self, name: str) -> np.ndarray:
        kind, offset = self._places[name]
        raw = np.fromfile(self.path, np.uint8, self._nbytes(name), offset=offset)
        shape = self.shapes[name]
        if kind == GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(shape)
        if kind == GGMLQuantizationType.F16:
            return raw.view(np.float16).reshape(shape).astype(np.float32)
        if kind == GGMLQuantizationType.BF16:
            return raw.view(ml_dtypes.bfloat16).reshape(shape)
        try:
            rows, found = raw.reshape(math.prod(shape[:-1]), -1), np.empty(shape, np.float32)
            # Some rows at a time: dequantize makes several copies of its input.
            for start in range(0, len(rows), ROWS):
                part = slice(start, start + ROWS)
                found.reshape(len(rows), -1)[part] = dequantize(rows[part], kind)
            return found
        except (NotImplementedError, ValueError):
            raise ConvertError(f"{self.path}: {name} is {kind.name}, which cannot be dequantized") from None


def load_gguf(path: Path, dtype: Any = None) -> ModelSource:
    """Opens the model of a GGUF file.

    Args:
      path: the file.
      dtype: float32 or bfloat16; None keeps bfloat16 and gives float32 for everything else.

    Raises:
      ConvertError: the file, its family or its tensors are not what is expected.
    """
    store = GGUFStore(path)
    try:
        architecture = str(store.metadata.get("general.architecture"))
        form = by_gguf(architecture)
        own = f"{architecture}."
        meta = {k.removeprefix(own): v for k, v in store.metadata.items()}
        config = form.read_config(meta, store)
        further = field(meta, "nextn_predict_layers", int, 0)
    except UNFIT as error:
        raise ConvertError(f"{path}: {first_line(error)}") from None
    origin = file_origin("gguf", path, store.fingerprint)
    if store.quantized:
        origin["quantized"] = store.quantized
    return ModelSource(
        config,
        origin,
        store,
        (form.names, *form.others),
        lambda: gguf_tokenizer(store.metadata, str(path)),
        dtype=parse_dtype(dtype),
        ignored=form.ignored,
        left_out={FURTHER: blocks_after(form.names.blocks, config.num_layers, further)},
        restore=form.restore,
        norm_offset=config.norm_offset,
    )
