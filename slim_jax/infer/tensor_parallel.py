"""Tensor parallelism: a decoder split over devices that share the work of every token.

Every device has some heads of each block, some channels of its MLP and some tokens of the vocabulary. Its
part is a `Decoder` of its own, whose config counts only that part; the outputs of o and down are summed over
the devices. What does not divide evenly is replicated. The alternative, for models that no device can hold,
is `slim_jax.load(path, mesh=…)`, which splits every product by itself.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels import MixedTensor, matmul, stack_parts
from pallas_kernels.prepared import delete
from slim_jax.model.block import StagesOf, stages
from slim_jax.model.cache import Recurrent, State
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Linear, look_up
from slim_jax.model.params import Params, make_decoder, split_params
from slim_jax.model.stage import Stage

Over = Literal["n", "k"]

AXIS = "parts"
"""Axis of the mesh that the parts are on."""


HEADS: dict[str, Over] = {"q": "n", "k": "n", "v": "n", "o": "k"}
CHANNELS: dict[str, Over] = {"gate": "n", "up": "n", "down": "k"}
"""Layers that are split together, each along its output channels "n" or its input channels "k"."""


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Parameters that are split over ``count`` devices; all others are replicated."""

    count: int
    heads: bool
    channels: bool
    vocabulary: bool

    @classmethod
    def of(cls, model: Decoder, count: int) -> "Cuts":
        """Chooses to split everything that divides evenly."""
        config, (_, blocks) = model.config, split_params(model)
        kinds = config.blocks()
        # Linear attention is replicated, and with it the attention of the other blocks; so are heads that are
        # normalized together.
        apart = all(kind.mixer == "attention" and kind.qk_norm_width == "head" for kind in kinds)
        whole = apart and all(kind.num_kv_heads % count == 0 for kind in kinds)
        heads = whole and _divide(blocks, "o", count)
        # Experts are summed over devices after mixing, which would add a bias once per device.
        biased = any(kind.num_experts and kind.mlp_bias for kind in kinds)
        channels = not biased and _divide(blocks, "down", count)
        return cls(count, heads, channels, config.vocab_size % count == 0)

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """Returns the config of one part."""
        names = ["num_heads", "num_kv_heads"] * self.heads
        names += ["intermediate_size", "shared_expert_size"] * self.channels
        kinds = tuple(
            tuple((name, value // self.count if name in names else value) for name, value in kind)
            for kind in config.kinds
        )
        own: dict[str, Any] = {name: getattr(config, name) // self.count for name in names}
        if self.vocabulary:
            own["vocab_size"] = config.vocab_size // self.count
        return dataclasses.replace(config, kinds=kinds, **own)

    def parts(self, name: str, value: Any) -> list[Any]:
        """Splits a parameter into parts, one per device."""
        *_, layer, leaf = ("", *name.split("."))
        over = (HEADS if self.heads else {}) | (CHANNELS if self.channels else {})
        across: Over
        if self.vocabulary and (name == "embed" or layer == "head"):
            # A packed table and an LM head are stored as the weight of a product.
            across = "k" if name == "embed" and not isinstance(value, MixedTensor) else "n"
        elif layer in over and not (leaf == "bias" and over[layer] == "k"):
            across = over[layer]
        elif self.heads and leaf == "sinks":
            across = "n"
        else:
            return [value] * self.count
        if isinstance(value, MixedTensor):
            return list(stack_parts(value, self.count, over=across))
        return jnp.split(value, self.count, axis=0 if across == "k" else -1)


def _divide(blocks: Sequence[Params], layer: str, count: int) -> bool:
    """True if the input channels of these layers, and their groups, can be split evenly."""
    weights = [w for block in blocks for name, w in block.items() if name.endswith(f".{layer}.weight")]
    units = [w.group_size if isinstance(w, MixedTensor) else 1 for w in weights]
    return all(w.shape[0] % (count * unit) == 0 for w, unit in zip(weights, units))


def _sum(block: Any, y: jax.Array) -> tuple[jax.Array]:
    return (lax.psum(y, AXIS),)


def _summed_stages(config: DecoderConfig) -> tuple[Stage, ...]:
    """Returns the stages of a block whose channels are split: a mixture's outputs are summed, too."""
    total = Stage(_sum, ("y",), ("y",))
    return tuple(one for stage in stages(config) for one in ((stage, total) if stage.inside else (stage,)))


def stages_for(model: Decoder, count: int) -> StagesOf:
    """Returns a function of a block's config to the stages that run its part of ``count``."""
    return _summed_stages if Cuts.of(model, count).channels else stages


class Summed(Linear):
    """A linear layer whose input channels are split: the devices' products are summed."""

    def __init__(self, linear: Linear) -> None:
        self.weight, self.bias = linear.weight, linear.bias

    def __call__(self, x: Float[Array, "... k"]) -> Float[Array, "... n"]:
        return self.plus_bias(lax.psum(matmul(x, self.weight.get_value()), AXIS))


class SplitVocabulary(Decoder):
    """A decoder's part in which the vocabulary of embedding and LM head is split."""

    def rows(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t e"]:
        own = tokens - lax.axis_index(AXIS) * self.config.vocab_size
        inside = (own >= 0) & (own < self.config.vocab_size)
        rows = look_up(self.embed.get_value(), jnp.clip(own, 0, self.config.vocab_size - 1))
        return lax.psum(jnp.where(inside[..., None], rows, 0), AXIS)

    def head_output(self, x: Float[Array, "... e"]) -> Float[Array, "... vocab"]:
        return lax.all_gather(super().head_output(x), AXIS, axis=x.ndim - 1, tiled=True)


def mesh_of(model: Decoder) -> Mesh | None:
    """Returns the mesh over which a model was loaded; None if it is on one device."""
    for leaf in jax.tree.leaves(model):
        sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh  # type: ignore[return-value]
    return None


def cut(
    model: Decoder, count: int, devices: Sequence[jax.Device] | None = None, *, consume: bool = False
) -> list[Decoder]:
    """Splits a decoder into parts, for a program that runs on ``count`` devices along :data:`AXIS`.

    Args:
      model: the decoder, on one device.
      count: number of parts.
      devices: devices that the parts are moved to; if None, all parts stay on the model's device.
      consume: if True, parameters of the model are deleted as they are split.

    Raises:
      ValueError: the model is already split over a mesh.
    """
    if mesh_of(model) is not None:
        raise ValueError("the model lies over a mesh already, expected one that was loaded without")
    cuts, (outer, blocks) = Cuts.of(model, count), split_params(model)
    config = cuts.config(model.config)
    each: list[list[Params]] = []
    for params in (outer, *blocks):
        found: dict[str, list[Any]] = {}
        for name, value in params.items():
            found[name] = values = cuts.parts(name, value)
            if devices is not None:
                found[name] = list(map(jax.device_put, values, devices))
            if consume and values[0] is not value:
                delete(value)
        each.append([{name: values[i] for name, values in found.items()} for i in range(count)])
    return [_part(config, cuts, [params[i] for params in each]) for i in range(count)]


def _part(config: DecoderConfig, cuts: Cuts, params: Sequence[Params]) -> Decoder:
    kind = SplitVocabulary if cuts.vocabulary else Decoder
    part = make_decoder(config, params[0], params[1:], kind)
    for block in part.blocks:
        if cuts.heads:
            block.mixer.o = Summed(block.mixer.o)
        if cuts.channels and block.mlp is not None:
            block.mlp.down = Summed(block.mlp.down)
    return part


def on_devices(trees: Sequence[Any], mesh: Mesh, *, consume: bool = False) -> Any:
    """Combines the trees of parts, which are alike, into one: leaves ``[devices, ...]``, a part per device.

    ``consume``: if True, each leaf of the trees is deleted afterwards.
    """
    sharding = NamedSharding(mesh, P(AXIS))

    def one(*leaves: jax.Array) -> jax.Array:
        placed = [jax.device_put(leaf[None], device) for leaf, device in zip(leaves, mesh.devices)]
        if consume:
            jax.tree.map(delete, leaves)
        return jax.make_array_from_single_device_arrays((len(leaves), *leaves[0].shape), sharding, placed)

    return jax.tree.map(one, *trees)


def placed(
    empty: Callable[[int, int], State], parts: Mesh | None, over: Mesh | None
) -> Callable[[int, int], State]:
    """Returns ``empty(batch, size)``, which makes a state, for the devices that will use it.

    Args:
      empty: makes the state on one device.
      parts: the mesh whose devices each have a part of the model; None if there are no parts.
      over: the mesh over which the model was loaded, see :func:`mesh_of`.
    """
    if parts is not None:
        return partial(_on_each, empty, parts)
    return empty if over is None else partial(_by_heads, empty, over)


def _on_each(make: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
    """Runs ``make(*args)`` on every device, and lays out the results as :func:`on_devices` does."""

    def local() -> Any:
        return jax.tree.map(lambda leaf: leaf[None], make(*args))

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(), out_specs=P(AXIS), check_vma=False))()


def _by_heads(empty: Callable[[int, int], State], mesh: Mesh, batch: int, size: int) -> State:
    """Returns an empty state whose heads are split over a mesh if the number of its devices divides them."""
    make = partial(empty, batch, size)

    def place(leaf: Any) -> NamedSharding:
        if isinstance(leaf, Recurrent) or leaf.ndim < 4 or leaf.shape[-3] % mesh.size:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*[None] * (leaf.ndim - 3), mesh.axis_names))

    shapes = jax.eval_shape(make)
    places = jax.tree.map(place, shapes, is_leaf=lambda value: isinstance(value, Recurrent))
    return jax.jit(make, out_shardings=places)()
