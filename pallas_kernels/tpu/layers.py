"""Weights prepared for the TPU kernels: layers are stacked, and the kernel reads one of them in place."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels import meshes
from pallas_kernels.layout import MixedTensor, exported, stack, zero_bits
from pallas_kernels.prepared import Prepared, consumed, fit_together, one_by_one, static
from pallas_kernels.tpu.config import LANES, SUBLANES
from pallas_kernels.tpu.gather import MOST, columns_of

REGISTER_ROWS = 32
"""Rows of a register of bytes."""


@exported
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layers(Prepared):
    """A weight of ``L`` layers, or several that read the same input, packed and padded to whole registers.

    Attributes:
      words: ``uint32[L, R, n]``; for several weights ``[L, rows, 128]``: the strips of 128 columns of each
        weight, one below the other.
      scale: ``[L, rows, n]``, weights side by side; rows at the end fill registers.
      zero: ``uint8[L, rows, n]``, arranged like the scales.
      segments: ``int32[L, weights * len(widths)]``, the number of groups of each width in each weight.
      orders: ``int32[L, weights * G]``, the ``order`` of each weight.
      tensors, layer, rows, stacked: see `Prepared`; ``tensors`` lack words, scales and zeros.
      widths: widths that occur in any of the weights, ascending; static.
    """

    implementation: ClassVar[str] = "mosaic_tpu"

    words: jax.Array
    scale: jax.Array
    zero: jax.Array
    segments: jax.Array
    orders: jax.Array
    tensors: tuple[MixedTensor, ...]
    layer: jax.Array | None
    rows: tuple[int, ...] = static()
    stacked: bool = static()
    widths: tuple[int, ...] = static()

    def weights(self) -> list[MixedTensor]:
        layer = jnp.int32(0) if self.layer is None else self.layer
        one = partial(lax.dynamic_index_in_dim, index=layer, keepdims=False)
        words, scale, zero, found = one(self.words), one(self.scale), one(self.zero), []
        first_row = first = 0
        for w, rows in zip(self.tensors, self.rows):
            n, height, strips = w.shape[1], whole(rows, SUBLANES), whole(w.shape[1], LANES) // LANES
            own = words
            if len(self.tensors) > 1:
                own = words[first_row : first_row + strips * height]
                own = own.reshape(strips, height, LANES).swapaxes(0, 1).reshape(height, -1)
            leaves = {"words": own[:rows, :n], "order": one(w.order), "segments": one(w.segments)}
            for name, a in (("scale", scale), ("zero", zero)):
                leaves[name] = a[: getattr(w, name).shape[1], first : first + n]
            found.append(dataclasses.replace(w, **leaves))
            first_row, first = first_row + strips * height, first + strips * LANES
        return found

    def columns(self, index: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        (w,), flat = self.weights(), index.reshape(-1)
        if flat.size > MOST:
            return w.columns(index, dtype)
        table = lax.dynamic_index_in_dim(self.words, 0 if self.layer is None else self.layer, keepdims=False)
        if meshes.spread(table, flat).several:
            words = table[:, flat]
        else:
            words = lax.platform_dependent(table, flat, tpu=columns_of, default=lambda a, index: a[:, index])
        some = dataclasses.replace(
            w,
            words=words[: self.rows[0]],
            scale=w.scale[:, flat],
            zero=w.zero[:, flat],
            shape=(w.shape[0], flat.size),
        )
        return some.dequantize(dtype).T.reshape(*index.shape, w.shape[0])


def joinable(weights: Sequence[MixedTensor]) -> bool:
    """True if weights that read the same input can be one product."""
    return fit_together(weights) and len({zero_bits(w.widths) for w in weights}) == 1


def prepare(layers: Sequence[Sequence[MixedTensor]], *, stacked: bool, consume: bool = False) -> Layers:
    """Prepares layers that differ only in values of their leaves and rows of words.

    Args:
      layers: the weights of each layer, which are :func:`joinable`.
      stacked: if True, a layer must be chosen before multiplying with it.
      consume: see :func:`pallas_kernels.prepare`.
    """
    if consume:
        rows = [max(w.words.shape[0] for w in same) for same in zip(*layers)]

        def alone(layer: Sequence[MixedTensor]) -> Layers:
            return prepare([[w.with_rows(most) for w, most in zip(layer, rows)]], stacked=stacked)

        return one_by_one(consumed(layers, alone), len(layers))
    weights = [stack(same) for same in zip(*layers)]
    words = [padded(w.words, SUBLANES, LANES) for w in weights]
    if len(words) > 1:
        words = [a.reshape(*a.shape[:2], -1, LANES).swapaxes(1, 2).reshape(len(a), -1, LANES) for a in words]
    widths = tuple(sorted({b for w in weights for b in w.widths}))
    none = jnp.zeros(len(layers), jnp.int32)
    segments = [w.segments[:, w.widths.index(b)] if b in w.widths else none for w in weights for b in widths]
    return Layers(
        words=_joined(words, axis=1),
        scale=_joined([_filled(w.scale) for w in weights], axis=2),
        zero=_joined([_filled(w.zero) for w in weights], axis=2),
        tensors=tuple(
            dataclasses.replace(w, words=w.words[:, :0], scale=w.scale[..., :0], zero=w.zero[..., :0])
            for w in weights
        ),
        layer=None,
        rows=tuple(w.words.shape[1] for w in weights),
        stacked=stacked,
        segments=jnp.stack(segments, axis=1),
        orders=_joined([w.order for w in weights], axis=1),
        widths=widths,
    )


def _filled(a: jax.Array) -> jax.Array:
    """Pads rows to a power of two, or to whole registers.

    For other numbers of rows, XLA and the kernel lay the array out differently, and XLA copies it, for all
    layers, at every product.
    """
    rows = a.shape[-2]
    return padded(a, REGISTER_ROWS if rows > REGISTER_ROWS else 1 << (rows - 1).bit_length(), LANES)


def _joined(parts: list[jax.Array], axis: int) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)


def whole(size: int, multiple: int) -> int:
    """``size``, rounded up to a multiple of ``multiple``."""
    return -(-size // multiple) * multiple


def padded(a: jax.Array, rows: int, columns: int) -> jax.Array:
    """Pads the last two axes with zeros to multiples of ``rows`` and ``columns``."""
    missing = [(0, -size % multiple) for size, multiple in zip(a.shape[-2:], (rows, columns))]
    if not any(after for _, after in missing):
        return a
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + missing)
