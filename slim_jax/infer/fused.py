"""Fused stages: a block's stages over prepared weights, each of which does the work of several layers.

:func:`fused_stages` takes a block's own stages and replaces those whose products can be taken together. To
add a fused kernel, write its stage here, and the condition for it there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import by_kernel, mixed_matmul
from pallas_kernels.prepared import Prepared
from pallas_kernels.ragged import by_turns, chunk_rows
from slim_jax.model.block import Block, plus
from slim_jax.model.cache import KeyValues
from slim_jax.model.linear import Linear
from slim_jax.model.mlp import MLP
from slim_jax.model.stage import Stage, Stream, part_of, passed

FEW_TOKENS = 8
"""Number of tokens up to which a chunk of merged experts has no more rows than an expert has on average."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """All experts of a mixture as one MLP whose weights are stacked, or prepared.

    Attributes:
      mlp: the MLP; weights have a leading axis of experts, or are prepared from all blocks of a scan segment.
      entry: gate and up merged; None if they are not.
      number: number of experts in a block; static.
    """

    mlp: MLP
    entry: Prepared | None
    number: int = dataclasses.field(metadata={"static": True})

    def output(self, x: Float[Array, "m d"], index: Int[Array, ""]) -> Float[Array, "m d"]:
        """Returns the output of one expert."""

        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Prepared):
                return lax.dynamic_index_in_dim(leaf, index, keepdims=False)
            return leaf.at(index if leaf.layer is None else leaf.layer * self.number + index)

        mlp, entry = jax.tree.map(one, (self.mlp, self.entry), is_leaf=is_prepared)
        if entry is not None:
            mlp = with_outputs(mlp, ("gate", "up"), entry, x)
        return mlp.down(mlp.hidden(x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FusedBlock:
    """A block on one device with prepared weights; it runs like a `slim_jax.model.block.Block`.

    Attributes:
      block: the block, with all weights that are not merged, prepared one by one.
      weights: merged weights by the name of the first layer; a mixture's :class:`Experts` as "moe".
      stages: the model's stages and fused ones, in order of data flow; static.
    """

    block: Block
    weights: Mapping[str, Any]
    stages: tuple[Stage, ...] = dataclasses.field(metadata={"static": True})

    def __call__(
        self, h: Float[Array, "b t d"], positions: Int[Array, "b t"], cache: Any = None
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Returns the output of the block, and the cache extended by the tokens of ``h``."""
        if isinstance(cache, KeyValues):
            cache = dataclasses.replace(cache, one_device=True)
        stream: Stream = {"h": h, "positions": positions, "cache": cache}
        for stage in self.stages:
            part = self if isinstance(stage, FusedStage) else part_of(self.block, stage.part)
            stream = passed(stage, part, stream)
        return stream["h"], stream["cache"]


class FusedStage(Stage):
    """A stage whose function takes the :class:`FusedBlock`."""


def is_prepared(value: Any) -> bool:
    """True if the value is a prepared weight."""
    return isinstance(value, Prepared)


def packed_alone(layer: Any) -> Any:
    """Returns a layer's packed weight if its output is the product alone; else None."""
    if type(layer) is not Linear or layer.bias is not None:
        return None
    weight = layer.weight.get_value()
    return weight if is_prepared(weight) else None


class Given(nnx.Module):
    """An output, in place of the layer that would have computed it."""

    def __init__(self, y: jax.Array) -> None:
        self.y = nnx.Variable(y)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.y.get_value()


def with_outputs[T](part: T, names: tuple[str, ...], weight: Prepared, x: jax.Array) -> T:
    """Returns a part of a block in which layers that all read ``x`` are replaced by their outputs.

    ``weight`` merges their weights; ``names`` are their names in the part.
    """
    part = nnx.merge(*nnx.split(part))
    outputs = jnp.split(mixed_matmul(x, weight), np.cumsum(weight.sizes[:-1]).tolist(), axis=-1)
    for name, y in zip(names, outputs, strict=True):
        owner, _, leaf = name.rpartition(".")
        setattr(part_of(part, owner), leaf, Given(part_of(part, name).plus_bias(y)))
    return part


@dataclasses.dataclass(frozen=True)
class MergedProduct:
    """Runs a stage after the product of all the layers that read its input ``x``."""

    stage: Stage
    names: tuple[str, ...]

    def __call__(self, fused: FusedBlock, *fields: Any) -> tuple[Any, ...]:
        stage, prefix = self.stage, f"{self.stage.part}." if self.stage.part else ""
        names = tuple(name.removeprefix(prefix) for name in self.names)
        x = fields[stage.reads.index("x")]
        part = with_outputs(part_of(fused.block, stage.part), names, fused.weights[self.names[0]], x)
        assert stage.run is not None
        return stage.run(part, *fields)


