"""Drives "slim-plus" over one block: held-out samples, epochs, early stopping, the best parameters kept."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels import MixedTensor
from pallas_kernels.layout import zero_bits
from slim_jax.config import Settings
from slim_jax.method.learnable import (
    Layer,
    Learned,
    Samples,
    SlimPlus,
    clip_start,
    pack_learned,
    solved_start,
)
from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import Params, as_computed
from slim_jax.placement import ONE_DEVICE, Placement
from slim_jax.report import LearningReport

HELD_OUT = 8
"""One in this many samples is a validation sample and is not trained on."""

PATIENCE = 2
"""Epochs without a better validation loss after which a block is done."""

OnEpoch = Callable[[int, int, float], None]
"""Called after every epoch with its number, the total number, and the validation loss."""


def held_out(samples: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the validation samples and of the training samples.

    With fewer than two batches none are held out: both are all samples.
    """
    every = np.arange(samples)
    if samples < 2 * batch:
        return every, every
    validation = np.arange(0, samples, HELD_OUT)
    return validation, np.setdiff1d(every, validation)


@functools.cache
def default_optimizer(config: Settings, steps: int) -> optax.GradientTransformation:
    """Returns AdamW without weight decay, with rates that fall along a cosine to a twentieth over ``steps``.

    For clipping, the rate is constant, as in the paper's code. ``learning_rate`` is that of clipping
    parameters (0.01 of it for a clipping offset); codes, logarithms of scales and zero points learn at 0.8,
    0.6 and 0.5 of it (docs/tried.md). Equal arguments give the same object, so that steps compiled with it
    are reused.
    """
    rate = config.learning_rate

    def adam(part: float) -> optax.GradientTransformation:
        falling = optax.cosine_decay_schedule(part * rate, steps, alpha=0.05)
        return optax.adamw(part * rate if config.clips else falling, weight_decay=0.0)

    def rates(learned: Learned) -> dict[str, dict[str, str]]:
        return {layer: {name: name for name in leaves} for layer, leaves in learned.items()}

    parts = {"up": 1.0, "down": 1.0, "offset": 0.01, "code": 0.8, "log_scale": 0.6, "zero": 0.5}
    return optax.partition({name: adam(part) for name, part in parts.items()}, rates)


def best_of_epochs(
    learned: Learned,
    epochs: int,
    epoch: Callable[[Learned], Learned],
    judge: Callable[[Learned], float],
    on_epoch: OnEpoch | None = None,
) -> tuple[Learned, LearningReport]:
    """Runs epochs; returns the parameters with the lowest validation loss, and a report.

    Args:
      learned: the initial parameters; ``epoch`` may donate them.
      epochs: the largest number of epochs.
      epoch: trains on all training samples once.
      judge: returns the validation loss.
      on_epoch: called after every epoch.
    """
    best, best_epoch, losses, note = jax.tree.map(jnp.copy, learned), 0, [judge(learned)], ""
    if not math.isfinite(losses[0]):
        return best, LearningReport([], 0, f"the loss of the start values is {losses[0]}; they are kept")
    for number in range(1, epochs + 1):
        learned = epoch(learned)
        loss = judge(learned)
        if not math.isfinite(loss):
            note = f"the loss became {loss} in epoch {number}; epoch {best_epoch} is kept"
            break
        losses.append(loss)
        if on_epoch is not None:
            on_epoch(number, epochs, loss)
        if loss < losses[best_epoch]:
            best, best_epoch = jax.tree.map(jnp.copy, learned), number
        if number - best_epoch >= PATIENCE:
            break
    if best_epoch == 0 and not note:
        note = "training did not lower the loss on validation samples; the block is unchanged"
    return best, LearningReport(losses, best_epoch, note)


def start_of(
    tensor: MixedTensor, w: jax.Array, learn: str, placement: Placement = ONE_DEVICE
) -> tuple[dict[str, jax.Array], Layer]:
    """Initial learned parameters of a layer, and its fixed values; ``w [K, N]`` is its dense weight."""
    missing = tensor.groups * tensor.group_size - w.shape[0]
    w = jnp.pad(w.astype(jnp.float32), ((0, missing), (0, 0))).reshape(tensor.groups, tensor.group_size, -1)
    bits = placement.whole(tensor.bits()).astype(jnp.float32)[:, None, None]
    if learn.startswith("clip"):
        return clip_start(w, bits, zero_bits=zero_bits(tensor.widths), scale_dtype=tensor.scale.dtype)
    return solved_start(tensor, w, bits, rounding=learn == "rounding")


