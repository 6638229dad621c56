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
from slim_jax.model.config import DecoderConfig, Kind

Restore = Callable[[np.ndarray, DecoderConfig], np.ndarray]
"""Function that turns a stored array, linear weights ``[N, K]``, into the one that our parameter has."""

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
    stands for the index of an expert on both sides; where the format's name lacks it, the experts lie along a
    leading axis of its tensor.

    A table may also name a parameter of ours, such as ``attn.a_log`` or ``moe.experts.{}.up.weight``: then
    the format's name is that of the whole tensor, without ``.weight`` or ``.bias``.

    Attributes:
      outer: our modules outside the blocks -> the format's, such as ``"norm" -> "norm"``.
      blocks: the prefix of a block, with ``{}`` for its index.
      block: our modules inside a block -> the format's.
      transposed: names of the format, as in ``block``, whose matrices are ``[K, N]`` rather than ``[N, K]``.
      grouped: names of the format whose tensors hold several modules by groups -> the field of our config
        that counts the groups. A group has an equal part of the output features of each module in turn:
        ``num_heads`` where each head's queries precede its gates, ``intermediate_size`` where they alternate.
    """

    outer: Mapping[str, str]
    blocks: str
    block: Mapping[str, str]
    transposed: tuple[str, ...] = ()
    grouped: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def of(self, ours: str, index: int | None = None) -> str:
        """Returns the format's name of our parameter ``ours``, outside the blocks or in block ``index``."""
        entry, suffix = self.entry(ours, index)
        prefix = "" if index is None else self.blocks.format(index)
        return prefix + entry.format(*_pattern(ours)[1]) + suffix

    def entry(self, ours: str, index: int | None = None) -> tuple[str, str]:
        """Returns the table's entry for our parameter ``ours``, and the suffix that completes the name."""
        table = self.outer if index is None else self.block
        key = self._key(ours, table)
        if key == _pattern(ours)[0] and "." in key:
            return table[key], ""
        return table[key], ".bias" if ours.endswith(".bias") else ".weight"

    def _key(self, ours: str, table: Mapping[str, str]) -> str:
        """Returns the key of our parameter ``ours``: its own name or its module's; embeddings are bare."""
        pattern = _pattern(ours)[0]
        return pattern if pattern in table else pattern.rpartition(".")[0]

    def fused(self, ours: str, index: int | None) -> bool:
        """True if the tensor that holds our parameter ``ours`` has a leading axis of experts."""
        return "{}" in _pattern(ours)[0] and "{}" not in self.entry(ours, index)[0]

    def tensors(self, ours: Iterable[str], index: int | None = None) -> dict[str, list[str]]:
        """Returns the format's tensors that hold our parameters, each with its parameters in stored order.

        Where a tensor has an axis of experts, all experts of one module come first, then those of the next.
        """
        table = self.outer if index is None else self.block
        order = {module: i for i, module in enumerate(table)}

        def place(name: str) -> tuple[int, list[int]]:
            return order.get(self._key(name, table), -1), [int(i) for i in _pattern(name)[1]]

        held: dict[str, list[str]] = {}
        for name in sorted(ours, key=place):
            held.setdefault(self.of(name, index), []).append(name)
        return held


def _pattern(name: str) -> tuple[str, list[str]]:
    """Splits ``moe.experts.3.up`` into ``moe.experts.{}.up`` and the indices."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", name), re.findall(r"(?<=\.)\d+(?=\.)", name)


def with_fused_experts(names: Names, experts: str = "mlp.experts") -> Names:
    """Returns a table of names whose experts are fused as transformers fuses them.

    ``EXPERTS.gate_up_proj`` is ``[E, 2 I, D]`` and ``EXPERTS.down_proj`` is ``[E, D, I]``.
    """
    ours = {part: f"moe.experts.{{}}.{part}" for part in ("gate", "up", "down")}
    block = {key: value for key, value in names.block.items() if key not in ours.values()}
    theirs = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}
    fused = {f"{ours[part]}.weight": f"{experts}.{name}" for part, name in theirs.items()}
    return dataclasses.replace(names, block={**block, **fused})


@dataclasses.dataclass(frozen=True)
class HFFormat:
    """A family's format in Hugging Face checkpoints.

    Attributes:
      architectures: the values of ``architectures`` in config.json that this format serves.
      read_config: maps the fields of config.json, as transformers' class resolves them, to our config.
      write_config: the inverse; the result names the architecture.
      names: tensor names without the prefix.
      prefix: put before every name but the LM head's on writing.
      prefixes: prefixes that a name may have on reading, longest first.
      ignored: patterns of names that hold no parameter.
      others: other tables of names that checkpoints may have; the one that fits is read.
      unused: fields of config.json that do not change what this decoder computes, besides those of
        `convert.readers.config.UNUSED`; dotted where they are nested.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    write_config: Callable[[DecoderConfig], dict[str, Any]]
    names: Names
    prefix: str
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    others: tuple[Names, ...] = ()
    unused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class GGUFFormat:
    """A family's format in llama.cpp's GGUF files.

    Attributes:
      architectures: the values of ``general.architecture`` that this format serves.
      read_config: maps metadata (without the ``architecture.`` prefix) and the tensor store, which has shapes
        ``[N, K]`` and reads small tensors, to our config.
      names: tensor names.
      restore: our modules or parameters that llama.cpp stores in another way -> the function that undoes it,
        given the stored array in the files' orientation and the block's config.
      ignored: patterns of names that hold no parameter.
      others: other tables of names that files may have; the one that fits is read.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any], Any], DecoderConfig]
    names: Names
    restore: Mapping[str, Restore] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    others: tuple[Names, ...] = ()


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


def activation(config: Mapping[str, Any], key: str) -> Any:
    """Returns our name of the activation function that Hugging Face's config names under ``key``.

    Raises:
      ConvertError: the decoder does not know it.
    """
    name = field(config, key, str)
    if name not in HF_ACTIVATIONS:
        raise ConvertError(f"{key} is {name!r}, expected one of {', '.join(HF_ACTIVATIONS)}")
    return HF_ACTIVATIONS[name]


def hf_activation(config: DecoderConfig) -> str:
    """Inverse of :func:`activation`."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)


