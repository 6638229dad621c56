"""Drives fine-tuning: computes the targets, holds out samples, resumes, and keeps the best parameters."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from slim_jax.calibrate.activations import Activations
from slim_jax.calibrate.embeddings import head_inputs
from slim_jax.calibrate.learning import PATIENCE, held_out
from slim_jax.config import Settings
from slim_jax.method.fine_tune import Batch, Fixed, Learned, Tuner, no_change, stacked
from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import Params, computed
from slim_jax.placement import ONE_DEVICE, Placement
from slim_jax.report import TuningReport
from slim_jax.store.files import write_arrays
from slim_jax.store.source import Source

JUDGEMENTS = 3
"""Number of evaluations on the validation samples, not counting the one at the start."""

SAVED = 8
"""Steps between two saves of an unfinished fine-tuning."""

OnStep = Callable[[int, int, float], None]
"""Called after every step with its number, the total number, and the loss of its samples."""


@functools.cache
def default_optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """Returns Adam with a rate that falls along a cosine to a twentieth over ``steps``."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=0.05))


def tune(
    source: Source,
    tokens: np.ndarray,
    config: Settings,
    outer: Params,
    blocks: Sequence[Params],
    placement: Placement = ONE_DEVICE,
    reference: Activations | None = None,
    offload: Path | None = None,
    file: Path | None = None,
    on_step: OnStep | None = None,
) -> tuple[Learned, TuningReport]:
    """Fine-tunes a packed model; returns the factors for `slim_jax.method.fine_tune.apply` and a report.

    Args:
      source: the full-precision model.
      tokens: ``int[samples, length]``.
      config: the quantization's settings.
      outer: the packed model's parameters outside the blocks.
      blocks: the packed model's blocks.
      placement: the chips that split the samples of a batch, if their number divides its size.
      reference: the activations after the last full-precision block; computed if None.
      offload: a folder for activations; None keeps them in memory.
      file: where an unfinished fine-tuning is saved, to be resumed; None saves nothing.
      on_step: called after every step.
    """
    full = placement.tree(computed(source.outer()))
    if reference is None:
        reference = Activations.of(source, tokens, offload, placement)
        for index in range(source.config.num_layers):
            reference = reference.behind(index, source.block(index))
    targets = [placement.fetch(x) for x in head_inputs(source.config, full, reference)]
    tuning = Tuning(source.config, config, tokens, np.concatenate(targets), None, placement, file)
    return tuning.run(outer, blocks, full, on_step)


