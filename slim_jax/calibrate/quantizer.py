"""Quantizes one block after another: observes its layers' inputs, solves the layers, trains "slim-plus"."""

import dataclasses
import itertools
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels import MixedTensor
from slim_jax.calibrate.activations import Activations, Inputs, Passing, dense_weight, observe
from slim_jax.calibrate.embeddings import quantize_ends
from slim_jax.calibrate.learning import BlockLearner, OnEpoch
from slim_jax.calibrate.sensitivity import Guide, OnSweep, Sweep, without_choice
from slim_jax.config import Settings
from slim_jax.method.hessian import Observation
from slim_jax.method.layer import LayerSolvers
from slim_jax.method.learnable import Samples
from slim_jax.method.sba import Allocation
from slim_jax.model.block import linear_groups
from slim_jax.model.params import Params, as_stored
from slim_jax.placement import ONE_DEVICE, Placement
from slim_jax.report import BlockReport, LayerReport
from slim_jax.store.source import Source


class BlockQuantizer:
    """Quantizes blocks one after another while it carries the calibration activations along."""

    def __init__(
        self,
        source: Source,
        tokens: np.ndarray,
        config: Settings,
        bits: Allocation | None,
        optimizer: optax.GradientTransformation | None = None,
        offload: Path | None = None,
        placement: Placement = ONE_DEVICE,
        on_sweep: OnSweep | None = None,
        sweep_file: Path | None = None,
    ) -> None:
        self.source, self.config, self.placement = source, config, placement
        self.guide: Guide | None = None
        given = bits is not None
        if bits is None:
            bits = without_choice(source.config, config)
        prices = bits is None
        if config.guide or prices:
            if sweep_file is not None and sweep_file.exists():  # left by the interrupted run
                self.guide = Guide.load(sweep_file)
            else:
                self.guide = Sweep(source, tokens, config, offload, placement, prices=prices).run(on_sweep)
                if sweep_file is not None:
                    self.guide.save(sweep_file)
            bits = bits or self.guide.allocation
        self.solvers = LayerSolvers(config, bits, given=given, placement=placement)
        self.activations = Activations.of(source, tokens, offload, placement)
        self.stride = max(1, tokens.size // config.search_tokens)
        self.learner: BlockLearner | None = None
        self.reference: Activations | None = None  # of the reference (full-precision) pass
        if config.corrects or config.method == "slim-plus":
            self.reference = self.activations
        if config.method == "slim-plus":
            self.learner = BlockLearner(source.config, config, len(tokens), optimizer, placement)

    def skip(self, index: int, params: Params) -> None:
        """Passes the activations through a block that an earlier run has quantized."""
        if self.reference is not None:
            self.reference = self.reference.behind(index, self.source.block(index))
        self.activations = self.activations.behind(index, params)

    def quantize(self, index: int, on_epoch: OnEpoch | None = None) -> tuple[dict[str, Any], BlockReport]:
        """Quantizes block ``index``; returns its parameters, with linear weights packed, and a report."""
        start = time.monotonic()
        dense = dict(self.source.block(index))
        packed = [name for name, value in dense.items() if isinstance(value, MixedTensor)]
        if packed:
            raise ValueError(f"blocks.{index}.{packed[0]} is already quantized, expected a dense model")
        solved = self._solve_block(index, dense)
        tensors, reference, learning = solved.tensors, solved.reference, None
        if self.learner is not None:
            reference = reference or self._behind(index, dense)
            samples = self._samples(index, dense, reference)
            if tensors:
                tensors, learning = self.learner.improve(index, dense, tensors, samples, on_epoch)
            if learning is not None and self.config.learn == "clip-gptq":
                again = self._solve_block(index, dense, tensors).tensors
                tensors, learning = self.learner.better(index, dense, tensors, again, samples, learning)
        result = {**dense, **{f"{name}.weight": tensor for name, tensor in tensors.items()}}
        for name in self._skipped(index):
            result[name] = self.placement.channels(as_stored(name, dense[name]))
        self.activations = solved.after if self.learner is None else self.activations.behind(index, result)
        self.reference = reference
        allocation = {f"blocks.{index}.{name}": tensor.bits().tolist() for name, tensor in tensors.items()}
        seconds = time.monotonic() - start
        total = self.source.config.num_layers
        report = BlockReport(index, total, solved.layers, seconds, allocation, learning, solved.expert_tokens)
        if report.warning:
            warnings.warn(report.warning, stacklevel=2)
        return result, report

    def ends(self) -> tuple[dict[str, Any], list[LayerReport]]:
        """Quantizes embedding and LM head, once all blocks are quantized; see `quantize_ends`."""
        beside = self.reference if self.config.asymmetric else None
        return quantize_ends(self.source, self.config, self.activations, beside, self.stride, self.placement)

    def _solve_block(
        self, index: int, dense: Params, given: Mapping[str, MixedTensor] | None = None
    ) -> "_Solved":
        """Quantizes every layer of a block.

        If ``given``, the bits and grids of these packed layers are reused, and only codes are solved for.
        """
        current = dict(dense)
        passing, beside = self.activations.through(index, current), None
        if self.config.corrects and self.reference is not None:
            beside = self.reference.through(index, dense)
        tensors: dict[str, MixedTensor] = {}
        layers: list[LayerReport] = []
        expert_tokens: list[int] = []
        for names, observation in self._observations(passing, beside):
            if names[0].startswith("moe.experts.") and not names[0].endswith(".down"):
                expert_tokens.append(observation.tokens)
            by_name = {f"blocks.{index}.{name}": name for name in names}
            for solver, some in self.solvers.of(list(by_name)):
                own = [by_name[full] for full in some]
                like = [given[name] for name in own] if given else None
                weights = [dense[f"{name}.weight"] for name in own]
                for name, (tensor, report) in zip(own, solver.solve(some, weights, observation, like)):
                    tensors[name], current[f"{name}.weight"] = tensor, dense_weight(tensor)
                    rise = None if self.guide is None else self.guide.rises.get(report.name)
                    layers.append(dataclasses.replace(report, rise=rise))
        after = passing.after if self.config.sequential else self.activations.behind(index, current)
        return _Solved(tensors, layers, expert_tokens, after, None if beside is None else beside.after)

    def _skipped(self, index: int) -> list[str]:
        """Names of the block's weights that a rule leaves in full precision."""
        names = itertools.chain(*linear_groups(self.source.config.block(index)))
        return [f"{name}.weight" for name in names if self.config.of_layer(f"blocks.{index}.{name}") is None]

    def _behind(self, index: int, dense: Params) -> Activations:
        assert self.reference is not None
        return self.reference.behind(index, dense)

    def _samples(self, index: int, dense: Params, reference: Activations) -> Samples:
        """Samples that the block is trained on; ``reference`` are the reference activations after it."""

        def whole(stream: Activations) -> jax.Array:
            return jnp.concatenate(list(stream.batches))

        here = whole(self.activations.behind(index, dense)) if self.config.augmented else None
        return Samples(whole(self.activations), whole(reference), here)

    def _observations(
        self, passing: Passing, beside: Passing | None
    ) -> Iterator[tuple[tuple[str, ...], Observation]]:
        """Yields the names of layers that share an input, with the observation of that input.

        The caller puts quantized weights into the passage's parameters. If the config is sequential, later
        layers read the outputs of these, otherwise those of the unquantized block. ``beside`` is the
        reference (full-precision) pass.
        """
        seen = self._observed(passing, beside)
        yield from seen if self.config.sequential else list(seen)

    def _observed(
        self, passing: Passing, beside: Passing | None
    ) -> Iterator[tuple[tuple[str, ...], Observation]]:
        """Yields the observation at each stage; an expert's is filled up from all tokens of the block."""
        entry: Observation | None = None  # of all tokens: gate and up of all experts read one input
        for names, inputs in passing if beside is None else _in_step(passing, beside):
            if self.guide is not None and self.config.guide:
                inputs = inputs._replace(weights=self.guide.of(passing.index, names))
            found = observe(inputs, self.stride, self.placement)
            if inputs.seen is not None:
                prior = None if names[0].endswith(".down") else entry
                prior = prior or observe(inputs._replace(seen=None), self.stride, self.placement)
                entry = entry or prior
                found = found.with_prior(prior)
            yield names, found


class _Solved(NamedTuple):
    """Block whose layers have been solved.

    Attributes:
      tensors: packed weights, by the layer's name in the block.
      layers: reports of the layers.
      expert_tokens: number of tokens that each expert saw.
      after: the activations after the block.
      reference: the reference activations after the block, if the reference pass ran alongside.
    """

    tensors: dict[str, MixedTensor]
    layers: list[LayerReport]
    expert_tokens: list[int]
    after: Activations
    reference: Activations | None


def _in_step(passing: Passing, beside: Passing) -> Iterator[tuple[tuple[str, ...], Inputs]]:
    """Runs two passages through a block alongside each other; yields the inputs of ``passing``, each with the
    input of ``beside`` as its reference.

    Inputs of experts get none: routers that read different inputs send tokens to different experts.
    """
    for (names, inputs), (_, other) in zip(passing, beside, strict=True):
        yield names, inputs if inputs.seen is not None else inputs._replace(reference=other)
