"""Tensors of a format that hold several of our parameters: their shapes, and how they are split and joined.

Parameters are here in the files' orientation, linear weights ``[N, K]``. Splitting gives views.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from convert.families.family import Names
from slim_jax.model.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Held:
    """Place of our parameters in a tensor: ``[E,] rows, ...``, the modules' rows one after another.

    Attributes:
      rows: rows of each module, in stored order.
      experts: length of the leading axis of experts; 0 if there is none.
      groups: number of groups, each of which has an equal part of every module's rows; see
        :class:`convert.families.family.Names`.
      transposed: True if the tensor's last two axes are exchanged.
    """

    rows: tuple[int, ...]
    experts: int = 0
    groups: int = 1
    transposed: bool = False

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the tensor's shape, of which each parameter has ``shape`` but for the number of rows."""
        whole = (sum(self.rows), *shape[1:])
        if self.transposed:
            whole = whole[::-1]
        return (self.experts, *whole) if self.experts else whole

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Returns the parameters: all experts of the first module, then those of the next."""
        if self.transposed:
            tensor = tensor.swapaxes(-1, -2)
        stacked = tensor if self.experts else tensor[None]
        count, _, *rest = stacked.shape
        by_group = stacked.reshape(count, self.groups, -1, *rest)
        ends = np.cumsum([rows // self.groups for rows in self.rows])[:-1]
        parts = [part.reshape(count, -1, *rest) for part in np.split(by_group, ends, axis=2)]
        return [part[i] for part in parts for i in range(count)]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Inverse of :meth:`split`."""
        count, rest = max(self.experts, 1), parts[0].shape[1:]
        modules = [np.stack(parts[at : at + count]) for at in range(0, len(parts), count)]
        grouped = [module.reshape(count, self.groups, -1, *rest) for module in modules]
        tensor = np.concatenate(grouped, axis=2).reshape(count, -1, *rest)
        tensor = tensor if self.experts else tensor[0]
        return tensor.swapaxes(-1, -2) if self.transposed else tensor


def held_in(
    names: Names, ours: Sequence[str], rows: Sequence[int], config: DecoderConfig, index: int | None
) -> Held:
    """Returns the place of our parameters in the tensor that holds them.

    Args:
      names: the format's table.
      ours: the parameters, in stored order.
      rows: rows of each.
      config: config of the block, or of the decoder.
      index: index of the block; None outside the blocks.
    """
    entry, suffix = names.entry(ours[0], index)
    fused = names.fused(ours[0], index)
    experts = config.num_experts if fused else 0
    return Held(
        tuple(rows[:: experts or 1]),
        experts,
        getattr(config, names.grouped[entry]) if entry in names.grouped else 1,
        entry in names.transposed and suffix != ".bias",
    )
