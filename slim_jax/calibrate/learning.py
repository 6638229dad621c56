"""Method "slim-plus" over one block: trains its quantized layers to reproduce the full-precision block."""

import functools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import MixedTensor
from pallas_kernels.layout import zero_bits
from slim_jax.calibrate.events import LearningEpoch, OnEvent, warn_of_notices
from slim_jax.calibrate.fit import History, OnStep, default_optimizer, fit, gradient_step, split_samples
from slim_jax.config import Settings
from slim_jax.method.learnable import (
    BlockLoss,
    Layer,
    Learned,
    Samples,
    clip_start,
    pack_learned,
    solved_start,
)
from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import Params, as_computed
from slim_jax.placement import ONE_DEVICE, Placement
from slim_jax.report import LearningReport


@functools.cache
def learning_optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    """Returns the default optimizer, with a rate of its own for each kind of learned parameter.

    For clipping, the rates are constant, as in the paper's code. ``learning_rate`` is that of clipping
    parameters (0.01 of it for a clipping offset); codes, logarithms of scales and zero points learn at 0.8,
    0.6 and 0.5 of it (docs/tried.md).
    """
    falling = None if settings.clips else steps

    def kinds(learned: Learned) -> dict[str, dict[str, str]]:
        return {layer: {name: name for name in leaves} for layer, leaves in learned.items()}

    parts = {"up": 1.0, "down": 1.0, "offset": 0.01, "code": 0.8, "log_scale": 0.6, "zero": 0.5}
    rates = {name: part * settings.learning_rate for name, part in parts.items()}
    return optax.partition({name: default_optimizer(rate, falling) for name, rate in rates.items()}, kinds)


def start(
    weights: Mapping[str, Any], packed: Mapping[str, MixedTensor], settings: Settings, placement: Placement
) -> tuple[Learned, dict[str, Layer]]:
    """Initial learned parameters of layers, and their fixed values.

    Args:
      weights: the layers' dense weights, ``[K, N]`` each, by name.
      packed: the solved weights.
      settings: the quantization's settings.
      placement: the chips that hold the result.
    """
    learned: Learned = {}
    layers: dict[str, Layer] = {}
    for name, tensor in packed.items():
        w = placement.whole(weights[name]).astype(jnp.float32)
        missing = tensor.groups * tensor.group_size - w.shape[0]
        w = jnp.pad(w, ((0, missing), (0, 0))).reshape(tensor.groups, tensor.group_size, -1)
        bits = placement.whole(tensor.bits()).astype(jnp.float32)[:, None, None]
        if settings.clips:
            zeros = zero_bits(tensor.widths)
            learned[name], layers[name] = clip_start(w, bits, zero_bits=zeros, scale_dtype=tensor.scale.dtype)
        else:
            learned[name], layers[name] = solved_start(tensor, w, bits)
    return placement.tree((learned, layers))


def packed_result(
    learned: Learned,
    layers: Mapping[str, Layer],
    packed: Mapping[str, MixedTensor],
    history: History,
    settings: Settings,
) -> tuple[dict[str, MixedTensor], LearningReport]:
    """Packs the learned weights; returns them and a report.

    If training did not lower the validation loss, the weights are the given ones, or for clipping those that
    the initial clipping parameters give.
    """
    report = LearningReport([loss for _, loss in history.losses], history.best, history.note)
    if history.best == 0 and not settings.clips:
        return dict(packed), report
    return {name: pack_learned(learned[name], layers[name], packed[name]) for name in packed}, report


def epoch_event(on_event: OnEvent, epochs: int) -> OnStep:
    """Returns a function that tells ``on_event`` of every epoch of `slim_jax.calibrate.fit.fit`."""
    return lambda epoch, _, loss: on_event(LearningEpoch(epoch, epochs, math.nan if loss is None else loss))