class BlockLearner:
    """Trains quantized blocks of one model.

    Args:
      decoder: the model's config.
      config: the quantization's settings.
      samples: number of calibration samples.
      optimizer: any gradient transformation; :func:`default_optimizer` if None.
      placement: the chips that split the samples of a batch, if their number divides its size.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        config: Settings,
        samples: int,
        optimizer: optax.GradientTransformation | None = None,
        placement: Placement = ONE_DEVICE,
    ) -> None:
        self.config, self.placement = config, placement
        self.batch = min(config.batch_size, samples)
        self.validation, self.training = held_out(samples, self.batch)
        steps = config.epochs * (len(self.training) // self.batch)
        chosen = optimizer or default_optimizer(config, steps)
        sharding = placement.of_samples()
        self.kinds = [SlimPlus(block, chosen, config.augmented, sharding) for block in decoder.blocks()]

    def improve(
        self,
        index: int,
        dense: Params,
        packed: Mapping[str, MixedTensor],
        samples: Samples,
        on_epoch: OnEpoch | None = None,
    ) -> tuple[dict[str, MixedTensor], LearningReport]:
        """Trains one block; returns its packed weights, and a report.

        If training does not lower the validation loss, the weights are the given ones, or for clipping those
        that the initial clipping parameters give.

        Args:
          index: the block's index; also seeds the order of samples.
          dense: the block's full-precision parameters.
          packed: its quantized layers, by name (``"attn.q"``).
          samples: the block's inputs and target outputs.
          on_epoch: called after every epoch.
        """
        plus = self.kinds[index]
        learned, layers, rest = self.start(dense, packed)
        samples, judge_order = self.placement.tree(samples), self._judge_order()
        state = self.placement.tree(plus.optimizer.init(learned))
        rng = np.random.default_rng(index)

        def epoch(learned: Learned) -> Learned:
            nonlocal state
            order = rng.permutation(self.training)
            order = order[: len(order) // self.batch * self.batch].reshape(-1, self.batch)
            learned, state, _ = plus.epoch(learned, state, layers, rest, samples, jnp.asarray(order))
            return learned

        def judge(learned: Learned) -> float:
            return float(plus.evaluate(learned, layers, rest, samples, judge_order))

        best, report = best_of_epochs(learned, self.config.epochs, epoch, judge, on_epoch)
        if report.kept_epoch == 0 and not self.config.clips:
            return dict(packed), report
        best = self.placement.tree(best)
        result = {name: pack_learned(best[name], layers[name], packed[name]) for name in packed}
        return {name: self.placement.tensor(tensor) for name, tensor in result.items()}, report

    def better(
        self,
        index: int,
        dense: Params,
        learned: dict[str, MixedTensor],
        rounded: dict[str, MixedTensor],
        samples: Samples,
        report: LearningReport,
    ) -> tuple[dict[str, MixedTensor], LearningReport]:
        """Returns ``rounded``, which GPTQ rounded to the ``learned`` grids, if its validation loss is lower,
        otherwise ``learned``; and the report with the outcome."""
        parameters, layers, rest = self.start(dense, rounded, "grid")  # codes as they are
        loss = float(self.kinds[index].evaluate(parameters, layers, rest, samples, self._judge_order()))
        if not report.losses:
            return learned, report
        losses = [*report.losses, loss]
        if loss < report.losses[report.kept_epoch]:
            return rounded, LearningReport(losses, len(losses) - 1, report.note)
        note = f"GPTQ did not lower the loss ({loss:.4g}); weights are rounded to nearest"
        return learned, LearningReport(losses, report.kept_epoch, f"{report.note}; {note}".strip("; "))

    def start(
        self, dense: Params, packed: Mapping[str, MixedTensor], learn: str | None = None
    ) -> tuple[Learned, dict[str, Layer], dict[str, jax.Array]]:
        """Initial learned parameters of a block, fixed values of its layers, and its other parameters.

        ``learn`` is the config's if None.
        """
        learn = learn or self.config.learn
        learned: Learned = {}
        layers: dict[str, Layer] = {}
        for name, tensor in packed.items():
            w = self.placement.whole(dense[f"{name}.weight"])
            learned[name], layers[name] = start_of(tensor, w, learn, self.placement)
        rest = {
            name: self.placement.whole(as_computed(name, value))
            for name, value in dense.items()
            if name.removesuffix(".weight") not in packed
        }
        return *self.placement.tree((learned, layers)), rest

    def _judge_order(self) -> jax.Array:
        batch = math.gcd(len(self.validation), self.batch)
        return jnp.asarray(self.validation.reshape(-1, batch))
