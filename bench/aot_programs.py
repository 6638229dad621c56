"""Programs to compile for devices that are not present: shapes only, no arrays.

Each function returns a program and its abstract arguments. It is called with the target as the default of
`pallas_kernels.chips.of_target`, and if it has a parameter ``mesh``, with the mesh of all the target's
devices.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.models import LLAMA_2_7B
from pallas_kernels import MixedTensor, chips, sharded_matmul, use_implementation
from pallas_kernels.layout import abstract_tensor, group_count
from slim_jax.infer.forward import forward, stackable
from slim_jax.infer.fuse import ready
from slim_jax.model.block import linear_groups
from slim_jax.model.cache import Run, State
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Packed
from slim_jax.model.stage import part_of

Program = tuple[Callable[..., Any], tuple[Any, ...]]

TABLE_BITS = 2
"""Extra bits of embedding and LM head over the blocks' bits, as in `SlimConfig`'s defaults."""


def segments(k: int, group_size: int, widths: Sequence[int]) -> tuple[int, ...]:
    """Number of groups at each width: a quarter, half and a quarter of them for three widths, else alike."""
    groups, count = group_count(k, group_size), len(widths)
    if count == 3 and groups >= 4:
        return groups // 4, groups - 2 * (groups // 4), groups // 4
    return tuple(groups * (i + 1) // count - groups * i // count for i in range(count))


def _weight(k: int, n: int, widths: Sequence[int], group_size: int) -> MixedTensor:
    return abstract_tensor(
        (k, n),
        widths=tuple(widths),
        segments=segments(k, group_size, widths),
        group_size=group_size,
        dtype=jnp.bfloat16,
    )


def _x(m: int, k: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((m, k), jnp.bfloat16)


def gpu_product(
    m: int = 16,
    k: int = 4096,
    n: int = 4096,
    group_size: int = 128,
    widths: Sequence[int] = (1, 2, 3),
    weights: int = 0,
    config: dict[str, int] | None = None,
) -> Program:
    """The GPU kernel on a packed weight.

    ``weights`` joins that many weights into one product; 0 is a single weight that is not prepared.
    """
    from pallas_kernels.gpu import kernel
    from pallas_kernels.gpu.joined import join

    w: Any = _weight(k, n, widths, group_size)
    if weights:
        w = jax.eval_shape(join, [w] * weights)
    chosen = kernel.Config(**config) if config else None
    return partial(kernel.mixed_matmul, config=chosen), (_x(m, k), w)


def tpu_product(
    m: int = 16,
    k: int = 4096,
    n: int = 4096,
    group_size: int = 128,
    widths: Sequence[int] = (1, 2, 3),
    constant: bool = False,
    weights: int = 1,
    layers: int = 1,
    **config: Any,
) -> Program:
    """The TPU kernels on a packed weight; ``config`` has fields that differ from the kernel's choice.

    ``weights`` above 1 prepares that many weights with the same input as one product. ``constant`` makes
    segment sizes constants of the kernel, because loops over data cannot be estimated. ``layers`` above 1
    stacks as many layers, of which the product reads one in place.
    """
    from pallas_kernels.tpu import decode as kernel
    from pallas_kernels.tpu.layers import prepare as prepare_layers

    w: Any = _weight(k, n, widths, group_size)
    sizes = np.array(segments(k, group_size, widths), np.int32)
    if weights > 1 or layers > 1:
        prepare = partial(prepare_layers, stacked=layers > 1)
        w = jax.eval_shape(prepare, [[w] * weights] * layers)

    def product(x, w, layer):
        chosen = None
        if config:
            start = kernel.heuristic(chips.of_target().name, m, k, n)
            chosen = dataclasses.replace(start, **config)
        if constant:
            w = dataclasses.replace(w, segments=np.resize(sizes, w.segments.shape))
        if layers > 1:
            w = w.at(layer)
        return kernel.mixed_matmul(x, w, config=chosen)

    return product, (_x(m, k), w, jax.ShapeDtypeStruct((), jnp.int32))


def sharded_product(mesh: Mesh, m: int = 16, k: int = 4096, n: int = 4096) -> Program:
    """The TPU kernels on every device of a target, each for its part of the output channels."""

    def place(s: jax.ShapeDtypeStruct, *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, P(*spec)))

    w = _weight(k, n, (1, 2, 3), 128)
    w = jax.tree.map(lambda s: place(s, None, "devices") if len(s.shape) == 2 else place(s), w)

    def product(x, w):
        with use_implementation("mosaic_tpu"):
            return sharded_matmul(x, w, mesh)

    return product, (place(_x(m, k)), w)


def dense_product(m: int = 16, k: int = 4096, n: int = 4096) -> Program:
    """The plain bfloat16 product."""
    return partial(jnp.dot, preferred_element_type=jnp.float32), (_x(m, k), _x(k, n))


def decode_step(
    implementation: str,
    slots: int = 4096,
    batch: int = 1,
    bits: int = 2,
    group_size: int = 128,
    layers: int | None = None,
) -> Program:
    """One token of Llama-2-7B in bfloat16, with ``layers`` blocks and a cache of ``slots``.

    The step ``(outer, runs, state, tokens) -> (logits, state)`` is the one that
    `slim_jax.infer.generate.Generator` runs. A quarter of the groups has one bit less than ``bits``, a
    quarter one bit more; embedding and LM head are packed.
    """
    config = dataclasses.replace(LLAMA_2_7B, num_layers=layers or LLAMA_2_7B.num_layers)
    model = _packed_model(config, bits, group_size)
    with use_implementation(implementation):
        runs = [Run(run[0].config, len(run), stackable(run)) for run in model.runs()]
        outer, blocks = jax.eval_shape(lambda model: ready(model)[:2], model)
    state = jax.eval_shape(lambda: State.empty(runs, batch, slots, dtype=jnp.bfloat16))

    def step(outer: Decoder, blocks: Any, state: State, tokens: jax.Array) -> tuple[jax.Array, State]:
        positions = jnp.broadcast_to(state.length, tokens.shape)
        with use_implementation(implementation):
            return forward(outer, blocks, state, tokens, positions)

    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    return jax.jit(step, donate_argnums=2), (outer, blocks, state, tokens)  # the cache is written in place


def tpu_products(bits: int = 2, group_size: int = 128) -> dict[str, tuple[int, dict[str, Any]]]:
    """Products of :func:`decode_step` on a TPU: each one's count, and arguments of :func:`tpu_product`."""
    c = LLAMA_2_7B
    shapes = {
        "qkv": (c.hidden_size, c.hidden_size, 3),
        "o": (c.hidden_size, c.hidden_size, 1),
        "gate, up": (c.hidden_size, c.intermediate_size, 2),
        "down": (c.intermediate_size, c.hidden_size, 1),
    }
    common = {"m": 1, "group_size": group_size, "constant": True}
    blocks = common | {"widths": (bits - 1, bits, bits + 1), "layers": c.num_layers}
    found = {
        name: (c.num_layers, blocks | {"k": k, "n": n, "weights": weights})
        for name, (k, n, weights) in shapes.items()
    }
    head = {"k": c.hidden_size, "n": c.vocab_size, "widths": (bits + TABLE_BITS,)}
    return found | {"head": (1, common | head)}


def _packed_model(config: DecoderConfig, bits: int, group_size: int) -> Decoder:
    """Returns the decoder as loaded from a packed checkpoint, with shapes instead of arrays."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model)
    for block in model.blocks:
        for names in linear_groups(block.config):
            for name in names:
                owner = part_of(block, name)
                shape = owner.weight.get_value().shape
                owner.weight = Packed(_weight(*shape, (bits - 1, bits, bits + 1), group_size))
    table = _weight(config.hidden_size, config.vocab_size, (bits + TABLE_BITS,), group_size)
    model.embed = Packed(table)
    if model.head is not None:
        model.head.weight = Packed(table)
    return model
