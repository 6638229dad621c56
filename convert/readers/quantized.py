"""Weights of checkpoints that are quantized already, dequantized tensor by tensor while they are read.

One function per method finds the weights among the stored tensors; `convert.readers.decoders` has the
arithmetic. The formats are those of transformers' quantizers of the same names:

    fp8                 weight float8[N, K], and weight_scale_inv: a scale per tensor, or per block of weights
    mxfp4               NAME_blocks uint8[..., R, G, 16], NAME_scales uint8[..., R, G], exponents of 2
    gptq                qweight int32[K b / 32, N], qzeros int32[G, N b / 32], scales[G, N], g_idx int32[K]
    awq                 qweight int32[K, N / 8], qzeros int32[G, N / 8], scales[G, N]
    compressed-tensors  weight_packed int32[N, K b / 32], or weight int8 or float8[N, K]; weight_scale[N, G]
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from convert.errors import ConvertError
from convert.families.family import count, field
from convert.readers.decoders import awq, gptq, mxfp4, pack_quantized, scaled

AUXILIARY = re.compile(
    r".*((weight|_proj)_(scale_inv|scale|zero_point|shape|g_idx)|[._](activation|input|output)_scale"
    r"|\.[kqv]_scale|_blocks|_scales|\.(scales|qzeros|g_idx))"
)
"""Names of tensors that a weight is made from, or that are for activations and caches; others are weights."""


UNPACKED = ("int-quantized", "float-quantized", "naive-quantized")
"""Formats of compressed-tensors that store a code per weight."""


@runtime_checkable
class RawStore(Protocol):
    """The stored tensors; see `convert.readers.hf.SafetensorsStore`."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Reads tensors of plain types."""
        ...

    def raw(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Reads tensors in their stored types."""
        ...


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight to be dequantized.

    Attributes:
      shape: its shape.
      parts: names of the stored tensors, in the order of the decoder's arguments.
      decode: function from those tensors to the weight, float32 or bfloat16.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    decode: Callable[..., np.ndarray]


class DequantizingStore:
    """Dequantized tensors of a checkpoint; a :class:`convert.readers.source.TensorStore`.

    Attributes:
      path: the directory.
      shapes: the shape of every dequantized or plain tensor.
      quantized: the method in words; empty if no weight is quantized.
    """

    def __init__(self, store: RawStore, told: Any, dtype: np.dtype | None = None) -> None:
        """Finds the quantized weights by their names.

        Args:
          store: the stored tensors.
          told: ``quantization_config`` of config.json.
          dtype: type of the weights; None for float32, and bfloat16 where that holds them exactly.

        Raises:
          ConvertError: the method is not supported, or tensors are missing.
        """
        words = describe(told)
        self.path, self._store, self._dtype = store.path, store, dtype
        self._weights = METHODS[told["quant_method"]](store, told)
        self.quantized = words if self._weights else ""
        parts = {part for weight in self._weights.values() for part in weight.parts}
        self.shapes = {name: weight.shape for name, weight in self._weights.items()}
        for name, shape in store.shapes.items():
            if name not in parts and name not in self.shapes and not AUXILIARY.fullmatch(name):
                self.shapes[name] = shape

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """See :class:`convert.readers.source.TensorStore`."""
        names = list(names)
        found = self._store.read([name for name in names if name not in self._weights])
        weights = {name: self._weights[name] for name in names if name in self._weights}
        raw = self._store.raw([part for weight in weights.values() for part in weight.parts])
        for name, weight in weights.items():
            value = weight.decode(*map(raw.pop, weight.parts))
            found[name] = value if self._dtype is None else value.astype(self._dtype, copy=False)
        return found


def describe(told: Any) -> str:
    """Returns the method of a ``quantization_config`` in words.

    Raises:
      ConvertError: the method, or a variant of it, is not supported.
    """
    if not isinstance(told, dict):
        raise ConvertError(f"quantization_config is {told!r}, expected an object")
    name = told.get("quant_method", "unknown")
    if not isinstance(name, str) or name not in METHODS:
        raise ConvertError(
            f"the weights are quantized by {name}, which is not read; expected {', '.join(METHODS)}"
            " or a plain checkpoint"
        )
    try:
        return VARIANTS[name](told)
    except ConvertError as error:
        raise ConvertError(f"quantization_config of {name}: {error}") from None


def _groups(told: Mapping[str, Any]) -> str:
    size = field(told, "group_size", int, 128)
    return f"{count(told, 'bits')} bits, " + (f"groups of {size}" if size > 0 else "whole rows")


def _fp8_variant(told: Mapping[str, Any]) -> str:
    block = field(told, "weight_block_size", list, None)
    return f"FP8, a scale per {' x '.join(map(str, block))} weights" if block else "FP8"


def _gptq_variant(told: Mapping[str, Any]) -> str:
    bits, form = count(told, "bits"), field(told, "checkpoint_format", str, "gptq")
    if bits not in (2, 3, 4, 8):
        raise ConvertError(f"bits is {bits}, expected 2, 3, 4 or 8")
    if form not in ("gptq", "gptq_v2"):
        raise ConvertError(f"checkpoint_format is {form!r}, expected gptq or gptq_v2")
    return f"GPTQ, {_groups(told)}"


def _awq_variant(told: Mapping[str, Any]) -> str:
    bits, version = count(told, "bits"), field(told, "version", str, "gemm").lower()
    if bits != 4 or version != "gemm":
        raise ConvertError(f"it has {bits} bits and version {version}, expected 4 bits and gemm")
    return f"AWQ, {_groups(told)}"


def _schemes(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the schemes of weights in a config of compressed-tensors."""
    groups = field(told, "config_groups", dict, {}).values()
    return [field(group, "weights", dict, {}) for group in groups if isinstance(group, dict)]


def _compressed_variant(told: Mapping[str, Any]) -> str:
    form = field(told, "format", str)
    widths = {scheme.get("num_bits") for scheme in _schemes(told)}
    words = f"{form}, {' and '.join(map(str, sorted(widths, key=str)))} bits"
    if form != "pack-quantized" and form not in UNPACKED:
        raise ConvertError(f"format is {form}, expected one of {', '.join(('pack-quantized', *UNPACKED))}")
    if form == "pack-quantized" and (len(widths) != 1 or not widths <= {2, 4, 8}):
        raise ConvertError(f"it is {words}, expected one width of 2, 4 or 8 bits")
    return f"compressed-tensors, {words}"


def _fp8(store: RawStore, told: Mapping[str, Any]) -> dict[str, Weight]:
    block = field(told, "weight_block_size", list, None)
    found = {}
    for name in [name for name, dtype in store.dtypes.items() if dtype in ("F8_E4M3", "F8_E5M2", "I8")]:
        if AUXILIARY.fullmatch(name):
            continue
        scale = next((name + end for end in ("_scale_inv", "_scale") if name + end in store.shapes), None)
        if scale is None:
            raise ConvertError(f"{store.path}: {name} is {store.dtypes[name]} without {name}_scale_inv")
        zero = (f"{name}_zero_point",) if f"{name}_zero_point" in store.shapes else ()
        sizes = tuple(block) if block else None
        found[name] = Weight(
            store.shapes[name],
            (name, scale, *zero),
            lambda value, scale, zero=None, sizes=sizes: scaled(value, scale, sizes, zero),
        )
    return found


def _mxfp4(store: RawStore, told: Mapping[str, Any]) -> dict[str, Weight]:
    found = {}
    for name in [name.removesuffix("_blocks") for name in store.shapes if name.endswith("_blocks")]:
        if f"{name}_scales" not in store.shapes:
            raise ConvertError(f"{store.path}: {name}_blocks is there without {name}_scales")
        *lead, rows, groups, half = store.shapes[f"{name}_blocks"]
        found[name] = Weight((*lead, groups * 2 * half, rows), (f"{name}_blocks", f"{name}_scales"), mxfp4)
    return found


def _gptq(store: RawStore, told: Mapping[str, Any]) -> dict[str, Weight]:
    bits, size = count(told, "bits"), field(told, "group_size", int, 128)
    first = field(told, "checkpoint_format", str, "gptq") == "gptq"
    found = {}
    for prefix in _prefixes(store, "qweight", ("qzeros", "scales")):
        words, columns = store.shapes[prefix + "qweight"]
        index = (prefix + "g_idx",) if prefix + "g_idx" in store.shapes else ()
        found[prefix + "weight"] = Weight(
            (columns, words * 32 // bits),
            (prefix + "qweight", prefix + "qzeros", prefix + "scales", *index),
            lambda *parts: gptq(*parts, bits=bits, size=size, offset=int(first)),
        )
    return found


def _awq(store: RawStore, told: Mapping[str, Any]) -> dict[str, Weight]:
    size = field(told, "group_size", int, 128)
    found = {}
    for prefix in _prefixes(store, "qweight", ("qzeros", "scales")):
        rows, words = store.shapes[prefix + "qweight"]
        parts = (prefix + "qweight", prefix + "qzeros", prefix + "scales")
        found[prefix + "weight"] = Weight((words * 8, rows), parts, lambda *parts: awq(*parts, size=size))
    return found


def _compressed(store: RawStore, told: Mapping[str, Any]) -> dict[str, Weight]:
    schemes = _schemes(told)
    if told["format"] in UNPACKED:
        blocks = {tuple(block) for scheme in schemes if (block := scheme.get("block_structure"))}
        return _fp8(store, {"weight_block_size": list(blocks.pop()) if len(blocks) == 1 else None})
    bits = int(schemes[0]["num_bits"])
    found = {}
    for prefix in _prefixes(store, "weight_packed", ("weight_scale", "weight_shape")):
        rows, words = store.shapes[prefix + "weight_packed"]
        more = [part for part in ("weight_zero_point", "weight_g_idx") if prefix + part in store.shapes]
        parts = ("weight_packed", "weight_scale", "weight_shape", *more)
        found[prefix + "weight"] = Weight(
            (rows, words * 32 // bits),
            tuple(prefix + part for part in parts),
            lambda packed, scale, shape, *rest, more=tuple(more): pack_quantized(
                packed, scale, shape, **dict(zip(more, rest)), bits=bits
            ),
        )
    return found


def _prefixes(store: RawStore, last: str, needed: tuple[str, ...]) -> list[str]:
    """Returns the prefixes of the layers that have a tensor ``last``.

    Raises:
      ConvertError: one of the tensors that belong to it is missing.
    """
    prefixes = [name.removesuffix(last) for name in store.shapes if name.endswith("." + last)]
    missing = [prefix + part for prefix in prefixes for part in needed if prefix + part not in store.shapes]
    if missing:
        raise ConvertError(f"{store.path}: {missing[0]} is missing, expected beside {last}")
    return prefixes


METHODS: dict[str, Callable[[RawStore, Mapping[str, Any]], dict[str, Weight]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
}
"""Functions that find the weights of a method among the stored tensors."""

VARIANTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "fp8": _fp8_variant,
    "mxfp4": lambda told: "MXFP4",
    "compressed-tensors": _compressed_variant,
    "gptq": _gptq_variant,
    "awq": _awq_variant,
}
"""Functions that refuse variants of a method, and put others into words."""
