"""End-to-end fine-tuning of a packed model: computes the targets and trains scales and norms on them."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Float

from slim_jax.calibrate.activations import Activations
from slim_jax.calibrate.embeddings import head_inputs
from slim_jax.calibrate.events import OnEvent, TuningStep, warn_of_notices
from slim_jax.calibrate.fit import default_optimizer, fit, gradient_step, split_samples
from slim_jax.config import Settings
from slim_jax.method.fine_tune import Batch, Fixed, Learned, TuningLoss, no_change, stacked
from slim_jax.model.params import Params, computed
from slim_jax.placement import ONE_DEVICE, Placement
from slim_jax.report import TuningReport
from slim_jax.store.source import Source

EVALUATIONS = 3
"""Number of evaluations on the validation samples, not counting the one at the start."""


def fine_tune(
    source: Source,
    tokens: np.ndarray,
    settings: Settings,
    outer: Params,
    blocks: Sequence[Params],
    placement: Placement = ONE_DEVICE,
    reference: Activations | None = None,
    offload: Path | None = None,
    state_file: Path | None = None,
    on_event: OnEvent = warn_of_notices,
) -> tuple[Learned, TuningReport]:
    """Fine-tunes a packed model; returns the factors for `slim_jax.method.fine_tune.apply` and a report.

    Args:
      source: the full-precision model.
      tokens: ``int[samples, length]``.
      settings: the quantization's settings.
      outer: the packed model's parameters outside the blocks.
      blocks: the packed model's blocks.
      placement: the chips that split the samples of a batch, if their number divides its size.
      reference: the activations after the last full-precision block; computed if None.
      offload: a folder for activations; None keeps them in memory.
      state_file: where an unfinished fine-tuning is saved, to be resumed; None saves nothing.
      on_event: told of every step.
    """
    full = placement.tree(computed(source.outer()))
    targets = _targets(source, tokens, full, placement, reference, offload)
    del reference
    batch_size = min(settings.tune_batch_size, len(tokens))
    validation, training = split_samples(len(tokens), batch_size)
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(training) for _ in range(settings.tune_epochs)])
    order = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    evaluated = validation.reshape(-1, math.gcd(len(validation), batch_size))
    steps, loss = len(order), TuningLoss(source.config)
    optimizer = default_optimizer(settings.tune_rate, steps)
    fixed = Fixed(stacked(source.config, blocks), dict(outer), full)
    inside = {segment: no_change(blocks, inside=True) for segment, blocks in fixed.blocks.items()}
    start: Learned = placement.tree(Learned(inside, no_change(outer, inside=False)))

    def batch(rows: np.ndarray) -> Batch:
        put = placement.whole if len(rows) % placement.devices else placement.samples
        return Batch(put(tokens[rows].astype(np.int32)), put(targets[rows]))

    best, history = fit(
        start,
        lambda learned, state, rows: _step(
            learned, state, fixed, batch(rows), loss=loss, optimizer=optimizer, placement=placement
        ),
        lambda learned: float(
            np.mean([_loss(learned, fixed, batch(rows), loss, placement) for rows in evaluated])
        ),
        list(order),
        placement.tree(optimizer.init(start)),
        evaluated={steps * i // EVALUATIONS for i in range(1, EVALUATIONS + 1)},
        state_file=state_file,
        placement=placement,
        on_step=lambda step, loss, _: on_event(TuningStep(step, steps, float(loss))),
    )
    seen = order[: history.step].size * tokens.shape[1]
    return best, TuningReport(history.losses, history.best, seen, history.note)


def _targets(
    source: Source,
    tokens: np.ndarray,
    full: Params,
    placement: Placement,
    reference: Activations | None,
    offload: Path | None,
) -> Float[np.ndarray, "samples length e"]:
    """LM head inputs of the full-precision model, whose parameters outside the blocks are ``full``."""
    if reference is None:
        reference = Activations.of(source, tokens, offload, placement)
        for index in range(source.config.num_layers):
            reference = reference.through(index, source.block(index))
    return np.concatenate([placement.fetch(x) for x in head_inputs(source.config, full, reference)])


@partial(jax.jit, static_argnames=("loss", "optimizer", "placement"), donate_argnames=("learned", "state"))
def _step(
    learned: Learned,
    state: Any,
    fixed: Fixed,
    batch: Batch,
    *,
    loss: TuningLoss,
    optimizer: optax.GradientTransformation,
    placement: Placement,
) -> tuple[Learned, Any, Float[Array, ""]]:
    *changed, value = gradient_step(loss, optimizer, learned, state, fixed, placement.split_batch(batch))
    return *placement.gathered(tuple(changed)), value


@partial(jax.jit, static_argnames=("loss", "placement"))
def _loss(
    learned: Learned, fixed: Fixed, batch: Batch, loss: TuningLoss, placement: Placement
) -> Float[Array, ""]:
    return loss(learned, fixed, placement.split_batch(batch))
