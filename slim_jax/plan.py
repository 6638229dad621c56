"""Resources that a quantized model needs, from its config alone: sizes, cache, memory of each device."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from pallas_kernels.chips import DEVICES as KNOWN
from pallas_kernels.layout import abstract_tensor, group_count
from slim_jax import memory
from slim_jax.config import LAYER, LENGTH, SAMPLES, Settings, SlimConfig
from slim_jax.model.block import linear_groups, linear_names
from slim_jax.model.cache import state_bytes
from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import block_buffers, block_params, outer_params, stored_bytes
from slim_jax.rules import check_rules

GIB = 2**30

DEVICES = {device.short: device.memory_bytes for device in KNOWN if device.memory_bytes}
"""Bytes of memory of a device as JAX counts devices (half a chip on TPU v7x), by its short name."""

USABLE = 0.92
"""Fraction of a device's memory that a program gets; the rest is lost to the runtime and to fragmentation."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a quantized model and memory of its run, in bytes unless said otherwise.

    Attributes:
      parameters: number of all parameters.
      quantized: number of parameters that would be quantized.
      bfloat16_bytes: the whole model in bfloat16.
      packed_bytes: the arrays of the whole model as they are stored. Norms and biases are counted in float32,
        although a bfloat16 model stores them in fewer bytes.
      bits_per_weight: stored bits per weight of the packed layers of the blocks, everything counted.
      embedding_bytes: the packed embedding and LM head, which ``packed_bytes`` includes.
      cache_bytes_per_token: keys and values of one token in bfloat16.
      calibration_bytes: peak memory of quantizing, see `slim_jax.memory`.
      writing_bytes: memory of the phase in which the model writes text to calibrate on; 0 if it writes none.
      device: a key of :data:`DEVICES`.
      devices: number of devices.
      capacity: usable memory of one device.
      batch: sequences that run at once.
      context: tokens that each sequence has room for.
      device_bytes: memory that one device needs for ``batch`` sequences of ``context`` tokens.
      fits: True if ``device_bytes`` is at most ``capacity``.
      max_context: tokens that each sequence may have.
      sharding: layer, including the embedding and LM head where they are packed -> "n" (its output channels
        are split over the devices) or "replicated".
    """

    parameters: int
    quantized: int
    bfloat16_bytes: int
    packed_bytes: int
    bits_per_weight: float
    embedding_bytes: int
    cache_bytes_per_token: int
    calibration_bytes: int
    writing_bytes: int
    device: str
    devices: int
    capacity: int
    batch: int
    context: int
    device_bytes: int
    fits: bool
    max_context: int
    sharding: dict[str, str]


def parse_devices(text: str) -> tuple[str, int]:
    """Parses ``"v5e:4"`` to ``("v5e", 4)``; one device where no number follows.

    Raises:
      ValueError: there is no such device, or the number is not positive.
    """
    name, colon, count = text.partition(":")
    if name not in DEVICES:
        raise ValueError(f"device is {name!r}, expected one of {', '.join(DEVICES)}")
    if colon and (not count.isdecimal() or int(count) < 1):
        raise ValueError(f"number of devices is {count!r}, expected a positive number as in {name}:4")
    return name, int(count) if colon else 1


def make_plan(
    config: DecoderConfig,
    settings: SlimConfig,
    device: str,
    devices: int = 1,
    *,
    batch: int = 1,
    context: int = 4096,
    samples: int = SAMPLES,
    length: int = LENGTH,
    written: int = 0,
    offload: bool = False,
) -> Plan:
    """Plans the quantization of a model and its run.

    Args:
      config: the decoder's config.
      settings: the quantization's settings; groups are counted at the two whole widths around the mean.
      device: a key of :data:`DEVICES`.
      devices: number of devices that share the model, split as `slim_jax.load` with a mesh splits it.
      batch: sequences that run at once.
      context: tokens that each sequence has room for.
      samples: calibration windows, including those reserved for fine-tuning; 0 plans no calibration.
      length: tokens per window.
      written: number of windows that the model writes itself.
      offload: if True, activations are kept on disk.

    Raises:
      ValueError: a rule of the settings applies to no layer, or fine-tuning leaves no window for the layers.
    """
    settings = settings.resolved()
    outer, blocks = outer_params(config), _Blocks.of(config, settings)
    embeddings = _embeddings(outer, settings)
    outputs = blocks.outputs | dict.fromkeys(embeddings, config.vocab_size)
    sharding = {name: "replicated" if devices == 1 or n % devices else "n" for name, n in outputs.items()}
    outside = sum(math.prod(shape.shape) for shape in outer.values())
    in_tables = sum(math.prod(shape.shape) for name, shape in outer.items() if _label(name) in embeddings)
    rest = blocks.rest + sum(
        stored_bytes(name, shape.shape) for name, shape in outer.items() if _label(name) not in embeddings
    )

    def share(packed: dict[str, int]) -> int:
        cut = {name: 1 if sharding[_in_block(name)] == "replicated" else devices for name in packed}
        return sum(-(-size // cut[name]) for name, size in packed.items())

    weights = share(blocks.packed) + share(embeddings) + rest
    cache_here = sum(_cache_bytes(kind, devices) for kind in config.blocks())
    states = batch * sum(state_bytes(kind) for kind in config.blocks())
    working = 4 * batch * (config.vocab_size + 8 * max(b.intermediate_size for b in config.blocks()))
    capacity = int(USABLE * DEVICES[device])
    room = capacity - weights - working - states
    device_bytes = weights + working + states + batch * context * cache_here
    packed_bytes = sum(blocks.packed.values())
    head = math.prod(outer["head.weight"].shape) if "head.weight" in outer else 0
    scales = blocks.quantized // settings.group_size
    shapes = memory.Shapes(blocks.sizes, outside, head, packed_bytes, scales, sum(embeddings.values()))
    phases = memory.phases(config, settings, shapes, samples, length, written, offload) if samples else {}
    return Plan(
        parameters=blocks.parameters + outside,
        quantized=blocks.quantized + in_tables,
        bfloat16_bytes=2 * (blocks.parameters + outside),
        packed_bytes=packed_bytes + sum(embeddings.values()) + rest,
        bits_per_weight=8 * packed_bytes / blocks.quantized,
        embedding_bytes=sum(embeddings.values()),
        cache_bytes_per_token=sum(_cache_bytes(kind, 1) for kind in config.blocks()),
        calibration_bytes=memory.runtime_bytes(config) + max(phases.values(), default=0),
        writing_bytes=phases.get("writing", 0),
        device=device,
        devices=devices,
        capacity=capacity,
        batch=batch,
        context=context,
        device_bytes=device_bytes,
        fits=device_bytes <= capacity,
        max_context=max(0, min(config.max_positions, room // max(1, batch * cache_here))),
        sharding=sharding,
    )


@dataclasses.dataclass
class _Blocks:
    """Sizes of all blocks.

    Attributes:
      sizes: number of parameters of each block.
      quantized: number of parameters that are packed.
      rest: bytes of the parameters that are not packed, see `slim_jax.model.params.as_stored`.
      packed: bytes of every packed layer, by its full name.
      outputs: output channels of layers, by their names in a block.
      in_budget: number of weights, including the padding of groups, of the layers that no rule skips or gives
        bits.
    """

    sizes: list[int] = dataclasses.field(default_factory=list)
    quantized: int = 0
    rest: int = 0
    packed: dict[str, int] = dataclasses.field(default_factory=dict)
    outputs: dict[str, int] = dataclasses.field(default_factory=dict)
    in_budget: int = 0

    @property
    def parameters(self) -> int:
        """Number of parameters of all blocks."""
        return sum(self.sizes)

    @classmethod
    def of(cls, config: DecoderConfig, settings: Settings) -> "_Blocks":
        """Computes the sizes of a model's blocks.

        Raises:
          ValueError: a rule of the settings applies to no layer.
        """
        check_rules(settings.rules, linear_names(config))
        found, shapes, size = cls(), functools.cache(block_params), functools.cache(_packed_bytes)
        for index, kind in enumerate(config.blocks()):
            block = shapes(kind)
            buffers = block_buffers(config, index)
            found.sizes.append(sum(math.prod(s.shape) for n, s in block.items() if n not in buffers))
            found.rest += sum(stored_bytes(name, shape.shape) for name, shape in block.items())
            for name in itertools.chain(*linear_groups(kind)):
                full, (k, n) = f"blocks.{index}.{name}", block[f"{name}.weight"].shape
                found.outputs[name] = n
                rule, own = settings.rule(full), settings.of_layer(full)
                if own is None:
                    continue
                found.packed[full] = size((k, n), own)
                found.quantized += k * n
                found.rest -= stored_bytes(f"{name}.weight", (k, n))
                if rule is None or rule.bits is None:
                    found.in_budget += group_count(k, own.group_size) * own.group_size * n
        return found


def _cache_bytes(kind: DecoderConfig, devices: int) -> int:
    """Bytes of a block's keys and values of one token, in bfloat16, on one of ``devices`` devices."""
    if kind.mixer != "attention":
        return 0
    heads = kind.num_kv_heads if kind.num_kv_heads % devices else kind.num_kv_heads // devices
    return 2 * 2 * heads * kind.head_dim


