"""The gradient sweep: measures every token's importance at every layer and the costs of bit widths.

The sweep goes forward and backward once over the full-precision model, a block at a time: it keeps (or
offloads) the block inputs, then takes gradients from the last block to the first. With ``L`` the sum of the
tokens' losses and ``y_t [N]`` a layer's output at token ``t``, the importance of that token is

    w_t = mean_n (dL / dy_tn)^2,

so that ``sum_t w_t |(W - W_hat)^T x_t|^2 / 2`` is about the increase of ``L`` when ``W`` becomes ``W_hat``.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.layout import vary_like
from slim_jax.calibrate.activations import Activations, Inputs, observe, sample_batches
from slim_jax.calibrate.events import OnEvent, SweepStep, warn_of_notices
from slim_jax.calibrate.offload import Batches
from slim_jax.config import LAYER, Settings
from slim_jax.method.budget import LayerCosts, predicted_increase, spend, spend_on_units
from slim_jax.method.layer import LayerSolvers
from slim_jax.method.sba import Allocation
from slim_jax.model.block import Block, linear_groups, linear_names, sequence_positions
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Linear
from slim_jax.model.params import block_params, computed, make_outer
from slim_jax.model.stage import part_of
from slim_jax.placement import ONE_DEVICE, Placement
from slim_jax.store.files import write_arrays
from slim_jax.store.source import Source

LIMIT = 30.0
"""Largest token importance, in multiples of the mean: in the first block of a small model a single token had
18,000 times the mean, and would have determined the Hessian alone."""

BUDGET_TOKENS, BUDGET_LENGTH = 4096, 256
"""Number of calibration tokens that the costs of bit widths are summed over, and the largest number from one
sample: the samples are evenly spread, and truncated so that there can be more of them."""


class Sensitivity(NamedTuple):
    """Bit widths that minimize the predicted loss increase of the model.

    Attributes:
      allocation: widths of all groups of the layers that share the model's budget of bits.
      rises: predicted loss increase of each of these layers at its widths, in nats per token.
    """

    allocation: Allocation
    rises: dict[str, float]


def allocate_bits(
    source: Source,
    tokens: np.ndarray,
    settings: Settings,
    offload: Path | None = None,
    placement: Placement = ONE_DEVICE,
    file: Path | None = None,
    on_event: OnEvent = warn_of_notices,
) -> Sensitivity:
    """Returns the widths of all layers that share the model's budget; sweeps only if there is a choice.

    Args:
      source: the full-precision model.
      tokens: ``int[samples, length]``.
      settings: the quantization's settings.
      offload: a folder for activations; None keeps them in memory.
      placement: the chips that split the samples.
      file: where the result of a sweep is kept, for a run that resumes this one; None keeps nothing.
      on_event: told of every block of the sweep.
    """
    allocation = without_choice(source.config, settings)
    if allocation is not None:
        return Sensitivity(allocation, {})
    if file is not None and file.exists():  # left by the interrupted run
        with np.load(file) as saved:
            return Sensitivity(**json.loads(str(saved["sensitivity"])))
    found = Sweep(source, tokens, settings, offload, placement).run(on_event)
    if file is not None:
        write_arrays(file, {"sensitivity": np.asarray(json.dumps(found._asdict()))})
    return found


def _kind(name: str) -> str:
    """Returns a layer's name without the number of its expert."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _group(name: str) -> str:
    """Returns the name of a layer's input, the same for all experts."""
    kind = _kind(name)
    return kind if kind.endswith((".o", ".down")) else kind.rpartition(".")[0]


@jax.custom_vjp
def _measured(y: Float[Array, "b t n"], weight: Float[Array, "b t"]) -> Float[Array, "b t n"]:
    """Returns ``y``; the "gradient" with respect to ``weight`` is the token importance."""
    return y


