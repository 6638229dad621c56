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
from convert.families.family import Names, Restore
from convert.families.tensors import Held, held_in
from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import Params, block_buffers, block_params, outer_params
from slim_jax.store.source import SAMPLED

DTYPES = ("float32", "bfloat16")

FURTHER = "multi-token prediction"
"""Kind of the tensors of blocks that predict tokens after the next one, which are not read."""

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
        names: Names | tuple[Names, ...],
        make_tokenizer: Callable[[], Any],
        *,
        dtype: np.dtype | None = None,
        ignored: tuple[str, ...] = (),
        left_out: Mapping[str, str] | None = None,
        restore: Mapping[str, Restore] | None = None,
        norm_offset: float = 0.0,
    ) -> None:
        """Checks every name and shape against the config; reads no weights.

        Args:
          config: the decoder that the parameters are for.
          origin: kind, path and fingerprint.
          store: the tensors.
          names: the family's table of tensor names, or several of which the one that fits best is read.
          make_tokenizer: builds the tokenizer.
          dtype: type of the parameters; None keeps the store's.
          ignored: patterns of names that hold no parameter.
          left_out: kinds of tensors that belong to other parts of the model -> patterns of their names; they
            are counted in ``origin["left_out"]``.
          restore: our modules or parameters that are stored in another form -> the function that undoes it.
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
        self._store, self._dtype = store, dtype
        self._restore, self._norm_offset = restore or {}, norm_offset
        self._make_tokenizer = make_tokenizer
        self._outer_shapes = {name: s.shape for name, s in outer_params(config).items()}
        buffers = block_buffers(config, 0)
        self._block_shapes = [
            {name: s.shape for name, s in block_params(block).items() if name not in buffers}
            for block in config.blocks()
        ]
        tables = (names,) if isinstance(names, Names) else names
        every = [self._expected(table) for table in tables]
        fits = [sum(name not in store.shapes for name in expected) for expected in every]
        best = fits.index(min(fits))
        self._names = tables[best]
        self._check(every[best], ignored, left_out or {})

    def _expected(self, names: Names) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the files' tensors, as a table of names has them."""
        expected = {}
        for index, shapes in [(None, self._outer_shapes), *enumerate(self._block_shapes)]:
            for theirs, ours in names.tensors(shapes, index).items():
                held = self._held(names, ours, shapes, index)
                expected[theirs] = held.shape(file_shape(ours[0], shapes[ours[0]]))
        return expected

    def _held(
        self, names: Names, ours: list[str], shapes: Mapping[str, tuple[int, ...]], index: int | None
    ) -> Held:
        rows = [file_shape(name, shapes[name])[0] for name in ours]
        return held_in(names, ours, rows, self.config if index is None else self.config.block(index), index)

    def _check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        ignored: tuple[str, ...],
        left_out: Mapping[str, str],
    ) -> None:
        config, names = self.config, self._names
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
        others = [n for n in found if n not in expected and not any(p.fullmatch(n) for p in patterns)]
        unexpected, counts = count_left_out(others, left_out)
        if counts:
            self.origin["left_out"] = counts
        wrong = [
            f"{name} is {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and _squeezed(found[name]) != _squeezed(shape)
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
        named = self._names.tensors(shapes, index)
        raw = self._store.read(named)
        params = {}
        for theirs, ours in named.items():
            held = self._held(self._names, ours, shapes, index)
            tensor = raw.pop(theirs).reshape(held.shape(file_shape(ours[0], shapes[ours[0]])))
            for name, value in zip(ours, held.split(tensor), strict=True):
                params[name] = self._ours(name, value, index)
        return params

    def _ours(self, name: str, value: np.ndarray, index: int | None) -> np.ndarray:
        restore = self._restore.get(name, self._restore.get(name.rpartition(".")[0]))
        if restore is not None:
            value = restore(value, self.config if index is None else self.config.block(index))
        if name.endswith(".scale") and self._norm_offset:
            value = value - np.asarray(self._norm_offset, value.dtype)
        return file_layout(name, value).astype(self._dtype or value.dtype, copy=False)  # a view if it can be


def _transposed(name: str) -> bool:
    """True if a parameter is the weight of a linear layer: ``[K, N]`` here, ``[N, K]`` in files."""
    return name.endswith(".weight")


def file_layout(name: str, value: np.ndarray) -> np.ndarray:
    """Converts our parameter ``name`` to the files' layout, or back: transposes linear weights."""
    return value.T if _transposed(name) else value


def file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of our parameter ``name`` in the files' layout, from ours, or back."""
    return shape[::-1] if _transposed(name) else shape


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a shape without axes of length 1, such as that of a depthwise convolution's channels."""
    return tuple(size for size in shape if size != 1)


def blocks_after(blocks: str, last: int, more: int) -> str:
    """Returns the pattern of names in ``more`` blocks after the ``last`` ones, for further tokens.

    Args:
      blocks: the prefix of a block, with ``{}`` for its index.
      last: number of the model's own blocks.
      more: number of those after them.
    """
    numbers = "|".join(str(last + i) for i in range(min(max(more, 0), 64)))
    return re.escape(blocks).replace(re.escape("{}"), f"({numbers})") + ".*" if numbers else "(?!)"


def count_left_out(names: Iterable[str], kinds: Mapping[str, str]) -> tuple[list[str], dict[str, int]]:
    """Returns the names that are of no kind, and the number of those of each.

    Args:
      names: names of tensors.
      kinds: kinds of tensors that belong to other parts of a model -> patterns of their names.
    """
    rest: list[str] = []
    counts: dict[str, int] = {}
    for name in names:
        kind = next((kind for kind, pattern in kinds.items() if re.fullmatch(pattern, name)), None)
        if kind is None:
            rest.append(name)
        else:
            counts[kind] = counts.get(kind, 0) + 1
    return rest, dict(sorted(counts.items()))
