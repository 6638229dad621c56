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
from slim_jax.calibrate.events import LearningEpoch, OnEvent
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


def start_of(
    tensor: MixedTensor, w: jax.Array, settings: Settings, placement: Placement = ONE_DEVICE
) -> tuple[dict[str, jax.Array], Layer]:
    """Initial learned parameters of a layer, and its fixed values; ``w [K, N]`` is its dense weight."""
    missing = tensor.groups * tensor.group_size - w.shape[0]
    w = jnp.pad(w.astype(jnp.float32), ((0, missing), (0, 0))).reshape(tensor.groups, tensor.group_size, -1)
    bits = placement.whole(tensor.bits()).astype(jnp.float32)[:, None, None]
    if settings.clips:
        return clip_start(w, bits, zero_bits=zero_bits(tensor.widths), scale_dtype=tensor.scale.dtype)
    return solved_start(tensor, w, bits)


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
    *,
    loss: BlockLoss,
    optimizer: optax.GradientTransformation,
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
    *,
    loss: BlockLoss,
    placement: Placement = ONE_DEVICE,
) -> Float[Array, ""]:
    """Mean loss over the rows ``order`` of the samples."""

    def step(total: jax.Array, rows: jax.Array):
        batch = placement.split_batch(jax.tree.map(lambda a: a[rows], samples))
        return total + loss(learned, layers, rest, batch), None

    return lax.scan(step, jnp.zeros(()), order)[0] / order.shape[0]


class BlockLearner:
    """Trains quantized blocks of one model.

    Args:
      decoder: the model's config.
      settings: the quantization's settings.
      samples: number of calibration samples.
      optimizer: any gradient transformation; :func:`learning_optimizer` if None.
      placement: the chips that split the samples of a batch, if their number divides its size.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        settings: Settings,
        samples: int,
        optimizer: optax.GradientTransformation | None = None,
        placement: Placement = ONE_DEVICE,
    ) -> None:
        self.settings, self.placement = settings, placement
        self.batch = min(settings.batch_size, samples)
        self.validation, self.training = split_samples(samples, self.batch)
        steps = settings.epochs * (len(self.training) // self.batch)
        self.optimizer = optimizer or learning_optimizer(settings, steps)
        self.losses = [BlockLoss(block, settings.augmented) for block in decoder.blocks()]

    def improve(
        self,
        index: int,
        dense: Params,
        packed: Mapping[str, MixedTensor],
        samples: Samples,
        on_event: OnEvent,
    ) -> tuple[dict[str, MixedTensor], LearningReport]:
        """Trains one block; returns its packed weights and a report, see :func:`packed_result`.

        Args:
          index: the block's index; also seeds the order of samples.
          dense: the block's full-precision parameters.
          packed: its quantized layers, by name (``"attn.q"``).
          samples: the block's inputs and target outputs.
          on_event: told of every epoch.
        """
        learned, layers, rest = self.start(dense, packed)
        samples = self.placement.tree(samples)
        validation = math.gcd(len(self.validation), self.batch)
        judged = jnp.asarray(self.validation.reshape(-1, validation))
        options = {"loss": self.losses[index], "placement": self.placement}

        def update(learned: Learned, state: Any, order: jax.Array) -> tuple[Learned, Any, jax.Array]:
            more = {**options, "optimizer": self.optimizer}
            return train_epoch(learned, state, layers, rest, samples, order, **more)

        best, history = fit(
            learned,
            update,
            lambda learned: float(mean_loss(learned, layers, rest, samples, judged, **options)),
            self._orders(index),
            self.placement.tree(self.optimizer.init(learned)),
            on_step=epoch_event(on_event, self.settings.epochs),
        )
        best = self.placement.tree(best)
        result, report = packed_result(best, layers, packed, history, self.settings)
        return {name: self.placement.tensor(tensor) for name, tensor in result.items()}, report

    def start(
        self, dense: Params, packed: Mapping[str, MixedTensor]
    ) -> tuple[Learned, dict[str, Layer], dict[str, jax.Array]]:
        """Initial learned parameters of a block, fixed values of its layers, and its other parameters."""
        learned: Learned = {}
        layers: dict[str, Layer] = {}
        for name, tensor in packed.items():
            w = self.placement.whole(dense[f"{name}.weight"])
            learned[name], layers[name] = start_of(tensor, w, self.settings, self.placement)
        rest = {
            name: self.placement.whole(as_computed(name, value))
            for name, value in dense.items()
            if name.removesuffix(".weight") not in packed
        }
        return *self.placement.tree((learned, layers)), rest

    def _orders(self, seed: int) -> list[Int[Array, "steps batch"]]:
        """Order of the training samples in each epoch."""
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(self.training) for _ in range(self.settings.epochs)]
        whole = len(self.training) // self.batch * self.batch
        return [jnp.asarray(order[:whole].reshape(-1, self.batch)) for order in orders]
