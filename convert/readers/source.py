"""A model on disk as a :class:`slim_jax.store.source.Source`: reads, renames and transposes each block.

A :class:`TensorStore` knows which file holds a tensor; the family's table knows the names.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from convert.errors import ConvertError, listed
from convert.families.family import Names
from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import Params, block_buffers, block_params, outer_params
from slim_jax.store.source import SAMPLED

DTYPES = ("float32", "bfloat16")

SAMPLE_BYTES = 1 << 12
"""Bytes that a fingerprint samples at each of three places of a tensor."""


@runtime_checkable
class TensorStore(Protocol):
    """Tensors of a checkpoint by name, in its own orientation (linear weights ``[N, K]``).

    Attributes:
      path: the file or directory, for messages.
      shapes: the shape of every tensor.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Reads the tensors of these names, float32 or bfloat16, and nothing else."""
        ...


def sampled(path: Path, spans: Iterable[tuple[int, int]]) -> bytes:
    """Digest of samples from the start, middle and end of each tensor, which detects retrained weights.

    Args:
      path: the file.
      spans: offset and number of bytes of every tensor.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for begin, size in spans:
            last = max(size - SAMPLE_BYTES, 0)
            for offset in sorted({0, last // 2, last}):
                file.seek(begin + offset)
                digest.update(file.read(min(size, SAMPLE_BYTES)))
    return digest.digest()


def file_origin(kind: str, path: Path, fingerprint: str) -> dict[str, Any]:
    """Returns a source's origin, whose fingerprint is made of samples of the files."""
    return {"kind": kind, "path": str(path.resolve()), "fingerprint": SAMPLED + fingerprint}


def parse_dtype(dtype: Any, allowed: tuple[str, ...] = DTYPES) -> np.dtype | None:
    """Parses ``dtype`` to NumPy's type; None stays None.

    Raises:
      ConvertError: it is not one of ``allowed``.
    """
    if dtype is None:
        return None
    try:
        parsed = np.dtype(jnp.dtype(dtype))
    except TypeError:
        parsed = None
    if parsed is None or parsed.name not in allowed:
        raise ConvertError(f"dtype is {dtype!r}, expected one of {', '.join(allowed)}")
    return parsed


class ModelSource:
    """A checkpoint on disk, read one block at a time; a :class:`slim_jax.store.source.Source`.

    Attributes:
      config: the decoder that the parameters are for.
      origin: kind, path and fingerprint of the checkpoint, as JSON values.
    """

    def __init__(
        self,
        config: DecoderConfig,
        origin: dict[str, Any],
        store: TensorStore,
        names: Names,
        make_tokenizer: Callable[[], Any],
        *,
        dtype: np.dtype | None = None,
        ignored: tuple[str, ...] = (),
        interleaved: tuple[str, ...] = (),
        norm_offset: float = 0.0,
    ) -> None:
        """Checks every name and shape against the config; reads no weights.

        Args:
          config: the decoder that the parameters are for.
          origin: kind, path and fingerprint.
          store: the tensors.
          names: the family's table of tensor names.
          make_tokenizer: builds the tokenizer.
          dtype: type of the parameters; None keeps the store's.
          ignored: patterns of names that hold no parameter.
          interleaved: our modules whose rows are interleaved in the store.
          norm_offset: constant that the store has added to the scale of every norm.

        Raises:
          ConvertError: tensors are missing, unexpected or of the wrong shape; the message lists them.
        """
        if max(config.num_layers, config.num_experts) > (tensors := len(store.shapes)):
            experts = f" of {config.num_experts} experts" if config.num_experts else ""
            blocks = f"{config.num_layers} blocks{experts}"
            raise ConvertError(f"{store.path}: the config has {blocks}, the files {tensors} tensors")
        self.config = config
        self.origin = origin
        self._store, self._names, self._dtype = store, names, dtype
        self._interleaved, self._norm_offset = interleaved, norm_offset
        self._make_tokenizer = make_tokenizer
        self._outer_shapes = {name: s.shape for name, s in outer_params(config).items()}
        buffers = block_buffers(config, 0)
        self._block_shapes = [
            {name: s.shape for name, s in block_params(block).items() if name not in buffers}
            for block in config.blocks()
        ]
        self._check(ignored)

    def _check(self, ignored: tuple[str, ...]) -> None:
        config, names = self.config, self._names
        expected = _file_shapes(names, self._outer_shapes)
        for i, shapes in enumerate(self._block_shapes):
            expected |= _file_shapes(names, shapes, i)
        found = self._store.shapes
        patterns = [re.compile(pattern) for pattern in ignored]
        head = names.of("head.weight")
        if config.tied_head and head in found:
            if not self._tied_copy():
                raise ConvertError(
                    f"{self._store.path}: {head} differs from the embedding that the config ties it to; "
                    "set tie_word_embeddings to false"
                )
            patterns.append(re.compile(re.escape(head)))
        missing = [name for name in expected if name not in found]
        unexpected = [n for n in found if n not in expected and not any(p.fullmatch(n) for p in patterns)]
        wrong = [
            f"{name} is {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ]
        lists = [("missing", missing), ("unexpected", unexpected), ("of wrong shape", wrong)]
        problems = [f"{len(rows)} {what}: {listed(rows)}" for what, rows in lists if rows]
        if problems:
            raise ConvertError(f"{self._store.path}: tensors do not fit the config; " + "; ".join(problems))

    def _tied_copy(self) -> bool:
        """True if a stored LM head that the config ties to the embedding equals it."""
        head, embed = self._names.of("head.weight"), self._names.of("embed")
        if embed not in self._store.shapes:
            return True  # reported as missing
        pair = self._store.read([head, embed])
        return bool(np.array_equal(pair[head], pair[embed]))

    def outer(self) -> Params:
        """See :class:`slim_jax.store.source.Source`; returns NumPy arrays, linear weights ``[K, N]``."""
        return self._read(self._outer_shapes)

    def block(self, index: int) -> Params:
        """See :class:`slim_jax.store.source.Source`; returns NumPy arrays, linear weights ``[K, N]``.

        Raises:
          IndexError: the model has no such block.
        """
        if not 0 <= index < self.config.num_layers:
            raise IndexError(f"block {index} of a model of {self.config.num_layers}")
        return {**self._read(self._block_shapes[index], index), **block_buffers(self.config, index)}

    @cached_property
    def tokenizer(self) -> Any:
        """The model's ``PreTrainedTokenizerFast``, built on first use.

        Raises:
          ConvertError: the checkpoint has no tokenizer, or one that cannot be read.
        """
        return self._make_tokenizer()

    def _read(self, shapes: Mapping[str, tuple[int, ...]], index: int | None = None) -> dict[str, np.ndarray]:
        held = self._names.tensors(shapes, index)
        raw = self._store.read(held)
        params = {}
        for theirs, ours in held.items():
            ends = np.cumsum([_file_shape(name, shapes[name])[0] for name in ours])
            for name, value in zip(ours, np.split(raw.pop(theirs), ends[:-1])):
                params[name] = self._ours(name, value, index)
        return params

    def _ours(self, name: str, value: np.ndarray, index: int | None) -> np.ndarray:
        if index is not None and name.rpartition(".")[0] in self._interleaved:
            value = _uninterleave(value, self.config.block(index).head_dim)
        if name.endswith(".scale") and self._norm_offset:
            value = value - np.asarray(self._norm_offset, value.dtype)
        return np.ascontiguousarray(file_layout(name, value), dtype=self._dtype or value.dtype)


def _transposed(name: str) -> bool:
    """True if a parameter is the weight of a linear layer: ``[K, N]`` here, ``[N, K]`` in files."""
    return name.endswith(".weight")


def file_layout(name: str, value: np.ndarray) -> np.ndarray:
    """Converts our parameter ``name`` to the files' layout, or back: transposes linear weights."""
    return value.T if _transposed(name) else value


def _file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if _transposed(name) else shape


def _file_shapes(
    names: Names, shapes: Mapping[str, tuple[int, ...]], index: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of the files' tensors that hold our parameters."""
    found = {}
    for theirs, ours in names.tensors(shapes, index).items():
        parts = [_file_shape(name, shapes[name]) for name in ours]
        found[theirs] = (sum(part[0] for part in parts), *parts[0][1:])
    return found


def _uninterleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders rows ``[heads * head_dim, ...]``: feature pairs (2i, 2i + 1) -> (i, i + head_dim / 2)."""
    paired = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)
