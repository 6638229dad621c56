"""Driving "slim-plus" over one block: held-out samples, epochs, early stop, the best parameters win."""

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
"""One sample in so many is not learned from, but judges."""

PATIENCE = 2
"""Epochs without a better held-out loss after which a block is done."""

OnEpoch = Callable[[int, int, float], None]
"""Called after every epoch with its number, the number of all, and the held-out loss."""


def held_out(samples: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Which samples judge, and which are learned from; a single batch has nothing to hold out."""
    every = np.arange(samples)
    if samples < 2 * batch:
        return every, every
    judges = np.arange(0, samples, HELD_OUT)
    return judges, np.setdiff1d(every, judges)


@functools.cache
def default_optimizer(config: Settings, steps: int) -> optax.GradientTransformation:
    """AdamW without weight decay; rates fall along a cosine to a twentieth over ``steps``.

    Clipping learns at a constant rate, as in the paper's code. ``learning_rate`` is that of clipping
    parameters; codes, logarithms of scales and zero points move at 0.8, 0.6 and 0.5 of it (docs/tried.md).
    Equal arguments give the same object, so that steps compiled with it serve again.
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
    """The best of what epoch after epoch gives, by the held-out loss, and how it went.

    Args:
      learned: the start; ``epoch`` may donate it.
      epochs: at most.
      epoch: learns from all samples once.
      judge: the held-out loss.
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
        note = "learning did not lower the held-out loss; the start values are kept"
    return best, LearningReport(losses, best_epoch, note)


def start_of(
    tensor: MixedTensor, w: jax.Array, learn: str, placement: Placement = ONE_DEVICE
) -> tuple[dict[str, jax.Array], Layer]:
    """What is learned of a layer and what stays fixed of it; ``w [K, N]`` is its full-precision weight."""
    missing = tensor.groups * tensor.group_size - w.shape[0]
    w = jnp.pad(w.astype(jnp.float32), ((0, missing), (0, 0))).reshape(tensor.groups, tensor.group_size, -1)
    bits = placement.whole(tensor.bits()).astype(jnp.float32)[:, None, None]
    if learn.startswith("clip"):
        return clip_start(w, bits, zero_bits=zero_bits(tensor.widths), scale_dtype=tensor.scale.dtype)
    return solved_start(tensor, w, bits, rounding=learn == "rounding")


class BlockLearner:
    """Improves quantized blocks of one model.

    Args:
      decoder: the model's config.
      config: of the quantization.
      samples: number of calibration samples.
      optimizer: instead of :func:`default_optimizer`.
      placement: the devices that share the samples of a batch, where they divide its size.
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
        self.judges, self.learners = held_out(samples, self.batch)
        steps = config.epochs * (len(self.learners) // self.batch)
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
        """Better packed weights for one block, or the given ones where learning gave none.

        Args:
          index: which block; also seeds the order of samples.
          dense: the block's full-precision parameters.
          packed: its quantized layers, by name (``"attn.q"``).
          samples: what the block reads and should give.
          on_epoch: called after every epoch.
        """
        plus = self.kinds[index]
        learned, layers, rest = self.start(dense, packed)
        samples, judge_order = self.placement.tree(samples), self._judge_order()
        state = self.placement.tree(plus.optimizer.init(learned))
        rng = np.random.default_rng(index)

        def epoch(learned: Learned) -> Learned:
            nonlocal state
            order = rng.permutation(self.learners)
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
        """``rounded``, what GPTQ made of the ``learned`` grids, if its held-out loss is lower."""
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
        """What is learned of a block, what stays fixed of its layers, and its other parameters.

        ``learn`` is the config's unless given.
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
        batch = math.gcd(len(self.judges), self.batch)
        return jnp.asarray(self.judges.reshape(-1, batch))
