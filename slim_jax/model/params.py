"""A decoder's parameters by dotted name: their shapes, and conversion to modules and back."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import MixedTensor
from slim_jax.model.block import Block, Buffer, is_local
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import COMPUTE_DTYPE, Packed
from slim_jax.model.stage import part_of

Params = Mapping[str, Any]
"""Parameters of one block, or of the part outside the blocks, by dotted name."""


def _flat(module: nnx.Module) -> dict[str, Any]:
    # Not by nnx.to_flat_state, which creates reference cycles: arrays would stay until Python collects them.
    variables = {
        tuple(map(str, path)): node
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Param | Packed | Buffer)
    }
    return {".".join(path): variables[path].get_value() for path in sorted(variables)}


def _abstract(config: DecoderConfig, make: type[Block] | type[Decoder], part: str = "") -> Any:
    return nnx.merge(*_structure(config, make, part), copy=True)


@functools.cache
def _structure(config: DecoderConfig, make: type[Block] | type[Decoder], part: str) -> tuple[Any, Any]:
    if part:
        return nnx.split(part_of(_abstract(config, make), part))
    return nnx.split(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))))


def block_params(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape of each parameter and :class:`Buffer` of a block; ``config`` is the block's."""
    return _flat(_abstract(config, Block))


def block_buffers(config: DecoderConfig, index: int) -> dict[str, jax.Array]:
    """Returns the :class:`Buffer` values of block ``index``, which a source adds to what it has read."""
    return {"attn.local": is_local(config, index)} if config.global_layers else {}


def outer_params(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape of every parameter outside the blocks by name: embeddings, final norm, LM head."""
    return _flat(_abstract(_without_blocks(config), Decoder))


def _without_blocks(config: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(config, num_layers=0, kinds=(), block_kinds=())


def _fill(module: Any, params: Params) -> None:
    expected = _flat(module)
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    if isinstance(params.get("embed"), MixedTensor) and "embed" in shapes:
        shapes["embed"] = shapes["embed"][::-1]  # packed in the orientation of a product's weight
    problems = [f"{name} is missing" for name in expected.keys() - params.keys()]
    problems += [f"{name} is not known" for name in params.keys() - expected.keys()]
    for name in expected.keys() & params.keys():
        if tuple(params[name].shape) != shapes[name]:
            problems.append(f"{name} has shape {params[name].shape}, expected {shapes[name]}")
    if problems:
        raise ValueError("parameters do not fit the config: " + "; ".join(sorted(problems)))
    for name, value in params.items():
        path, _, leaf = name.rpartition(".")
        owner = part_of(module, path)
        if isinstance(value, MixedTensor):
            setattr(owner, leaf, Packed(value))
        else:
            getattr(owner, leaf).set_value(jnp.asarray(value))


def make_block(config: DecoderConfig, params: Params) -> Block:
    """Makes a block from its parameters, dense or packed; ``config`` is the block's.

    Raises:
      ValueError: names or shapes do not match the config; the message lists all that do not.
    """
    block = _abstract(config, Block)
    _fill(block, params)
    return block


def make_part(config: DecoderConfig, name: str, params: Params) -> nnx.Module:
    """Makes a part of a block, such as one expert, from its parameters by their names in the block.

    Raises:
      ValueError: names or shapes do not match the config.
    """
    part = _abstract(config, Block, name)
    prefix = f"{name}." if name else ""
    _fill(part, {n.removeprefix(prefix): value for n, value in params.items() if n.startswith(prefix)})
    return part


def make_decoder(
    config: DecoderConfig, outer: Params, blocks: Sequence[Params], kind: type[Decoder] = Decoder
) -> Decoder:
    """Makes a decoder, of a class ``kind``, from the parameters outside its blocks and those of each block.

    Raises:
      ValueError: names or shapes do not match the config; the message lists all that do not.
    """
    decoder = _abstract(config, kind)
    named = {f"blocks.{i}.{name}": value for i, block in enumerate(blocks) for name, value in block.items()}
    _fill(decoder, {**outer, **named})
    return decoder


def make_outer(config: DecoderConfig, outer: Params) -> Decoder:
    """Makes a decoder without blocks, which embeds tokens and turns the last block's output into logits."""
    return make_decoder(_without_blocks(config), outer, [])


def without_tables(
    config: DecoderConfig, outer: Params, tokens: np.ndarray | None = None
) -> tuple[Decoder, np.ndarray]:
    """Returns a decoder without blocks and head that can embed only ``tokens``, and their ids in it.

    A packed embedding is kept whole.

    Args:
      config: the decoder's config.
      outer: parameters outside the blocks.
      tokens: token ids of any shape; None where none will be embedded.
    """
    table = outer["embed"]
    tokens = np.zeros(1, np.int32) if tokens is None else tokens
    if not isinstance(table, MixedTensor):
        rows, numbers = np.unique(tokens, return_inverse=True)
        table, tokens = table[rows], numbers.reshape(tokens.shape)
        config = dataclasses.replace(config, vocab_size=len(rows))
    rest = {name: value for name, value in outer.items() if name != "head.weight"}
    small = make_outer(dataclasses.replace(config, tied_head=True), {**rest, "embed": table})
    return small, tokens.astype(np.int32)


def split_params(decoder: Decoder) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the parameters outside the blocks and those of each block; undoes :func:`make_decoder`."""
    flat = _flat(decoder)
    outer = {name: value for name, value in flat.items() if not name.startswith("blocks.")}
    return outer, [_flat(block) for block in decoder.blocks]


EXACT = (
    *("moe.router.weight", "moe.shared_gate.weight"),
    *("linear_attn.decay.weight", "linear_attn.beta.weight"),
)
"""Matrices of few outputs on which much depends: routers and gates."""


def is_rounded(name: str, rank: int) -> bool:
    """True if a dense parameter is rounded to bfloat16: every matrix except those in :data:`EXACT`."""
    return rank == 2 and name not in EXACT


def as_computed(name: str, value: Any) -> jax.Array:
    """Returns a dense parameter in the dtype that calibration computes in."""
    return jnp.asarray(value, COMPUTE_DTYPE if is_rounded(name, value.ndim) else jnp.float32)


def computed(params: Params) -> dict[str, Any]:
    """Returns the parameters, dense ones :func:`as_computed` and packed ones unchanged."""
    return {
        name: value if isinstance(value, MixedTensor) else as_computed(name, value)
        for name, value in params.items()
    }


def as_stored(name: str, value: Any) -> Any:
    """Returns a dense parameter as it is stored next to packed ones: matrices in bfloat16, others unchanged.

    Those others, norms, biases, convolutions, routers and gates, are in float32 or narrower.
    """
    return jnp.asarray(value, COMPUTE_DTYPE) if is_rounded(name, value.ndim) else value


def stored_bytes(name: str, shape: Sequence[int]) -> int:
    """Returns the maximum number of bytes of a dense parameter stored by :func:`as_stored`."""
    return (
        math.prod(shape)
        * (COMPUTE_DTYPE if is_rounded(name, len(shape)) else jnp.dtype(jnp.float32)).itemsize
    )