@partial(jax.jit, static_argnames=("loss", "optimizer", "placement"), donate_argnames=("learned", "state"))
def train_epoch(
    learned: Learned,
    state: Any,
    layers: Mapping[str, Layer],
    rest: Params,
    samples: Samples,
    order: Int[Array, "steps batch"],
    optimizer: optax.GradientTransformation,
    loss: BlockLoss,
    placement: Placement = ONE_DEVICE,
) -> tuple[Learned, Any, Float[Array, " steps"]]:
    """Trains on the rows ``order`` of the samples; returns parameters, state and every step's loss."""

    def step(carry: tuple[Learned, Any], rows: jax.Array):
        batch = placement.split_batch(jax.tree.map(lambda a: a[rows], samples))
        learned, state, value = gradient_step(loss, optimizer, *carry, layers, rest, batch)
        return (learned, state), value

    (learned, state), losses = lax.scan(step, (learned, state), order)
    return learned, state, losses


@partial(jax.jit, static_argnames=("loss", "placement"))
def mean_loss(
    learned: Learned,
    layers: Mapping[str, Layer],
    rest: Params,
    samples: Samples,
    order: Int[Array, "steps batch"],
    loss: BlockLoss,
    placement: Placement = ONE_DEVICE,
) -> Float[Array, ""]:
    """Mean loss over the rows ``order`` of the samples."""

    def step(total: jax.Array, rows: jax.Array):
        batch = placement.split_batch(jax.tree.map(lambda a: a[rows], samples))
        return total + loss(learned, layers, rest, batch), None

    return lax.scan(step, jnp.zeros(()), order)[0] / order.shape[0]


def learn_block(
    config: DecoderConfig,
    settings: Settings,
    dense: Params,
    packed: Mapping[str, MixedTensor],
    samples: Samples,
    seed: int,
    optimizer: optax.GradientTransformation | None = None,
    placement: Placement = ONE_DEVICE,
    on_event: OnEvent = warn_of_notices,
) -> tuple[dict[str, MixedTensor], LearningReport]:
    """Trains one block; returns its packed weights and a report, see :func:`packed_result`.

    Args:
      config: the block's config.
      settings: the quantization's settings.
      dense: the block's full-precision parameters.
      packed: its quantized layers, by name (``"attn.q"``).
      samples: the block's inputs and target outputs.
      seed: seed of the order of samples.
      optimizer: any gradient transformation; :func:`learning_optimizer` if None.
      placement: the chips that split the samples of a batch, if their number divides its size.
      on_event: told of every epoch.
    """
    count, rng = len(samples.x), np.random.default_rng(seed)
    size = min(settings.batch_size, count)
    validation, training = split_samples(count, size)
    steps = len(training) // size
    optimizer = optimizer or learning_optimizer(settings, settings.epochs * steps)
    learned, layers = start({name: dense[f"{name}.weight"] for name in packed}, packed, settings, placement)
    rest = rest_of(dense, packed, placement)
    samples, options = placement.tree(samples), (BlockLoss(config, settings.augmented), placement)
    evaluated = jnp.asarray(validation.reshape(-1, math.gcd(len(validation), size)))
    orders = [rng.permutation(training)[: steps * size].reshape(-1, size) for _ in range(settings.epochs)]
    best, history = fit(
        learned,
        lambda learned, state, order: train_epoch(
            learned, state, layers, rest, samples, jnp.asarray(order), optimizer, *options
        ),
        lambda learned: float(mean_loss(learned, layers, rest, samples, evaluated, *options)),
        orders,
        placement.tree(optimizer.init(learned)),
        on_step=epoch_event(on_event, settings.epochs),
    )
    result, report = packed_result(placement.tree(best), layers, packed, history, settings)
    return {name: placement.tensor(tensor) for name, tensor in result.items()}, report


def rest_of(dense: Params, packed: Mapping[str, Any], placement: Placement = ONE_DEVICE) -> dict[str, Any]:
    """Parameters of a block that are not learned, in the dtypes of calibration."""
    return {
        name: placement.whole(as_computed(name, value))
        for name, value in dense.items()
        if name.removesuffix(".weight") not in packed
    }