@dataclasses.dataclass(frozen=True)
class ResidualProduct:
    """Adds a layer's output to the residual stream as part of the product; ``then`` goes on with the sum."""

    name: str
    then: Callable[[Block, jax.Array], tuple[jax.Array, ...]]

    def __call__(self, fused: FusedBlock, h: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        weight = part_of(fused.block, self.name).weight.get_value()
        return self.then(fused.block, mixed_matmul(x, weight, residual=h))


def _plus_mlp(fused: FusedBlock, h: jax.Array, x: jax.Array) -> tuple[jax.Array]:
    """Gate, up, down and the residual stream, by one kernel if there is one."""
    block, entry = fused.block, fused.weights["mlp.gate"]
    own, norm = block.mlp, block.mlp_out_norm
    assert own is not None

    def by_products(x: jax.Array, entry: Prepared, down: Prepared, residual: jax.Array | None) -> jax.Array:
        hidden = with_outputs(own, ("gate", "up"), entry, x).hidden(x)
        return mixed_matmul(hidden, down, residual=residual)

    def mlp(residual: jax.Array | None) -> jax.Array:
        operands = x, entry, own.down.weight.get_value(), residual
        return by_kernel("mlp", by_products, *operands, activation=own.activation)  # type: ignore[no-any-return]

    return block.after_mlp(mlp(h) if norm is None else plus(h, mlp(None), norm))


def _mix(fused: FusedBlock, x: jax.Array, routes: jax.Array, before: jax.Array | None) -> tuple[jax.Array]:
    """The sum of merged experts' outputs, in chunks of (token, expert) pairs, sorted by expert."""
    experts: Experts = fused.weights["moe"]
    assert fused.block.moe is not None
    top_k, number = fused.block.moe.top_k, experts.number
    rows, count = x.reshape(-1, x.shape[-1]), x.shape[0] * x.shape[1]
    weights, chosen = lax.top_k(routes.reshape(count, number), top_k)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    token, sizes = order // top_k, jnp.bincount(chosen.reshape(-1), length=number)
    # An expert has at most ``count`` tokens.
    fair = max(1, len(order) // number) if count <= FEW_TOKENS else chunk_rows(len(order), number)
    y = by_turns(experts.output, x.shape[-1], min(fair, count), rows[token], sizes)
    y = y * weights.reshape(-1)[order][:, None]
    mixed = jnp.zeros_like(rows).at[token].add(y).reshape(x.shape)
    return (mixed if before is None else before + mixed,)


def fused_stages(block: Block, weights: Mapping[str, Any], stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Returns a block's stages with those fused whose weights are merged or prepared.

    Args:
      block: the block of a :class:`FusedBlock`.
      weights: its merged weights.
      stages: the stages of such a block.
    """
    found: list[Stage] = []
    mlp_is_one = _mlp_is_one(block, weights)
    for before, stage in pairwise((Stage(None, (), ()), *stages)):
        first = before.layers[0] if before.layers else ""
        alone = len(before.layers) == 1 and before.adds and packed_alone(part_of(block, first)) is not None
        if first == "mlp.gate" and mlp_is_one:
            continue  # with the next
        if first == "mlp.down" and mlp_is_one:
            found.append(FusedStage(_plus_mlp, ("h", "x"), ("h",)))
        elif first in weights:
            run = MergedProduct(dataclasses.replace(stage, inside=()), before.layers)
            found.append(FusedStage(run, stage.reads, stage.gives))
        elif alone:
            then = Block.into_mlp if "x" in stage.gives else Block.after_mlp
            found.append(FusedStage(ResidualProduct(first, then), stage.reads, stage.gives))
        elif stage.inside and "moe" in weights:
            found.append(FusedStage(_mix, stage.reads, stage.gives))
        else:
            found.append(stage)
    return tuple(found)


def _mlp_is_one(block: Block, weights: Mapping[str, Any]) -> bool:
    """True if gate and up are merged, down is prepared, and none of them has a bias."""
    mlp = block.mlp
    if mlp is None or mlp.gate is None or "mlp.gate" not in weights or packed_alone(mlp.down) is None:
        return False
    return mlp.gate.bias is None and mlp.up.bias is None and mlp.limit is None