def for_size(config: DecoderConfig, settings: SlimConfig, size: int) -> SlimConfig:
    """Returns the settings with the largest mean width at which the whole model takes at most ``size`` bytes.

    The embedding and LM head have the width that was asked for, else the default for the whole part of the
    mean. Scales are counted at one byte each; layers whose weights need two
    (`slim_jax.method.scale_search.bytes_hold`) take more.

    Raises:
      ValueError: the smallest mean width takes more, or no layers share one budget of bits over the model.
    """
    if not settings.resolved().over_model:
        raise ValueError("a target size needs criterion 'model', which gives any mean width")
    bytes_per_bit = _Blocks.of(config, settings.resolved()).in_budget / 8
    if not bytes_per_bit:
        raise ValueError(
            "a target size needs layers that share a budget, but rules give bits to all layers, or skip them"
        )

    def stored(given: SlimConfig) -> int:
        return make_plan(config, given, next(iter(DEVICES)), samples=0).packed_bytes

    smallest = 0
    highest, lowest = (5, 2) if settings.unit == LAYER else (6, 1)
    for whole in range(highest, lowest - 1, -1):
        uniform = dataclasses.replace(settings, bits=whole)
        smallest = stored(uniform)
        if smallest > size:
            continue
        mixed = dataclasses.replace(settings, embedding_bits=uniform.resolved().embedding_bits)
        left = size - stored(dataclasses.replace(mixed, bits=whole + 0.001))  # includes the order of groups
        if left < 0:
            return uniform
        thousandths = min(1 + math.floor(1000 * left / bytes_per_bit), 999)
        return dataclasses.replace(mixed, bits=whole + thousandths / 1000)
    raise ValueError(
        f"target size is {size:,} bytes, but at {lowest} bit{'s' * (lowest > 1)} the model takes {smallest:,}"
    )


