"""Training loop of all that learns by gradient: blocks, modules, and scales and norms of the whole model.

The validation loss decides: the parameters with the lowest are kept, and training stops early after
:data:`PATIENCE` evaluations without a lower one, or when a loss is not finite.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from slim_jax.placement import ONE_DEVICE, Placement
from slim_jax.store.files import write_arrays

HELD_OUT = 8
"""One in this many samples is a validation sample and is not trained on."""

PATIENCE = 2
"""Evaluations without a lower validation loss after which training stops."""

SAVED = 8
"""Steps between two saves of an unfinished training."""

Update = Callable[[Any, Any, Any], tuple[Any, Any, Any]]
"""``update(parameters, optimizer_state, batch) -> (parameters, optimizer_state, loss)``. The first two may be
donated."""

OnStep = Callable[[int, Any, float | None], None]
"""Called after every step with its number, the loss that it returned, and the validation loss if there was an
evaluation."""


def split_samples(samples: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the validation samples and of the training samples.

    With fewer than two batches none are held out: both are all samples.
    """
    every = np.arange(samples)
    if samples < 2 * batch_size:
        return every, every
    validation = np.arange(0, samples, HELD_OUT)
    return validation, np.setdiff1d(every, validation)


@functools.cache
def default_optimizer(rate: float, steps: int | None) -> optax.GradientTransformation:
    """Returns Adam with a rate that falls along a cosine to a twentieth over ``steps``; constant if None.

    Equal arguments give the same object, so that steps compiled with it are reused.
    """
    return optax.adam(rate if steps is None else optax.cosine_decay_schedule(rate, steps, alpha=0.05))


def gradient_step(
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    parameters: Any,
    state: Any,
    *arguments: Any,
) -> tuple[Any, Any, jax.Array]:
    """Takes one step down the gradient of ``loss(parameters, *arguments)``.

    Returns:
      The parameters and the optimizer's state after the step, and the loss before it.
    """
    value, gradient = jax.value_and_grad(loss)(parameters, *arguments)
    updates, state = optimizer.update(gradient, state, parameters)
    return optax.apply_updates(parameters, updates), state, value


@dataclasses.dataclass
class History:
    """Progress of a training.

    Attributes:
      step: number of the last step that was taken.
      losses: step and validation loss of every evaluation, the first before any step; without losses that are
        not finite.
      failure: the problem that ended training; empty if there was none.
    """

    step: int = 0
    losses: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    failure: str = ""

    @property
    def best(self) -> int:
        """Index of the lowest of ``losses``; 0, the start, if there are none."""
        return min(range(len(self.losses)), key=lambda i: self.losses[i][1], default=0)

    @property
    def over(self) -> bool:
        """True if training should stop: it failed, or the last `PATIENCE` evaluations were no better."""
        return bool(self.failure) or len(self.losses) - 1 - self.best >= PATIENCE

    @property
    def note(self) -> str:
        """Problem that occurred, for a report; empty if there was none."""
        unchanged = "the loss on validation samples did not fall; nothing is changed"
        return self.failure or ("" if self.best else unchanged)

    def record(self, loss: float) -> bool:
        """Records the validation loss after the last step; True if it is the lowest so far."""
        if not math.isfinite(loss):
            when = f"became {loss} in step {self.step}" if self.step else f"is {loss} at the start"
            self.failure = f"the validation loss {when}; the best parameters before are kept"
            return False
        self.losses.append((self.step, loss))
        return self.best == len(self.losses) - 1


def fit(
    parameters: Any,
    update: Update,
    validation_loss: Callable[[Any], float],
    batches: Sequence[Any],
    optimizer_state: Any,
    *,
    evaluated: Collection[int] | None = None,
    state_file: Path | None = None,
    placement: Placement = ONE_DEVICE,
    on_step: OnStep | None = None,
) -> tuple[Any, History]:
    """Trains parameters, and returns those with the lowest validation loss.

    Args:
      parameters: the initial parameters, a tree of arrays; ``update`` may donate them.
      update: takes a step, such as a batch or an epoch of batches.
      validation_loss: returns the loss of parameters on the validation samples.
      batches: what each step is called with, in order.
      optimizer_state: the initial state of the optimizer.
      evaluated: numbers of the steps that an evaluation follows, from 1; by default all.
      state_file: where an unfinished training is saved, to be resumed; None saves nothing.
      placement: the chips that hold resumed arrays.
      on_step: called after every step.

    Returns:
      The best parameters, and the history.
    """
    state, best, history = optimizer_state, jax.tree.map(jnp.copy, parameters), History()
    if state_file is not None and state_file.exists():
        (parameters, state, best), history = _load(state_file, (parameters, state, best), placement)
    else:
        history.record(validation_loss(parameters))
    for step in range(history.step + 1, len(batches) + 1):
        if history.over:
            break
        parameters, state, loss = update(parameters, state, batches[step - 1])
        history.step, validation = step, None
        if evaluated is None or step in evaluated:
            validation = validation_loss(parameters)
            if history.record(validation):
                best = jax.tree.map(jnp.copy, parameters)
        if on_step is not None:
            on_step(step, loss, validation)
        if state_file is not None and (validation is not None or step % SAVED == 0):
            _save(state_file, (parameters, state, best), history, placement)
    return best, history


def _save(file: Path, trees: Any, history: History, placement: Placement) -> None:
    """Saves an unfinished training; see `slim_jax.store.files.write_arrays`."""
    leaves = {str(i): placement.fetch(leaf) for i, leaf in enumerate(jax.tree.leaves(trees))}
    write_arrays(file, {"history": np.asarray(json.dumps(dataclasses.asdict(history))), **leaves})


def _load(file: Path, like: Any, placement: Placement) -> tuple[Any, History]:
    """Reads what :func:`_save` wrote; ``like`` are trees of the same structure."""
    with np.load(file) as saved:
        fields = json.loads(str(saved["history"]))
        fields["losses"] = [(step, loss) for step, loss in fields["losses"]]
        leaves = [placement.whole(saved[str(i)]) for i in range(len(saved.files) - 1)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), History(**fields)
