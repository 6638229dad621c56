"""A decoder's parameters by dotted name: what they are, and modules from them and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from pallas_kernels import MixedTensor
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import MLP, Block, Buffer, Decoder, is_local
from slim_jax.model.linear import COMPUTE_DTYPE, Linear, Packed

Params = Mapping[str, Any]
"""Parameters of one block, or of what stands outside the blocks, by dotted name."""


def _flat(module: nnx.Module) -> dict[str, Any]:
    state = nnx.to_flat_state(nnx.state(module, (nnx.Param, Packed, Buffer)))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


def _abstract(config: DecoderConfig, make: type[Block] | type[Decoder]) -> Any:
    return nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))


def block_params(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name and shape of every parameter and :class:`Buffer` of one block."""
    return _flat(_abstract(config, Block))


def block_buffers(config: DecoderConfig, index: int) -> dict[str, jax.Array]:
    """The :class:`Buffer` values of block ``index``: a source gives them along with what it has read."""
    return {"attn.local": is_local(config, index)} if config.global_layers else {}


def outer_params(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name and shape of every parameter outside the blocks: embeddings, last norm, head."""
    flat = _flat(_abstract(dataclasses.replace(config, num_layers=1), Decoder))
    return {name: shape for name, shape in flat.items() if not name.startswith("blocks.")}


def _fill(module: Any, params: Params) -> None:
    expected = _flat(module)
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    if isinstance(params.get("embed"), MixedTensor) and "embed" in shapes:
        shapes["embed"] = shapes["embed"][::-1]  # packed as the weight of a product
    problems = [f"{name} is missing" for name in expected.keys() - params.keys()]
    problems += [f"{name} is not known" for name in params.keys() - expected.keys()]
    for name in expected.keys() & params.keys():
        if tuple(params[name].shape) != shapes[name]:
            problems.append(f"{name} has shape {params[name].shape}, expected {shapes[name]}")
    if problems:
        raise ValueError("parameters do not fit the config: " + "; ".join(sorted(problems)))
    for name, value in params.items():
        *path, leaf = name.split(".")
        owner = module
        for part in path:
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        if isinstance(value, MixedTensor):
            setattr(owner, leaf, Packed(value))
        else:
            getattr(owner, leaf).set_value(jnp.asarray(value))


def make_block(config: DecoderConfig, params: Params) -> Block:
    """A block from its parameters, dense or packed.

    Raises:
      ValueError: names or shapes do not fit; the message lists all that do not.
    """
    block = _abstract(config, Block)
    _fill(block, params)
    return block


def make_expert(config: DecoderConfig, params: Params, index: int) -> MLP:
    """One expert, from the parameters of its block.

    Raises:
      ValueError: names or shapes do not fit.
    """
    expert, prefix = nnx.eval_shape(lambda: MLP(config, rngs=nnx.Rngs(0))), f"moe.experts.{index}."
    _fill(expert, {n.removeprefix(prefix): value for n, value in params.items() if n.startswith(prefix)})
    return expert


def make_decoder(
    config: DecoderConfig, outer: Params, blocks: Sequence[Params], mesh: Mesh | None = None
) -> Decoder:
    """A decoder from the parameters outside its blocks and those of each block.

    ``mesh`` is where the parameters lie, cut along output channels, if not on one device.

    Raises:
      ValueError: names or shapes do not fit; the message lists all that do not.
    """
    decoder = _abstract(config, Decoder)
    named = {f"blocks.{i}.{name}": value for i, block in enumerate(blocks) for name, value in block.items()}
    _fill(decoder, {**outer, **named})
    for _, module in nnx.iter_modules(decoder):
        if isinstance(module, Linear | Decoder):
            module.mesh = mesh
    return decoder


def make_outer(config: DecoderConfig, outer: Params) -> Decoder:
    """A decoder without blocks: what embeds tokens, and turns the last block's output into logits."""
    return make_decoder(dataclasses.replace(config, num_layers=0), outer, [])


def split_params(decoder: Decoder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The inverse of :func:`make_decoder`: parameters outside the blocks, and of each block."""
    flat = _flat(decoder)
    outer = {name: value for name, value in flat.items() if not name.startswith("blocks.")}
    return outer, [_flat(block) for block in decoder.blocks]


def as_computed(name: str, value: Any) -> jax.Array:
    """A dense parameter in the dtype that calibration computes in: a router's choices are not rounded."""
    rounded = value.ndim == 2 and name != "moe.router.weight"
    return jnp.asarray(value, COMPUTE_DTYPE if rounded else jnp.float32)
