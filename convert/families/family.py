"""The records that a family file fills in, which map others' configs and tensor names to ours.

This module knows no family and reads no file.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from convert.errors import ConvertError
from slim_jax.model.config import DecoderConfig

REQUIRED: Any = object()
"""Default of :func:`field` for a key that must be there."""

HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class Names:
    """Table of a format's names for the decoder's modules.

    Our parameter ``attn.q.weight`` of block 3 is called ``blocks.format(3) + block["attn.q"] + ".weight"`` in
    the format. The ``scale`` of a norm is called ``weight`` there. Where several of our modules map to one of
    the format's, its tensor holds their output features one after another, in the table's order. ``{}``
    stands for the index of an expert on both sides.

    Attributes:
      outer: our modules outside the blocks -> the format's, such as ``"norm" -> "norm"``.
      blocks: the prefix of a block, with ``{}`` for its index.
      block: our modules inside a block -> the format's. A whole parameter may stand there too, with all of
        the format's name.
      alternating: our modules whose output features take turns with those of the other modules in the
        format's tensor -> the field of our config that says how often.
    """

    outer: Mapping[str, str]
    blocks: str
    block: Mapping[str, str]
    alternating: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def of(self, ours: str, index: int | None = None) -> str:
        """Returns the format's name of our parameter ``ours``, outside the blocks or in block ``index``."""
        module, _, leaf = ours.rpartition(".")
        if not module:  # embeddings are bare parameters
            module = leaf
        suffix = "bias" if leaf == "bias" else "weight"
        if index is None:
            return f"{self.outer[module]}.{suffix}"
        if ours in self.block:
            return self.blocks.format(index) + self.block[ours]
        pattern, expert = _pattern(module)
        return f"{self.blocks.format(index)}{self.block[pattern].format(*expert)}.{suffix}"

    def tensors(self, ours: Iterable[str], index: int | None = None) -> dict[str, list[str]]:
        """Returns the format's tensors that hold our parameters, each with its parameters in stored order."""
        order = {module: i for i, module in enumerate(self.outer if index is None else self.block)}
        held: dict[str, list[str]] = {}
        for name in sorted(ours, key=lambda name: order.get(_pattern(name.rpartition(".")[0])[0], -1)):
            held.setdefault(self.of(name, index), []).append(name)
        return held

    def turns(self, ours: Iterable[str], config: DecoderConfig) -> int:
        """Returns how often the features of our parameters take turns in the tensor that holds them all."""
        modules = {_pattern(name.rpartition(".")[0])[0] for name in ours}
        fields = {field for module, field in self.alternating.items() if module in modules}
        return getattr(config, fields.pop()) if fields else 1