LAYER_TYPES = {"full_attention": False, "sliding_attention": True}
"""Hugging Face's names of attention kinds -> whether attention has a window."""


def read_windows(hf: Mapping[str, Any], window: int | None) -> tuple[int | None, tuple[int, ...]]:
    """Reads ``sliding_window`` and ``global_layers`` of our config.

    Args:
      hf: the resolved config, whose ``layer_types`` say which blocks have the window; all have without them.
      window: size of the window in tokens; None for no window.

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
    local = [kinds is None or LAYER_TYPES[kinds[i]] for i in range(layers)]
    if window is None or not any(local):
        return None, ()
    return window, tuple(i for i in range(layers) if not local[i])


def layer_types(config: DecoderConfig) -> list[str]:
    """Inverse of :func:`read_windows`."""
    local = [block.sliding_window is not None for block in config.blocks()]
    return [
        "sliding_attention" if local[i] and i not in config.global_layers else "full_attention"
        for i in range(config.num_layers)
    ]


def kinds_of(changes: Sequence[Kind]) -> dict[str, Any]:
    """Returns ``kinds`` and ``block_kinds`` of our config from what every block changes in it."""
    kinds = tuple(dict.fromkeys(changes))
    return {"kinds": kinds, "block_kinds": tuple(map(kinds.index, changes))} if any(kinds) else {}


def read_mixers(hf: Mapping[str, Any], mixers: Mapping[str, Kind], layers: int) -> list[Kind]:
    """Reads what each block changes in our config, by ``layer_types``.

    Args:
      hf: the resolved config.
      mixers: transformers' names of kinds of blocks -> what they change.
      layers: number of blocks.

    Raises:
      ConvertError: ``layer_types`` names another kind of block, or not one per block.
    """
    types = field(hf, "layer_types", list)
    unknown = [kind for kind in types if kind not in mixers]
    if unknown or len(types) != layers:
        found = repr(unknown[0]) if unknown else f"{len(types)} entries"
        raise ConvertError(f"layer_types has {found}, expected {layers} of {' or '.join(mixers)}")
    return [mixers[kind] for kind in types]


GLOBAL_WITHOUT_POSITIONS: Kind = (("positions", "none"), ("sliding_window", None))
"""Change that makes a block see all positions, and know none, in a model with a sliding window."""


def read_global_without_positions(hf: Mapping[str, Any], window: int | None) -> dict[str, Any]:
    """Reads the window of a model whose blocks of full attention have no positions; see :func:`read_windows`.

    Raises:
      ConvertError: there is a window, which no block has.
    """
    given, (window, everywhere) = window, read_windows(hf, window)
    if given is not None and window is None:
        raise ConvertError(
            f"layer_types has no sliding_attention, expected some with sliding_window = {given}"
        )
    layers = range(field(hf, "num_hidden_layers", int))
    changes = [GLOBAL_WITHOUT_POSITIONS if i in everywhere else () for i in layers]
    return {"sliding_window": window, **kinds_of(changes)}


def rotary_dim(hf: Mapping[str, Any], head_dim: int) -> int | None:
    """Returns the number of a head's features that RoPE rotates; None for all."""
    part = field(field(hf, "rope_parameters", dict), "partial_rotary_factor", float, 1.0)
    return None if part == 1 else int(head_dim * part)


def partial_rotary_factor(config: DecoderConfig) -> float:
    """Inverse of :func:`rotary_dim`."""
    return (config.rotary_dim or config.head_dim) / config.head_dim


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
