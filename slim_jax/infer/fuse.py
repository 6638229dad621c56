"""A decoder made ready for many steps: blocks stacked, packed weights prepared, experts as one.

All of it is worked out once, on the device, and nothing of it is stored.
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
"""Names of linear layers, those that read one input together."""


def ready(model: Decoder, *, consume: bool = False) -> tuple[Decoder, list[Any], list[bool]]:
    """What `slim_jax.infer.forward.forward` takes: what stands outside the blocks, and their runs.

    Dense weights are shared with the model, packed ones copied.

    Args:
      model: of which no part is changed, unless it is consumed.
      consume: whether packed weights are deleted as they are copied: at no time is there more in memory than
        the model and one block of it, or one table. The model is of no use afterwards.

    Returns:
      The decoder without blocks; of every run (`Decoder.runs`) its blocks, stacked or a list; and whether
      they are stacked. Weights over a mesh are left as they are.
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
    """Blocks on a leading axis; if they lie ``alone`` on a device, their packed weights prepared."""
    experts = _experts_as_one(blocks, consume=consume) if alone else None
    if experts is not None:  # of all blocks, one after the other; what is prepared, products find there
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
    """A block that stays by itself: weights prepared, those that read one input as one, and its experts."""
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
"""By the first of layers that read one input, the norm before them, in blocks that have it there."""


def _behind_norm(owner: Any, name: str | None, weight: Prepared) -> Prepared:
    """A weight with the norm of its input where the back end takes it; who owns the norm is then left
    without."""
    norm = getattr(owner, name) if name is not None else None
    before = norm.before_product() if isinstance(norm, Norm) else None
    found = None if before is None else weight.behind(before)
    if found is None or name is None:
        return weight
    setattr(owner, name, Unchanged())
    return found


def _head_behind_norm(outer: Decoder) -> Decoder:
    """What stands outside the blocks, with the last norm as part of the product with the head."""
    table = outer.embed if outer.head is None else outer.head.weight
    if isinstance(weight := table.get_value(), Prepared) and outer.project_out is None:
        table.set_value(_behind_norm(outer, "norm", weight))
    return outer


def _groups(block: Block, experts: MLP | None) -> Groups:
    """The block's layers that read one input together, but for those of experts that are one already."""
    return [names for names in linear_groups(block.config) if experts is None or "experts" not in names[0]]


def with_experts_as_one(block: Block) -> Block:
    """A block whose packed experts are one, if they can be, for a function that is compiled."""
    experts = _experts_as_one([block], prepared=False)
    if block.moe is not None and experts is not None:
        block.moe.stacked = experts
    return block


def _experts_as_one(blocks: Sequence[Block], *, prepared: bool = True, consume: bool = False) -> MLP | None:
    """All experts of the blocks as one, in their order; the blocks, which must be copies, are left without.

    None, and nothing done, where there are no packed experts, or they are packed differently, or over a mesh.
    """
    mixtures = [block.moe for block in blocks if block.moe is not None and block.moe.router.mesh is None]
    every = with_scales_alike([expert for moe in mixtures for expert in moe.experts])
    if len(mixtures) < len(blocks) or not alike(every):
        return None
    for moe in mixtures:
        moe.experts = nnx.List([])
    return _stacked(every, [("gate", "up")] if every[0].gate is not None else [], prepared, consume)


def _joined(parts: Sequence[Any], groups: Groups, consume: bool = False) -> dict[Sequence[str], Prepared]:
    """The groups whose packed weights become one product; the parts' layers are left without them."""
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
    """The group size of the product that takes all that layers give, whose ``first`` is named; or 0."""
    down = part_of(part, "mlp.down") if first == "mlp.gate" else None
    weight = down.weight.get_value() if isinstance(down, Linear) else None
    if not isinstance(weight, MixedTensor) or weight.shape[0] % weight.group_size:
        return 0
    return weight.group_size


def _stacked(parts: Sequence[Any], groups: Groups, ready: bool, consume: bool = False) -> Any:
    """Parts that are alike, on a leading axis; if ``ready``, their packed weights prepared, those of a group
    as one."""
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
    """Each as a stack of one; those that are large are deleted then."""
    for leaf in leaves:
        yield leaf[None]
        if leaf.ndim > 1:
            delete(leaf)


def _prepared(model: Any, consume: bool = False) -> Any:
    """Parts of a model whose packed weights are ready to be multiplied often."""

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