def split_rows(tensor: np.ndarray, sizes: Sequence[int], turns: int) -> list[np.ndarray]:
    """Splits a tensor into parts of ``sizes`` rows, which take turns in it."""
    each = tensor.reshape(turns, -1, *tensor.shape[1:])
    ends = np.cumsum([size // turns for size in sizes])
    return [part.reshape(-1, *tensor.shape[1:]) for part in np.split(each, ends[:-1], axis=1)]


def join_rows(parts: Sequence[np.ndarray], turns: int) -> np.ndarray:
    """Inverse of :func:`split_rows`."""
    each = [part.reshape(turns, -1, *part.shape[1:]) for part in parts]
    return np.concatenate(each, axis=1).reshape(-1, *parts[0].shape[1:])


def _pattern(module: str) -> tuple[str, list[str]]:
    """Splits ``moe.experts.3.up`` into ``moe.experts.{}.up`` and the indices."""
    return re.sub(r"\d+", "{}", module), re.findall(r"\d+", module)


@dataclasses.dataclass(frozen=True)
class HFFormat:
    """A family's format in Hugging Face checkpoints.

    Attributes:
      architectures: the values of ``architectures`` in config.json that this format serves.
      read_config: maps config.json, as a dictionary, to our config.
      write_config: the inverse; the result names the architecture.
      names: tensor names without the prefix.
      prefix: put before every name but the LM head's on writing.
      prefixes: prefixes that a name may have on reading, longest first.
      ignored: patterns of names that hold no parameter.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    write_config: Callable[[DecoderConfig], dict[str, Any]]
    names: Names
    prefix: str
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class GGUFFormat:
    """A family's format in llama.cpp's GGUF files.

    Attributes:
      architectures: the values of ``general.architecture`` that this format serves.
      read_config: maps metadata (without the ``architecture.`` prefix) and the tensor store, which has shapes
        ``[N, K]`` and reads small tensors, to our config.
      names: tensor names.
      interleaved: our modules whose output rows are interleaved for llama.cpp's rotary embedding.
      ignored: patterns of names that hold no parameter.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any], Any], DecoderConfig]
    names: Names
    interleaved: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of decoders; ``name`` is what :class:`DecoderConfig` calls it."""

    name: str
    hf: HFFormat
    gguf: GGUFFormat | None = None


def field(config: Mapping[str, Any], key: str, kind: type, default: Any = REQUIRED) -> Any:
    """Returns the value of ``key``, checked to be a ``kind``; null and absence give the default.

    Raises:
      ConvertError: the key is missing and has no default, or holds another type.
    """
    value = config.get(key)
    if value is None:
        if default is REQUIRED:
            raise ConvertError(f"{key} is missing, expected {kind.__name__}")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise ConvertError(f"{key} is {value!r}, expected {kind.__name__}")
    return value


def optional(config: Mapping[str, Any], key: str, kind: type, absent: Any) -> Any:
    """Like :func:`field`, but null means None and only absence gives the default.

    Raises:
      ConvertError: the key holds another type.
    """
    return field(config, key, kind, None) if key in config else absent


def count(config: Mapping[str, Any], key: str, default: Any = REQUIRED) -> int:
    """Returns the value of ``key``, a positive integer; null and absence give the default.

    Raises:
      ConvertError: the key is missing and has no default, or holds something else.
    """
    value: int = field(config, key, int, default)
    if value < 1:
        raise ConvertError(f"{key} is {value}, expected a positive number")
    return value


def require(config: Mapping[str, Any], key: str, expected: Any, default: Any) -> None:
    """Refuses a model whose ``key`` has another value than the only one that the decoder implements.

    Raises:
      ConvertError: it has another value.
    """
    value = config.get(key, default)
    if value != expected:
        raise ConvertError(f"{key} is {value!r}, only {expected!r} is supported")


def activation(config: Mapping[str, Any], key: str, default: str) -> Any:
    """Returns our name of the activation function that Hugging Face's config names under ``key``.

    Raises:
      ConvertError: the decoder does not know it.
    """
    name = field(config, key, str, default)
    if name not in HF_ACTIVATIONS:
        raise ConvertError(f"{key} is {name!r}, expected one of {', '.join(HF_ACTIVATIONS)}")
    return HF_ACTIVATIONS[name]


def hf_activation(config: DecoderConfig) -> str:
    """Inverse of :func:`activation`."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)


LAYER_TYPES = {"full_attention": False, "sliding_attention": True}
"""Hugging Face's names of attention kinds -> whether attention has a window."""


def read_windows(
    hf: Mapping[str, Any], window: int | None, default: Sequence[bool]
) -> tuple[int | None, tuple[int, ...]]:
    """Reads ``sliding_window`` and ``global_layers`` of our config.

    Args:
      hf: config.json, whose ``layer_types`` say which blocks have the window.
      window: size of the window in tokens; None for no window.
      default: whether each block has the window, where there are no ``layer_types``.

    Raises:
      ConvertError: ``layer_types`` names another kind of attention, or not one per block.
    """
    kinds = field(hf, "layer_types", list, None)
    layers = count(hf, "num_hidden_layers")
    if kinds is not None:
        unknown = [kind for kind in kinds if not isinstance(kind, str) or kind not in LAYER_TYPES]
        if unknown:
            raise ConvertError(f"layer_types has {unknown[0]!r}, expected {' or '.join(LAYER_TYPES)}")
        if len(kinds) != layers:
            raise ConvertError(f"layer_types has {len(kinds)} entries, expected num_hidden_layers = {layers}")
    local = default if kinds is None else [LAYER_TYPES[kind] for kind in kinds]
    if window is None or not any(local):
        return None, ()
    return window, tuple(i for i in range(layers) if not local[i])


def layer_types(config: DecoderConfig) -> list[str]:
    """Inverse of :func:`read_windows`."""
    windowed = config.sliding_window is not None
    return [
        "sliding_attention" if windowed and i not in config.global_layers else "full_attention"
        for i in range(config.num_layers)
    ]


def token_ids(value: Any) -> tuple[int, ...]:
    """Reads Hugging Face's ``eos_token_id``: one id, a list of ids, or null.

    Raises:
      ConvertError: it is something else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int for id in ids):
        raise ConvertError(f"the id of the last token is {value!r}, expected a number or several")
    return tuple(ids)


def one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    """Inverse of :func:`token_ids`."""
    return ids[0] if len(ids) == 1 else list(ids) or None
