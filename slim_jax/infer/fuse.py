"""Fusing of a decoder for many steps: blocks stacked, packed weights prepared, experts merged.

All of this is computed once, on the device, and none of it is stored.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import MixedTensor, Prepared, prepare, prepare_joined
from pallas_kernels.layout import stack
from pallas_kernels.prepared import delete, one_by_one
from slim_jax.infer.forward import alike, is_packed, is_prepared, stackable, with_scales_alike
from slim_jax.model.block import Block, Norm, Unchanged, linear_groups
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Linear, Packed, join
from slim_jax.model.mlp import MLP
from slim_jax.model.stage import part_of

Groups = Sequence[Sequence[str]]
"""Names of linear layers, grouped by the input that they read."""


def ready(model: Decoder, *, consume: bool = False) -> tuple[Decoder, list[Any], list[bool]]:
    """Returns the arguments of `slim_jax.infer.forward.forward`: the decoder without blocks, and its blocks.

    Dense weights are shared with the model, packed ones copied.

    Args:
      model: the decoder, no part of which is changed unless it is consumed.
      consume: if True, packed weights are deleted as they are copied, so that memory never holds more than
        the model and one block of it, or one table. The model is unusable afterwards.

    Returns:
      The decoder without blocks; for every scan segment (`Decoder.runs`) its blocks, stacked or as a list;
      and for every segment True if it is stacked. Weights over a mesh are left as they are.
    """
    runs = [with_scales_alike(run) for run in model.runs()]
    stacked = [stackable(run) for run in runs]
    alone = model.mesh is None
    outer = nnx.merge(*nnx.split(model))  # a copy of the structure, not of the arrays
    outer.blocks = nnx.List([])
    stack = partial(_stacked_blocks, consume=True) if consume and alone else _stacked_at_once
    found: list[Any] = [
        stack(run, alone) if whole else [_prepared_block(block, consume) for block in run] if alone else run
        for run, whole in zip(runs, stacked)
    ]
    return _head_behind_norm(_prepared(outer, consume)) if alone else outer, found, stacked


def _stacked_blocks(blocks: Sequence[Block], alone: bool, *, consume: bool = False) -> Any:
    """Stacks blocks on a leading axis; if they are ``alone`` on a device, prepares their packed weights."""
    experts = _experts_as_one(blocks, consume=consume) if alone else None
    if experts is not None:  # those of all blocks, in order; products index prepared ones
        experts = jax.tree.map(
            lambda leaf: leaf if is_prepared(leaf) else leaf.reshape(len(blocks), -1, *leaf.shape[1:]),
            experts,
            is_leaf=is_prepared,
        )
    whole = _stacked(blocks, _groups(blocks[0], experts), alone, consume)
    if experts is not None:
        whole.moe.stacked = experts
    return whole


_stacked_at_once = jax.jit(_stacked_blocks, static_argnames=("alone", "consume"))


def _prepared_block(block: Block, consume: bool) -> Block:
    """Prepares a block that is not stacked: merges weights that read one input, and the experts."""
    packed = [leaf for leaf in jax.tree.leaves(block, is_leaf=is_packed) if is_packed(leaf)]
    if not packed:
        return block
    found = _with_weights_prepared(block)
    if consume:
        for weight in packed:
            delete(weight)
    return found


@jax.jit
def _with_weights_prepared(block: Block) -> Block:
    experts = _experts_as_one([block])
    for names, weight in _joined([block], _groups(block, experts)).items():
        norm = NORMS.get(names[0]) if block.pre_norm else None
        join([part_of(block, name) for name in names], _behind_norm(block, norm, weight))
    block = _prepared(block)
    if block.moe is not None and experts is not None:
        block.moe.stacked = experts
    return block


NORMS = {"attn.q": "attn_norm", "mlp.gate": "mlp_norm"}
"""Norm before the layers that read one input, by the first of these layers, in blocks with pre-norms."""


def _behind_norm(owner: Any, name: str | None, weight: Prepared) -> Prepared:
    """Returns a weight whose product applies the norm of its input, if the back end supports that.

    The owner's norm is then replaced by :class:`Unchanged`. Otherwise the weight is returned as it is.
    """
    norm = getattr(owner, name) if name is not None else None
    before = norm.before_product() if isinstance(norm, Norm) else None
    found = None if before is None else weight.behind(before)
    if found is None or name is None:
        return weight
    setattr(owner, name, Unchanged())
    return found


def _head_behind_norm(outer: Decoder) -> Decoder:
    """Returns the decoder without blocks, with its final norm as part of the product with the LM head."""
    table = outer.embed if outer.head is None else outer.head.weight
    if isinstance(weight := table.get_value(), Prepared) and outer.project_out is None:
        table.set_value(_behind_norm(outer, "norm", weight))
    return outer


def _groups(block: Block, experts: MLP | None) -> Groups:
    """Returns the block's layers grouped by the input they read, without those of merged experts."""
    return [names for names in linear_groups(block.config) if experts is None or "experts" not in names[0]]