def _measured_forward(y: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
    return y, None


def _measured_backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, jnp.mean(gradient * gradient, axis=-1)


_measured.defvjp(_measured_forward, _measured_backward)


class _Measured(Linear):
    """Linear layer whose output passes through `_measured`, which measures token importance."""

    def __init__(self, linear: Linear, token_weight: jax.Array) -> None:
        self.weight, self.bias = linear.weight, linear.bias
        self.token_weight = nnx.Variable(token_weight)

    def __call__(self, x: Float[Array, "... k"]) -> Float[Array, "... n"]:
        return _measured(super().__call__(x), self.token_weight[...])


def _with_shifts(block: Block, weights: Mapping[str, jax.Array]) -> Block:
    block = nnx.merge(*nnx.split(block))
    if block.moe is not None:
        block.moe.by_turns = False  # token importance is by position, so tokens must stay in place
    for name, weight in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(part_of(block, owner), leaf, _Measured(part_of(block, name), weight))
    return block


@partial(jax.jit, static_argnames="placement")
def _forward(block: Block, h: jax.Array, *, placement: Placement) -> jax.Array:
    def own(block: Block, h: jax.Array) -> jax.Array:
        h = h.astype(jnp.float32)
        return block(h, sequence_positions(h))[0].astype(jnp.bfloat16)

    return placement.over_samples(own)(block, h)


@partial(jax.jit, static_argnames=("names", "placement"), donate_argnames="gradient")
def _backward(
    block: Block, h: jax.Array, gradient: jax.Array, *, names: tuple[str, ...], placement: Placement
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss's gradient at the block's input, and the token importance at its layers."""

    def own(block: Block, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        h, gradient = inputs
        shifts = {name: vary_like(jnp.zeros(h.shape[:2]), h) for name in names}

        def run(h: jax.Array, shifts: dict[str, jax.Array]) -> jax.Array:
            return _with_shifts(block, shifts)(h, sequence_positions(h))[0]

        _, pull_back = jax.vjp(run, h.astype(jnp.float32), shifts)
        return pull_back(gradient)

    return placement.over_samples(own)(block, (h, gradient))


@partial(jax.jit, static_argnames="placement")
def _loss_gradient(
    outer: Decoder, h: Float[Array, "b t d"], tokens: Int[Array, "b t"], *, placement: Placement
) -> Float[Array, "b t d"]:
    """Gradient of the summed loss at the last block's output; logits are computed one sample at a time."""

    def own(outer: Decoder, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        def of_sample(sample: tuple[jax.Array, jax.Array]) -> jax.Array:
            h, tokens = sample

            def loss(h: jax.Array) -> jax.Array:
                logits = outer.logits(h[:-1])
                chosen = jnp.take_along_axis(logits, tokens[1:, None], axis=1)[:, 0]
                return jnp.sum(jax.nn.logsumexp(logits, axis=1) - chosen)

            return jax.grad(loss)(h.astype(jnp.float32))

        return jax.lax.map(of_sample, inputs)

    return placement.over_samples(own)(outer, (h, tokens))


class Sweep:
    """One forward and one backward pass over a model.

    Args:
      source: the full-precision model.
      tokens: ``int[samples, length]``; some of them are used, see :func:`some_samples`.
      config: the quantization's settings.
      offload: a folder for activations; None keeps them in memory.
      placement: the chips that split the samples.
    """

    def __init__(
        self,
        source: Source,
        tokens: np.ndarray,
        config: Settings,
        offload: Path | None = None,
        placement: Placement = ONE_DEVICE,
    ) -> None:
        self.source, self.config, self.placement = source, config, placement
        self.tokens = some_samples(tokens, placement.devices)
        self.start = Activations.of(source, self.tokens, offload, placement)
        self.solvers = LayerSolvers(config, None, placement=placement)
        self.names = [tuple(itertools.chain(*linear_groups(block))) for block in source.config.blocks()]
        self.costs: dict[str, LayerCosts] = {}

    def run(self, on_event: OnEvent = warn_of_notices) -> Sensitivity:
        """Runs the sweep and spends the bit budget."""
        inputs = self._inputs()
        gradients = self._loss_gradients(inputs.pop())
        total = self.source.config.num_layers
        for index in reversed(range(total)):
            h = inputs.pop()
            self._cost(index, h, *self._importance(index, h, gradients))
            on_event(SweepStep(total - index, total))
        names = [name for name in linear_names(self.source.config) if name in self.costs]
        return Sensitivity(*spend_all({name: self.costs[name] for name in names}, self.config))

    def _inputs(self) -> list[Batches]:
        """Inputs of every block in bfloat16, followed by the output of the last block."""
        keep = self.start.keep
        inputs = [keep(h.astype(jnp.bfloat16) for h in self.start.batches)]
        self.start = dataclasses.replace(self.start, batches=[])
        for index in range(self.source.config.num_layers):
            block = self.start.part(index, "", self.source.block(index))
            inputs.append(keep(_forward(block, h, placement=self.placement) for h in inputs[-1]))
        return inputs

    def _loss_gradients(self, outputs: Batches) -> Batches:
        decoder = make_outer(self.source.config, self.placement.tree(computed(self.source.outer())))
        rows = map(self.placement.samples, sample_batches(self.tokens, self.placement.devices))
        return self.start.keep(
            _loss_gradient(decoder, h, batch, placement=self.placement) for h, batch in zip(outputs, rows)
        )

    def _importance(
        self, index: int, inputs: Batches, gradients: Batches
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Propagates the gradients back through a block.

        Returns:
          The token importance ``float32[samples, length]``, of mean 1, for each input of layers, by a name
          such as ``"attn.o"`` (experts share theirs), and every layer's mean (limited) importance.
        """
        block = self.start.part(index, "", self.source.block(index))
        found: dict[str, list[np.ndarray]] = {name: [] for name in self.names[index]}
        for i, h in enumerate(inputs):
            gradients[i], weights = _backward(
                block, h, gradients[i], names=self.names[index], placement=self.placement
            )
            for name, weight in weights.items():
                found[name].append(self.placement.fetch(weight))
        scales: dict[str, float] = {}
        kinds: dict[str, Any] = {}
        for name, parts in found.items():
            weight, scales[name] = limited(np.concatenate(parts))
            kinds[_kind(name)] = kinds.get(_kind(name), 0.0) + scales[name] * weight
        importance: dict[str, Any] = {}
        for kind, weight in kinds.items():
            group = _group(kind)
            share = np.float32(1 / sum(_group(other) == group for other in kinds))
            importance[group] = importance.get(group, np.float32(0)) + share * limited(weight)[0]
        return importance, scales

    def _cost(
        self, index: int, inputs: Batches, importance: Mapping[str, np.ndarray], scales: Mapping[str, float]
    ) -> None:
        """Computes the cost of every width of every group of the block's layers."""
        params = self.source.block(index)

        def cost(names: tuple[str, ...], seen: Inputs) -> dict[str, Any]:
            layers = {f"blocks.{index}.{name}": name for name in names}
            by_solver = [(s, some) for s, some in self.solvers.of(list(layers)) if s.config.over_model]
            if not by_solver:
                return {}
            weighted = seen._replace(weights=importance[_group(names[0])])
            observation = observe(weighted, 1 << 30, self.placement)
            share = observation.tokens / self.tokens.size
            for solver, some in by_solver:
                weights = {full: params[f"{layers[full]}.weight"] for full in some}
                for full, error in solver.errors(weights, observation).items():
                    rise = 0.25 * scales[layers[full]] * share * error.astype(np.float64)
                    group = solver.config.group_size * weights[full].shape[1]
                    self.costs[full] = LayerCosts(rise, group)
            return {}

        before = self.start.with_batches(h.astype(jnp.float32) for h in inputs)
        before.through(index, params, cost)


def _unit(name: str) -> str:
    """Returns the name of what engines load as one: layers of a block that share an input, all experts'."""
    blocks, index, layer = name.split(".", 2)
    return f"{blocks}.{index}.{_group(layer)}"


def spend_all(costs: Mapping[str, LayerCosts], config: Settings) -> tuple[Allocation, dict[str, float]]:
    """Allocates the widths of every group; returns them and the predicted loss increase of each layer.

    Layers share one bit budget, except those whose bits a rule sets: each of these has its own. For ``unit``
    see `SlimConfig`.
    """
    budgets: dict[str, list[str]] = {"": []}
    for name in costs:
        rule = config.rule(name)
        budgets.setdefault("" if rule is None or rule.bits is None else name, []).append(name)
    allocation: Allocation = {}
    rises: dict[str, float] = {}
    for names in filter(None, budgets.values()):
        layers, settings = {name: costs[name] for name in names}, list(map(config.of_layer, names))
        assert settings[0] is not None
        widths, budget, weights = settings[0].widths, Fraction(0), 0
        for layer, own in zip(layers.values(), settings):  # exact fractions: equal means give that same mean
            assert own is not None
            size = layer.weights * len(layer.rise)
            budget, weights = budget + Fraction(own.mean_width) * size, weights + size
        mean = float(budget / weights)
        if config.unit == LAYER:
            spent = spend_on_units(layers, {name: _unit(name) for name in names}, widths, mean)
        else:
            spent = spend(layers, widths, mean)
        allocation |= spent
        rises |= predicted_increase(layers, widths, spent)
    return {name: allocation[name] for name in costs}, {name: rises[name] for name in costs}


def without_choice(model: DecoderConfig, config: Settings) -> Allocation | None:
    """Widths of all groups under the model's budget if each layer has one possible width; None otherwise."""
    allocation: Allocation = {}
    for index, kind in enumerate(model.blocks()):
        shapes = block_params(kind)
        for name in itertools.chain(*linear_groups(kind)):
            full = f"blocks.{index}.{name}"
            own = config.of_layer(full)
            if own is None or not own.over_model:
                continue
            if len(own.widths) > 1:
                return None
            channels = shapes[f"{name}.weight"].shape[0]
            allocation[full] = [own.widths[0]] * -(-channels // own.group_size)
    return allocation


def some_samples(tokens: np.ndarray, devices: int) -> np.ndarray:
    """Selects samples of about :data:`BUDGET_TOKENS` tokens in total; ``devices`` divides their number."""
    length = min(tokens.shape[1], BUDGET_LENGTH)
    count = min(len(tokens), max(1, BUDGET_TOKENS // length))
    count = -(-count // devices) * devices
    return tokens[np.arange(count) * len(tokens) // count, :length]


def limited(weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Clips weights at :data:`LIMIT` times their mean; returns them as ``float32`` of mean 1, and their mean
    after clipping.

    If all weights are 0, these are ones and 0.
    """
    weights = weights.astype(np.float64)
    weights = np.minimum(weights, LIMIT * weights.mean())
    mean = float(weights.mean())
    if mean == 0:
        return np.ones(weights.shape, np.float32), 0.0
    return (weights / mean).astype(np.float32), mean
