"""Fusing of a decoder for many steps: blocks stacked, packed weights prepared and merged, experts as one.

All of this is computed once, on the device, and none of it is stored. What the fused blocks then run is
`slim_jax.infer.fused`.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import InputNorm, MixedTensor, prepare, prepare_joined
from pallas_kernels.layout import stack
from pallas_kernels.prepared import Prepared, delete, one_by_one
from slim_jax.infer.forward import alike, is_packed, stackable, with_scales_alike
from slim_jax.infer.fused import Experts, FusedBlock, fused_stages, is_prepared
from slim_jax.infer.tensor_parallel import mesh_of
from slim_jax.model.block import Block, StagesOf, stages
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Linear, Packed
from slim_jax.model.norm import Norm, Scaled
from slim_jax.model.stage import part_of

Groups = Sequence[Sequence[str]]
"""Names of linear layers, grouped by the input that they read."""


def ready(
    model: Decoder, *, consume: bool = False, stages_of: StagesOf = stages
) -> tuple[Decoder, list[Any], list[bool]]:
    """Returns the arguments of `slim_jax.infer.forward.forward`: the decoder without blocks, and its blocks.

    Dense weights are shared with the model, packed ones copied.

    Args:
      model: the decoder, no part of which is changed unless it is consumed.
      consume: if True, packed weights are deleted as they are copied, so that memory never holds more than
        the model and one block of it, or one table. The model is unusable afterwards.
      stages_of: the stages that the blocks run, before any of them are fused.

    Returns:
      The decoder without blocks; for every scan segment (`Decoder.runs`) its blocks, stacked or as a list;
      and for every segment True if it is stacked. Weights over a mesh are left as they are.
    """
    runs = [with_scales_alike(run) for run in model.runs()]
    stacked = [stackable(run) for run in runs]
    alone = mesh_of(model) is None
    outer = nnx.merge(*nnx.split(model))  # a copy of the structure, not of the arrays
    outer.blocks = nnx.List([])
    together = _stack_blocks if consume and alone else _stack_blocks_at_once
    found: list[Any] = [
        together(run, alone, consume and alone, stages_of)
        if whole
        else [_fused_alone(block, consume, stages_of) for block in run]
        if alone
        else run
        for run, whole in zip(runs, stacked)
    ]
    return _head_behind_norm(_prepared(outer, consume)) if alone else outer, found, stacked


def _stack_blocks(blocks: Sequence[Block], alone: bool, consume: bool, stages_of: StagesOf) -> Any:
    """Stacks blocks on a leading axis; if they are ``alone`` on a device, fuses them."""
    if not alone:
        return _stacked(blocks, False)
    weights: dict[str, Any] = {}
    if (experts := _experts_as_one(blocks, consume=consume)) is not None:
        # Those of all blocks, in order; products index prepared ones.
        weights["moe"] = jax.tree.map(
            lambda leaf: leaf if is_prepared(leaf) else leaf.reshape(len(blocks), -1, *leaf.shape[1:]),
            experts,
            is_leaf=is_prepared,
        )
    weights |= _merged(blocks, _groups(blocks[0]), consume)
    return _fused(_stacked(blocks, True, consume), weights, stages_of)


_stack_blocks_at_once = jax.jit(_stack_blocks, static_argnames=("alone", "consume", "stages_of"))


def _fused(block: Block, weights: dict[str, Any], stages_of: StagesOf) -> FusedBlock:
    return FusedBlock(block, weights, fused_stages(block, weights, stages_of(block.config)))


def _fused_alone(block: Block, consume: bool, stages_of: StagesOf) -> Block | FusedBlock:
    """Fuses a block that is not stacked, and leaves a dense one as it is."""
    packed = [leaf for leaf in jax.tree.leaves(block, is_leaf=is_packed) if is_packed(leaf)]
    if not packed:
        return block if stages_of(block.config) == stages(block.config) else _fused(block, {}, stages_of)
    found = _with_weights_prepared(block, stages_of)
    if consume:
        for weight in packed:
            delete(weight)
    return found


@partial(jax.jit, static_argnames="stages_of")
def _with_weights_prepared(block: Block, stages_of: StagesOf) -> FusedBlock:
    experts = _experts_as_one([block])
    weights: dict[str, Any] = {} if experts is None else {"moe": experts}
    for first, weight in _merged([block], _groups(block)).items():
        norm = NORMS.get(first) if block.pre_norm else None
        weights[first] = _behind_norm(block, norm, weight)
    return _fused(_prepared(block), weights, stages_of)


NORMS = {"attn.q": "attn_norm", "mlp.gate": "mlp_norm"}
"""Norm before the layers that read one input, by the first of these layers, in blocks with pre-norms."""


def _behind_norm(owner: Any, name: str | None, weight: Prepared) -> Prepared:
    """Returns a weight whose product applies the norm of its input, if the back end supports that.

    Nothing then takes the place of the owner's norm. Otherwise the weight is returned as it is.
    """
    norm = getattr(owner, name) if name is not None else None
    if not isinstance(norm, Norm) or norm.bias is not None:
        return weight
    found = weight.behind(InputNorm(norm.scale[...].astype(jnp.float32) + norm.offset, norm.eps))
    if found is None or name is None:
        return weight
    setattr(owner, name, Scaled())
    return found


def _head_behind_norm(outer: Decoder) -> Decoder:
    """Returns the decoder without blocks, with its final norm as part of the product with the LM head."""
    table = outer.embed if outer.head is None else outer.head.weight
    if is_prepared(weight := table.get_value()) and outer.project_out is None:
        table.set_value(_behind_norm(outer, "norm", weight))
    return outer


def _groups(block: Block) -> Groups:
    """Returns the block's layers grouped by the input they read, without those of single experts."""
    return [stage.layers for stage in stages(block.config)]