def parse_size(text: str) -> int:
    """Parses ``"1.5GB"`` to 1,500,000,000 bytes; units are kB, MB, GB, KiB, MiB, GiB, or none for bytes.

    Raises:
      ValueError: it is no positive size.
    """
    match = re.fullmatch(r"([0-9.]+) *([kKMG]?)(i?)B?", text.strip())
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if not match or number <= 0:
        raise ValueError(f"size is {text!r}, expected one such as 48MB or 1.5GiB")
    return int(number * (1024 if match[3] else 1000) ** "_KMG".index(match[2].upper() or "_"))


def _label(name: str) -> str:
    return name.removesuffix(".weight")


def _embeddings(outer: Mapping[str, Any], settings: Settings) -> dict[str, int]:
    """Bytes of the packed embedding and LM head; empty where they are not packed."""
    if not settings.packs_embeddings:
        return {}
    tables = {"embed": outer["embed"].shape[::-1]}
    if "head.weight" in outer:
        tables["head"] = outer["head.weight"].shape
    bits, g = settings.embedding_bits, settings.embedding_group_size
    return {
        name: abstract_tensor(
            shape, widths=(bits,), segments=(group_count(shape[0], g),), group_size=g
        ).nbytes
        for name, shape in tables.items()
    }


def _in_block(name: str) -> str:
    """Returns a layer's name in its block, ``"attn.q"`` for ``"blocks.3.attn.q"``; other names unchanged."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def _packed_bytes(shape: tuple[int, int], settings: Settings) -> int:
    """Bytes of a packed layer at the mean width, interpolated between the whole widths around it.

    One layer has more bits than the mean, another fewer.
    """
    groups, mean = group_count(shape[0], settings.group_size), settings.mean_width

    def at(width: int) -> int:
        segments = tuple(groups if width == each else 0 for each in settings.widths)
        return abstract_tensor(
            shape, widths=settings.widths, segments=segments, group_size=settings.group_size
        ).nbytes

    low = math.floor(mean)
    return at(low) if low == mean else round(at(low) + (mean - low) * (at(low + 1) - at(low)))
