"""Quantizes one block after another: observes its layers' inputs, solves the layers, trains "slim-plus"."""

import dataclasses
import itertools
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels import MixedTensor
from slim_jax.calibrate.activations import Activations, Inputs, observe
from slim_jax.calibrate.embeddings import quantize_embeddings
from slim_jax.calibrate.events import OnEvent, warn_of_notices
from slim_jax.calibrate.learning import learn_block
from slim_jax.calibrate.sensitivity import Sensitivity
from slim_jax.config import Settings
from slim_jax.method.hessian import Observation
from slim_jax.method.layer import LayerSolvers
from slim_jax.method.learnable import Samples
from slim_jax.model.block import linear_groups
from slim_jax.model.params import Params, as_stored
from slim_jax.placement import ONE_DEVICE, Placement
from slim_jax.report import BlockReport, LayerReport
from slim_jax.store.source import Source


class BlockQuantizer:
    """Quantizes blocks one after another while it carries the calibration activations along.

    Args:
      source: the full-precision model.
      tokens: ``int[samples, length]``.
      config: how to quantize.
      sensitivity: the widths of layers, see `slim_jax.calibrate.sensitivity.allocate_bits`.
      given: if True, the widths are those of all layers; otherwise of those that share the model's budget.
      optimizer: for "slim-plus"; `slim_jax.calibrate.learning.learning_optimizer` if None.
      offload: a folder for activations; None keeps them in memory.
      placement: the chips that split the work.
    """

    def __init__(
        self,
        source: Source,
        tokens: np.ndarray,
        config: Settings,
        sensitivity: Sensitivity,
        given: bool = False,
        optimizer: optax.GradientTransformation | None = None,
        offload: Path | None = None,
        placement: Placement = ONE_DEVICE,
    ) -> None:
        self.source, self.config, self.placement = source, config, placement
        self.rises = sensitivity.rises
        self.solvers = LayerSolvers(config, sensitivity.allocation, given=given, placement=placement)
        self.activations = Activations.of(source, tokens, offload, placement)
        self.stride = max(1, tokens.size // config.search_tokens)
        self.optimizer = optimizer
        self.reference: Activations | None = None  # of the reference (full-precision) pass
        if config.corrects or config.method == "slim-plus":
            self.reference = self.activations

    def skip(self, index: int, params: Params) -> None:
        """Passes the activations through a block that an earlier run has quantized."""
        if self.reference is not None:
            self.reference = self.reference.through(index, self.source.block(index))
        self.activations = self.activations.through(index, params)

    def quantize(self, index: int, on_event: OnEvent = warn_of_notices) -> tuple[dict[str, Any], BlockReport]:
        """Quantizes block ``index``; returns its parameters, with linear weights packed, and a report."""
        start = time.monotonic()
        dense = dict(self.source.block(index))
        packed = [name for name, value in dense.items() if isinstance(value, MixedTensor)]
        if packed:
            raise ValueError(f"blocks.{index}.{packed[0]} is already quantized, expected a dense model")
        layers = _BlockLayers(self, index, dense)
        after, reference = layers.solve_all()
        tensors, learning = layers.tensors, None
        if self.config.method == "slim-plus":
            assert self.reference is not None
            reference = reference or self.reference.through(index, dense)
            if tensors:
                samples = self._samples(index, dense, reference)
                block = self.source.config.block(index)
                more = index, self.optimizer, self.placement, on_event
                tensors, learning = learn_block(block, self.config, dense, tensors, samples, *more)
        result = {**dense, **{f"{name}.weight": tensor for name, tensor in tensors.items()}}
        for name in self._skipped(index):
            result[name] = self.placement.channels(as_stored(name, dense[name]))
        self.activations = after if learning is None else self.activations.through(index, result)
        self.reference = reference
        report = BlockReport(
            index,
            self.source.config.num_layers,
            layers.reports,
            time.monotonic() - start,
            {f"blocks.{index}.{name}": tensor.bits().tolist() for name, tensor in tensors.items()},
            learning,
            layers.expert_tokens,
        )
        if report.warning:
            warnings.warn(report.warning, stacklevel=2)
        return result, report

    def quantize_embeddings(self) -> tuple[dict[str, Any], list[LayerReport]]:
        """Quantizes embedding and LM head, once all blocks are; see
        `slim_jax.calibrate.embeddings.quantize_embeddings`."""
        reference = self.reference if self.config.asymmetric else None
        return quantize_embeddings(
            self.source, self.config, self.activations, reference, self.stride, self.placement
        )

    def _skipped(self, index: int) -> list[str]:
        """Names of the block's weights that a rule leaves in full precision."""
        names = itertools.chain(*linear_groups(self.source.config.block(index)))
        return [f"{name}.weight" for name in names if self.config.of_layer(f"blocks.{index}.{name}") is None]

    def _samples(self, index: int, dense: Params, reference: Activations) -> Samples:
        """Samples that the block is trained on; ``reference`` are the reference activations after it."""

        def whole(stream: Activations) -> jax.Array:
            return jnp.concatenate(list(stream.batches))

        here = whole(self.activations.through(index, dense)) if self.config.augmented else None
        return Samples(whole(self.activations), whole(reference), here)


class _BlockLayers:
    """Linear layers of one block, while they are quantized.

    Attributes:
      tensors: packed weights of the layers solved so far, by the layer's name in the block.
      reports: their reports.
      expert_tokens: number of tokens that each expert saw.
    """

    def __init__(self, quantizer: BlockQuantizer, index: int, dense: Params) -> None:
        self.quantizer, self.index, self.dense = quantizer, index, dense
        self.tensors: dict[str, MixedTensor] = {}
        self.reports: list[LayerReport] = []
        self.expert_tokens: list[int] = []
        self.entry: Observation | None = None  # of all tokens: gate and up of all experts read one input

    def solve_all(self) -> tuple[Activations, Activations | None]:
        """Solves all layers; returns the activations after the quantized block, and those of the reference
        pass if layers compensate upstream errors.

        If the config is sequential, layers read the outputs of the quantized layers before them, otherwise
        those of the unquantized block.
        """
        before, config = self.quantizer.activations, self.quantizer.config
        reference = self.quantizer.reference if config.corrects else None
        if config.sequential:
            return before.alongside(
                reference, self.index, self.dense, lambda names, x: self.solve(names, self.observe(names, x))
            )
        seen: list[tuple[tuple[str, ...], Observation]] = []

        def observe_only(names: tuple[str, ...], inputs: Inputs) -> dict[str, Any]:
            seen.append((names, self.observe(names, inputs)))
            return {}

        _, after_reference = before.alongside(reference, self.index, self.dense, observe_only)
        weights: dict[str, Any] = {}
        for names, observation in seen:
            weights |= self.solve(names, observation)
        return before.through(self.index, {**self.dense, **weights}), after_reference

    def observe(self, names: tuple[str, ...], inputs: Inputs) -> Observation:
        """Observes the input of layers; an expert's observation is filled up from all tokens of the block."""
        stride, placement = self.quantizer.stride, self.quantizer.placement
        found = observe(inputs, stride, placement)
        if inputs.seen is None:
            return found
        down = names[0].endswith(".down")
        prior = None if down else self.entry
        prior = prior or observe(inputs._replace(seen=None), stride, placement)
        self.entry = self.entry or prior
        if not down:
            self.expert_tokens.append(found.tokens)
        return found.with_prior(prior)

    def solve(self, names: tuple[str, ...], observation: Observation) -> dict[str, MixedTensor]:
        """Quantizes layers that share an input; returns their new weights."""
        solved: dict[str, MixedTensor] = {}
        by_name = {f"blocks.{self.index}.{name}": name for name in names}
        for solver, some in self.quantizer.solvers.of(list(by_name)):
            weights = [self.dense[f"{by_name[full]}.weight"] for full in some]
            for tensor, report in solver.solve(some, weights, observation):
                name, rise = by_name[report.name], self.quantizer.rises.get(report.name)
                self.tensors[name] = solved[f"{name}.weight"] = tensor
                self.reports.append(dataclasses.replace(report, rise=rise))
        return solved
