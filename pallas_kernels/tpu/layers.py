"""Weights made ready for the TPU kernels: layers stacked, of which one is read where it lies."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.layout import MixedTensor, stack
from pallas_kernels.planes import WORD_BITS
from pallas_kernels.prepared import Prepared
from pallas_kernels.tpu.config import LANES, SUBLANES


@partial(jax.tree_util.register_dataclass, data_fields=Prepared.ARRAYS, meta_fields=Prepared.STATIC)
@dataclasses.dataclass(frozen=True)
class Layers(Prepared):
    """A weight of ``L`` layers as they are packed, padded to whole registers.

    Attributes:
      words: ``uint32[L, R, n]``.
      scale: ``[L, G, n]``.
      zero: ``uint8[L, rows, n]``.
      first_rows: empty.
    """

    implementation: ClassVar[str] = "mosaic_tpu"

    @property
    def group_size(self) -> int:
        """Input channels in a group."""
        return self.tensors[0].group_size

    @property
    def mean_width(self) -> float:
        """Bits of a code, averaged over the groups."""
        return WORD_BITS * self.rows[0] / (self.tensors[0].groups * self.group_size)

    def weights(self) -> list[MixedTensor]:
        layer = jnp.int32(0) if self.layer is None else self.layer
        w, n = self.tensors[0], self.shape[1]
        leaves = {name: getattr(self, name) for name in ("words", "scale", "zero")}
        leaves |= {name: getattr(w, name) for name in ("order", "segments")}
        own = {name: lax.dynamic_index_in_dim(a, layer, keepdims=False) for name, a in leaves.items()}
        own |= {"words": own["words"][: self.rows[0], :n]}
        own |= {name: own[name][:, :n] for name in ("scale", "zero")}
        return [dataclasses.replace(w, **own)]

    def columns(self, index: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        parts = {name: getattr(self, name)[0] for name in ("words", "scale", "zero")}
        own = {name: getattr(self.tensors[0], name)[0] for name in ("order", "segments")}
        return dataclasses.replace(self.tensors[0], **parts, **own).columns(index, dtype)


def prepare(layers: Sequence[MixedTensor], *, stacked: bool) -> Layers:
    """Of layers that are alike but for the values of their leaves and the rows of words.

    ``stacked``: whether one is chosen before it is multiplied with.
    """
    w = stack(layers)
    bare = dataclasses.replace(w, words=w.words[:, :0], scale=w.scale[:, :0], zero=w.zero[:, :0])
    return Layers(
        words=padded(w.words, SUBLANES, LANES),
        scale=padded(w.scale, 1, LANES),
        zero=padded(w.zero, 1, LANES),
        first_rows=jnp.zeros((0,), jnp.int32),
        tensors=(bare,),
        layer=None,
        rows=(w.words.shape[1],),
        stacked=stacked,
    )


def padded(a: jax.Array, rows: int, columns: int) -> jax.Array:
    """Zeros up to multiples of ``rows`` and ``columns``, the last two axes."""
    missing = [(0, -size % multiple) for size, multiple in zip(a.shape[-2:], (rows, columns))]
    if not any(after for _, after in missing):
        return a
    return jnp.pad(a, [(0, 0)] * (a.ndim - 2) + missing)