def with_experts_as_one(block: Block) -> Block | FusedBlock:
    """Merges a block's packed experts if possible, for a function that is compiled."""
    experts = _experts_as_one([block], prepared=False)
    return block if experts is None else _fused(block, {"moe": experts}, stages)


def _experts_as_one(
    blocks: Sequence[Block], *, prepared: bool = True, consume: bool = False
) -> Experts | None:
    """Merges all experts of the blocks, in order; the blocks, which must be copies, lose theirs.

    Returns None, and changes nothing, where there are no packed experts, or where they are packed differently
    or over a mesh.
    """
    mixtures = [block.moe for block in blocks if block.moe is not None]
    every = with_scales_alike([expert for moe in mixtures for expert in moe.experts])
    over_mesh = any(w.mesh is not None for w in jax.tree.leaves(every, is_leaf=is_packed) if is_packed(w))
    if len(mixtures) < len(blocks) or over_mesh or not alike(every):
        return None
    number = len(mixtures[0].experts)
    for moe in mixtures:
        moe.experts = nnx.List([])
    entry = _merged(every, [("gate", "up")], consume) if prepared and every[0].gate is not None else {}
    return Experts(_stacked(every, prepared, consume), entry.get("gate"), number)


def _merged(parts: Sequence[Any], groups: Groups, consume: bool = False) -> dict[str, Prepared]:
    """Merges the packed weights of each group where they can become one product; the layers lose theirs."""
    found: dict[str, Prepared] = {}
    for names in groups:
        layers = [[part_of(one, name) for name in names] for one in parts]
        if len(names) < 2 or not all(isinstance(layer, Linear) for layer in itertools.chain(*layers)):
            continue
        weights = [[layer.weight.get_value() for layer in same] for same in layers]
        if all(isinstance(w, MixedTensor) for w in itertools.chain(*weights)):
            one = prepare_joined(weights, feeds=_fed(parts[0], names[0]), consume=consume)
            if one is not None:
                found[names[0]] = one
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


def _stacked(parts: Sequence[Any], prepared: bool, consume: bool = False) -> Any:
    """Stacks parts that are alike on a leading axis; if ``prepared``, their packed weights are prepared."""

    def together(*leaves: Any) -> Any:
        if isinstance(leaves[0], MixedTensor):
            return prepare(leaves, consume=consume) if prepared else stack(leaves)
        return one_by_one(_given_up(leaves), len(leaves)) if consume else jnp.stack(leaves)

    return jax.tree.map(together, *parts, is_leaf=is_packed)


def _given_up(leaves: Sequence[jax.Array]) -> Iterator[jax.Array]:
    """Yields each array as a stack of one, and deletes it afterwards if it is large."""
    for leaf in leaves:
        yield leaf[None]
        if leaf.ndim > 1:
            delete(leaf)


def _prepared(model: Any, consume: bool = False) -> Any:
    """Returns a part of a model with its packed weights prepared for many products."""

    def one(weight: MixedTensor) -> MixedTensor | Prepared:
        if not consume:
            return jax.jit(prepare)(weight)  # type: ignore[no-any-return]
        found = prepare(weight, consume=True)
        kept = set(map(id, jax.tree.leaves(found)))
        for leaf in jax.tree.leaves(weight):
            if id(leaf) not in kept and not leaf.is_deleted():
                leaf.delete()
        return found

    return jax.tree.map(lambda v: one(v) if is_packed(v) else v, model, is_leaf=is_packed)
