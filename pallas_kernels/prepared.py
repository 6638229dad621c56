"""Packed weights prepared for repeated multiplication, side by side.

Part of a product's work depends on the weights alone (where each plane lies, the value of its codes, zero
codes in a byte each) and is the same for every token, so a model that generates does it once. Weights that
read the same input become one product here; each keeps its own bit widths and order of groups. Prepared
weights are not saved to files. Back ends add fields of their own: `pallas_kernels.xla.prepared`,
`pallas_kernels.gpu.joined`, `pallas_kernels.tpu.layers`.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.layout import MixedTensor, exported, stack


def static() -> Any:
    """A field of a record that is part of a compiled program, not an array."""
    return dataclasses.field(metadata={"static": True})


@exported
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputNorm:
    """RMSNorm before a product: ``x * rsqrt(mean(x**2) + eps) * scale``, with ``scale`` ``float32[K]``."""

    scale: jax.Array
    eps: float = static()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes every row of ``x``, in float32."""
        x = x.astype(jnp.float32)
        scale = self.scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * scale


class Prepared(abc.ABC):
    """Packed weights ``[K, N_i]`` that read the same input, prepared as one weight; maybe of several layers.

    Each back end has a record of its own, a pytree, which defines :meth:`weights` and may define more.

    Attributes:
      implementation: name of the back end that the weights are prepared for.
      tensors: the weights, stacked on a leading axis, without the arrays that the record holds itself.
      rows: rows of words of each weight, in the layer with the most; static.
      layer: index of the layer to multiply with; None if there is only one, or none has been chosen.
      stacked: True if a layer must be chosen; static.
      norm: the norm that the product applies to its input first, if any.
    """

    implementation: ClassVar[str]
    tensors: tuple[MixedTensor, ...]
    rows: tuple[int, ...]
    layer: jax.Array | None
    stacked: bool
    norm: InputNorm | None = None

    @abc.abstractmethod
    def weights(self) -> list[MixedTensor]:
        """The packed weights; for a stack, those of the chosen layer."""

    def columns(self, index: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """``dequantize(dtype)[:, index]`` as ``[*index.shape, K]``, of one weight."""
        (weight,) = self.weights()
        return weight.columns(index, dtype)

    def behind(self, norm: InputNorm) -> Self | None:
        """The weights with ``norm`` as part of the product, or None if the back end gains nothing from it."""
        return None

    def at(self, layer: jax.Array) -> Self:
        """One layer of the stack; nothing is sliced, products read the layer's part in place."""
        return dataclasses.replace(self, layer=layer)  # type: ignore[type-var]

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The dense weights ``[K, N]``, side by side."""
        return jnp.concatenate([w.dequantize(dtype) for w in self.weights()], axis=1)

    @property
    def shape(self) -> tuple[int, int]:
        """``(K, N)`` of all weights side by side."""
        return self.tensors[0].shape[0], sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """``N`` of each weight."""
        return tuple(w.shape[1] for w in self.tensors)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the dequantized weights."""
        return self.tensors[0].dtype

    @property
    def groups(self) -> int:
        """Number of groups of each weight."""
        return self.tensors[0].groups

    @property
    def group_size(self) -> int:
        """Input channels in a group."""
        return self.tensors[0].group_size


@dataclasses.dataclass(frozen=True)
class Tiles(Prepared):
    """Weights whose output channels are divided into tiles of ``T``, or a stack of ``L`` layers of them.

    Within a tile, all that a group needs is adjacent in memory. ``L`` is 1 if nothing is stacked.

    Attributes:
      words: ``uint32[R, T]``: the tiles of each weight of each layer, one below the other, and padding.
      scale: ``[L * tiles * G, T]``, in the dtype of the weights' scales and in the order of the tiles.
      zero: ``uint8[L * tiles * G, T]``, one zero code per byte.
      first_rows: ``int32[L, weights, 2]``: a weight's first row in ``words``, and rows in each of its tiles.
      tensors, layer, rows, stacked: see `Prepared`; ``tensors`` lack words and scales.
    """

    words: jax.Array
    scale: jax.Array
    zero: jax.Array
    first_rows: jax.Array
    tensors: tuple[MixedTensor, ...]
    layer: jax.Array | None
    rows: tuple[int, ...] = static()
    stacked: bool = static()

    @property
    def tiles(self) -> tuple[int, ...]:
        """Number of tiles of each weight."""
        return tuple(n // self.words.shape[1] for n in self.sizes)

    def weights(self) -> list[MixedTensor]:
        layer = jnp.int32(0) if self.layer is None else self.layer
        one = partial(lax.dynamic_index_in_dim, index=layer, keepdims=False)
        width = self.words.shape[1]
        groups, found, first_tile = self.tensors[0].groups, [], layer * (self.shape[1] // width)
        for i, rest in enumerate(self.tensors):
            n, (first, own) = rest.shape[1] // width, one(self.first_rows)[i]
            tiles = [lax.dynamic_slice_in_dim(self.words, first + j * own, self.rows[i]) for j in range(n)]
            scale = lax.dynamic_slice_in_dim(self.scale, first_tile * groups, n * groups)
            scale = scale.reshape(n, groups, width).swapaxes(0, 1).reshape(groups, n * width)
            leaves = {name: one(getattr(rest, name)) for name in ("zero", "order", "segments")}
            words = tiles[0] if n == 1 else jnp.concatenate(tiles, axis=1)
            found.append(dataclasses.replace(rest, words=words, scale=scale, **leaves))
            first_tile = first_tile + n
        return found

    def columns(self, index: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """See `Prepared`; of a weight that is not stacked."""
        (rest,), (rows,), width = self.tensors, self.rows, self.words.shape[1]
        flat = index.reshape(-1)
        tile, column = flat // width, flat % width

        def pick(a: jax.Array, count: int) -> jax.Array:
            return a[tile[None] * count + jnp.arange(count)[:, None], column[None]]

        some = dataclasses.replace(
            jax.tree.map(lambda leaf: leaf[0], rest),
            words=pick(self.words, rows),
            scale=pick(self.scale, rest.groups),
            zero=rest.zero[0][:, flat],
            shape=(rest.shape[0], flat.size),
        )
        return some.dequantize(dtype).T.reshape(*index.shape, rest.shape[0])


ALIGNED = 64
"""Bytes: XLA uses host memory without a copy if its address is a multiple of this."""


def one_by_one[T](parts: Iterable[T], rows: int) -> T:
    """Concatenates trees of arrays ``[rows_i, ...]`` into one of ``[rows, ...]``.

    Parts are copied one after another, so that each can be freed before the next is made. They are copied
    into host memory; if the device uses host memory, the result stays there without another copy.
    """
    whole: list[np.ndarray] = []
    structure, placed, at = None, None, 0
    for part in parts:
        leaves, structure = jax.tree.flatten(part)
        placed, arrays = leaves[0].sharding, list(map(np.asarray, leaves))
        whole = whole or [_unwritten((rows, *a.shape[1:]), a.dtype) for a in arrays]
        for target, a in zip(whole, arrays):
            target[at : at + len(a)] = a
        at += len(arrays[0])
    placed_whole = [jax.device_put(target, placed) for target in whole]
    return jax.tree.unflatten(structure, placed_whole)  # type: ignore[no-any-return]


def _unwritten(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    return memory[start : start + size].view(dtype).reshape(shape)


def delete(weight: jax.Array | MixedTensor) -> None:
    """Frees an array, or the large arrays of a packed weight."""
    for a in (weight.words, weight.scale, weight.zero) if isinstance(weight, MixedTensor) else (weight,):
        a.delete()


def consumed[T](
    layers: Iterable[Sequence[MixedTensor]], make: Callable[[Sequence[MixedTensor]], T]
) -> Iterator[T]:
    """Yields ``make(weights)`` of each layer, and deletes the layer's arrays afterwards."""
    for weights in layers:
        yield make(weights)
        for w in weights:
            delete(w)


def stack_consumed(layers: Sequence[MixedTensor]) -> MixedTensor:
    """:func:`pallas_kernels.layout.stack`, which deletes each weight once it is copied."""
    most = max(w.words.shape[0] for w in layers)

    def alone(weights: Sequence[MixedTensor]) -> MixedTensor:
        return jax.tree.map(lambda a: a[None], weights[0].with_rows(most))

    return one_by_one(consumed([[w] for w in layers], alone), len(layers))


def side_by_side(
    layers: Sequence[Sequence[MixedTensor]], width: int, *, consume: bool = False
) -> dict[str, Any]:
    """The fields of :class:`Tiles` for layers that differ only in values and rows of words.

    Args:
      layers: the weights of each layer, which read the same input.
      width: columns of a tile, a divisor of every weight's columns.
      consume: if True, each weight's arrays are deleted once they are copied.
    """
    first = layers[0]
    rows = np.array([[w.words.shape[0] for w in layer] for layer in layers])
    tiles = np.array([w.shape[1] // width for w in first])
    ends = np.cumsum(rows * tiles).reshape(rows.shape)

    def tiled(a: jax.Array) -> jax.Array:
        count = a.shape[1] // width
        return a if count == 1 else a.reshape(len(a), count, width).swapaxes(0, 1).reshape(-1, width)

    def joined(name: str, make: Callable[[MixedTensor], jax.Array], *after: jax.Array) -> jax.Array:
        def parts() -> Iterator[jax.Array]:
            for w in itertools.chain(*layers):
                yield tiled(make(w))
                if consume:
                    getattr(w, name).delete()
            yield from after

        if not consume:
            every = list(parts())
            return every[0] if len(every) == 1 else jnp.concatenate(every)
        heights = rows if name == "words" else np.full(rows.shape, first[0].groups)
        return one_by_one(parts(), int(np.sum(heights * tiles)) + sum(map(len, after)))

    # Every tile is read with the largest number of rows, so the last tiles need padding.
    end = [jnp.zeros((int(rows.max()), width), jnp.uint32)] if rows.size > 1 else []
    bare = [[dataclasses.replace(w, words=w.words[:0], scale=w.scale[:0]) for w in layer] for layer in layers]
    tensors = tuple(stack(same) for same in zip(*bare))  # before anything is deleted
    return {
        "words": joined("words", lambda w: w.words, *end),
        "scale": joined("scale", lambda w: w.scale),
        "zero": joined("zero", MixedTensor.zero_codes),
        "first_rows": jnp.asarray(np.stack([ends - rows * tiles, rows], axis=-1), jnp.int32),
        "tensors": tensors,
        "layer": None,
        "rows": tuple(rows.max(axis=0).tolist()),
        "stacked": len(layers) > 1,
    }


def fit_together(weights: Sequence[MixedTensor]) -> bool:
    """True if weights agree in K, group size, scale dtype and dtype, as one product requires."""
    return len({(w.shape[0], w.group_size, w.scale.dtype, w.dtype) for w in weights}) == 1