def with_experts_as_one(block: Block) -> Block:
    """Merges a block's packed experts if possible, for a function that is compiled."""
    experts = _experts_as_one([block], prepared=False)
    if block.moe is not None and experts is not None:
        block.moe.stacked = experts
    return block


def _experts_as_one(blocks: Sequence[Block], *, prepared: bool = True, consume: bool = False) -> MLP | None:
    """Merges all experts of the blocks, in order; the blocks, which must be copies, lose theirs.

    Returns None, and changes nothing, where there are no packed experts, or where they are packed differently
    or over a mesh.
    """
    mixtures = [block.moe for block in blocks if block.moe is not None and block.moe.router.mesh is None]
    every = with_scales_alike([expert for moe in mixtures for expert in moe.experts])
    if len(mixtures) < len(blocks) or not alike(every):
        return None
    for moe in mixtures:
        moe.experts = nnx.List([])
    return _stacked(every, [("gate", "up")] if every[0].gate is not None else [], prepared, consume)


def _joined(parts: Sequence[Any], groups: Groups, consume: bool = False) -> dict[Sequence[str], Prepared]:
    """Merges the packed weights of each group where they can become one product; the layers lose theirs."""
    found: dict[Sequence[str], Prepared] = {}
    for names in groups:
        layers = [[part_of(one, name) for name in names] for one in parts]
        if len(names) == 1 or not all(isinstance(layer, Linear) for layer in itertools.chain(*layers)):
            continue
        weights = [[layer.weight.get_value() for layer in same] for same in layers]
        if all(isinstance(w, MixedTensor) for w in itertools.chain(*weights)):
            one = prepare_joined(weights, feeds=_fed(parts[0], names[0]), consume=consume)
            if one is not None:
                found[names] = one
                for layer in itertools.chain(*layers):
                    layer.weight = Packed(None)
    return found


def _fed(part: Any, first: str) -> int:
    """Returns the group size of the product that reads these layers' output, 0 if there is none.

    ``first`` is the name of the first layer.
    """
    down = part_of(part, "mlp.down") if first == "mlp.gate" else None
    weight = down.weight.get_value() if isinstance(down, Linear) else None
    if not isinstance(weight, MixedTensor) or weight.shape[0] % weight.group_size:
        return 0
    return weight.group_size


def _stacked(parts: Sequence[Any], groups: Groups, ready: bool, consume: bool = False) -> Any:
    """Stacks parts that are alike on a leading axis.

    If ``ready``, their packed weights are prepared, and those of a group merged.
    """
    joined = _joined(parts, groups, consume) if ready else {}

    def together(*leaves: Any) -> Any:
        if isinstance(leaves[0], MixedTensor):
            return prepare(leaves, consume=consume) if ready else stack(leaves)
        return one_by_one(_given_up(leaves), len(leaves)) if consume else jnp.stack(leaves)

    whole = jax.tree.map(together, *parts, is_leaf=is_packed)
    for names, weight in joined.items():
        join([part_of(whole, name) for name in names], weight)
    return whole


def _given_up(leaves: Sequence[jax.Array]) -> Iterator[jax.Array]:
    """Yields each array as a stack of one, and deletes it afterwards if it is large."""
    for leaf in leaves:
        yield leaf[None]
        if leaf.ndim > 1:
            delete(leaf)


def _prepared(model: Any, consume: bool = False) -> Any:
    """Returns a part of a model with its packed weights prepared for many products."""

    def ends(value: Any) -> bool:
        return is_packed(value) or is_prepared(value)

    def one(weight: MixedTensor) -> MixedTensor | Prepared:
        if not consume:
            return jax.jit(prepare)(weight)  # type: ignore[no-any-return]
        found = prepare(weight, consume=True)
        kept = set(map(id, jax.tree.leaves(found)))
        for leaf in jax.tree.leaves(weight):
            if id(leaf) not in kept and not leaf.is_deleted():
                leaf.delete()
        return found

    return jax.tree.map(lambda v: one(v) if is_packed(v) else v, model, is_leaf=ends)