class Tuning:
    """Fine-tunes a packed model.

    Args:
      decoder: the model's config.
      config: the quantization's settings.
      tokens: ``int[samples, length]``.
      targets: the full-precision model's LM head inputs, ``[samples, length, e]``.
      optimizer: any gradient transformation; :func:`default_optimizer` if None.
      placement: the chips that split the samples of a batch, if their number divides its size.
      file: where an unfinished fine-tuning is saved, to be resumed; None saves nothing.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        config: Settings,
        tokens: np.ndarray,
        targets: np.ndarray,
        optimizer: optax.GradientTransformation | None = None,
        placement: Placement = ONE_DEVICE,
        file: Path | None = None,
    ) -> None:
        self.decoder, self.tokens, self.targets = decoder, tokens, targets
        self.placement, self.file = placement, file
        batch = min(config.tune_batch_size, len(tokens))
        self.validation, training = held_out(len(tokens), batch)
        rng = np.random.default_rng(0)
        order = np.concatenate([rng.permutation(training) for _ in range(config.tune_epochs)])
        self.order = order[: len(order) // batch * batch].reshape(-1, batch)
        self.judge_batch = math.gcd(len(self.validation), batch)
        optimizer = optimizer or default_optimizer(config.tune_rate, len(self.order))
        self.tuner = Tuner(decoder, optimizer, placement)

    def run(
        self, outer: Params, blocks: Sequence[Params], full: Params, on_step: OnStep | None = None
    ) -> tuple[Learned, TuningReport]:
        """Runs fine-tuning; returns the factors for `slim_jax.method.fine_tune.apply` and a report.

        Args:
          outer: the packed model's parameters outside the blocks.
          blocks: the packed model's blocks.
          full: the full-precision model's parameters outside the blocks.
          on_step: called after every step.
        """
        fixed = Fixed(stacked(self.decoder, blocks), dict(outer), dict(full))
        inside = {run: no_change(blocks, inside=True) for run, blocks in fixed.blocks.items()}
        start = Learned(inside, no_change(outer, inside=False))
        learned: Learned = self.placement.tree(start)
        state = self.placement.tree(self.tuner.optimizer.init(learned))
        best, history = jax.tree.map(jnp.copy, learned), History()
        if self.file is not None and self.file.exists():
            (learned, state, best), history = read_state(self.file, (learned, state, best), self.placement)
        else:
            history.judge(0, self._judge(learned, fixed))
        steps = len(self.order)
        judged = {steps * i // JUDGEMENTS for i in range(1, JUDGEMENTS + 1)}
        for step in range(history.step + 1, steps + 1):
            if history.over:
                break
            batch = self._batch(self.order[step - 1])
            learned, state, loss = self.tuner.step(learned, state, fixed, batch)
            history.step = step
            if on_step is not None:
                on_step(step, steps, float(loss))
            if step in judged and history.judge(step, self._judge(learned, fixed)):
                best = jax.tree.map(jnp.copy, learned)
            if self.file is not None and (step in judged or step % SAVED == 0):
                write_state(self.file, (learned, state, best), history, self.placement)
        return best, history.report(self.order[: history.step].size * self.tokens.shape[1])

    def _batch(self, rows: np.ndarray) -> Batch:
        put = self.placement.whole if len(rows) % self.placement.devices else self.placement.samples
        return Batch(put(self.tokens[rows].astype(np.int32)), put(self.targets[rows]))

    def _judge(self, learned: Learned, fixed: Fixed) -> float:
        parts = self.validation.reshape(-1, self.judge_batch)
        return float(np.mean([self.tuner.evaluate(learned, fixed, self._batch(rows)) for rows in parts]))


@dataclasses.dataclass
class History:
    """Progress of a fine-tuning.

    Attributes:
      step: number of the last step that was taken.
      losses: step and validation loss of every evaluation.
      note: why it ended early; empty if it did not.
    """

    step: int = 0
    losses: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    note: str = ""

    @property
    def best(self) -> int:
        """Index of the lowest of ``losses``; 0, the start, if there are none."""
        return min(range(len(self.losses)), key=lambda i: self.losses[i][1], default=0)

    @property
    def over(self) -> bool:
        """True if fine-tuning should stop: it failed, or the last `PATIENCE` evaluations were no better."""
        return bool(self.note) or len(self.losses) - 1 - self.best >= PATIENCE

    def judge(self, step: int, loss: float) -> bool:
        """Records a validation loss; True if it is the lowest so far."""
        if not math.isfinite(loss):
            when = f"became {loss} by step {step}" if step else f"is {loss} at the start"
            self.note = f"the loss {when}"
            return False
        self.losses.append((step, loss))
        return self.best == len(self.losses) - 1

    def report(self, tokens: int) -> TuningReport:
        """Returns the report of a fine-tuning on ``tokens`` tokens."""
        note = self.note or (
            "" if self.best else "the loss on validation samples did not fall; scales and norms are unchanged"
        )
        return TuningReport(self.losses, self.best, tokens, note)


def write_state(file: Path, trees: Any, history: History, placement: Placement) -> None:
    """Saves an unfinished fine-tuning; see `slim_jax.store.files.write_arrays`."""
    leaves = {str(i): placement.fetch(leaf) for i, leaf in enumerate(jax.tree.leaves(trees))}
    write_arrays(file, {"history": np.asarray(json.dumps(dataclasses.asdict(history))), **leaves})


def read_state(file: Path, like: Any, placement: Placement) -> tuple[Any, History]:
    """Reads what :func:`write_state` wrote; ``like`` are trees of the same structure."""
    with np.load(file) as saved:
        fields = json.loads(str(saved["history"]))
        fields["losses"] = [(step, loss) for step, loss in fields["losses"]]
        leaves = [placement.whole(saved[str(i)]) for i in range(len(saved.files) - 1)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), History(**fields)
