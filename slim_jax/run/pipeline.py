"""Quantizing a model block by block.

The calibration tokens run through the model once. Beside their activations only one block's weights
are in memory: the source is read, and the result handed on, block by block. All blocks have the same
shapes, so each jitted step here compiles once per model.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from pallas_kernels import MixedTensor
from slim_jax.config import SlimConfig
from slim_jax.devices import ONE_DEVICE, Placement
from slim_jax.method.hessian import Observation
from slim_jax.method.layer import LayerSolvers
from slim_jax.method.plus import Samples
from slim_jax.method.sba import Allocation
from slim_jax.method.tune import apply
from slim_jax.model.block import linear_groups, linear_names
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import Params, as_computed, make_decoder
from slim_jax.report import BlockReport, LayerReport, Report
from slim_jax.rules import check_rules
from slim_jax.run.activations import Activations, Passing, dense_weight, observe
from slim_jax.run.checkpoint import CheckpointWriter
from slim_jax.run.ends import quantize_ends, sizes
from slim_jax.run.learning import BlockLearner, OnEpoch
from slim_jax.run.source import DecoderSource, Source
from slim_jax.run.sweep import Guide, OnSweep, Sweep
from slim_jax.run.tuning import OnStep, tune

OnBlock = Callable[[BlockReport], None]


class BlockQuantizer:
    """Quantizes blocks one after another while it carries the calibration activations along."""

    def __init__(
        self,
        source: Source,
        tokens: np.ndarray,
        config: SlimConfig,
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
        if config.guide or (config.over_model and bits is None):
            if sweep_file is not None and sweep_file.exists():  # of the run that is resumed
                self.guide = Guide.load(sweep_file)
            else:
                self.guide = Sweep(source, tokens, config, offload, placement).run(on_sweep)
                if sweep_file is not None:
                    self.guide.save(sweep_file)
            bits = bits or self.guide.allocation
        self.solvers = LayerSolvers(config, bits, given=given, placement=placement)
        self.activations = Activations.of(source, tokens, offload, placement)
        self.stride = max(1, tokens.size // config.search_tokens)
        self.learner: BlockLearner | None = None
        self.reference: Activations | None = None  # behind full-precision blocks
        if config.method == "slim-plus":
            self.reference = Activations.of(source, tokens, offload, placement)
            self.learner = BlockLearner(source.config, config, len(tokens), optimizer, placement)

    def skip(self, index: int, params: Params) -> None:
        """Carries the activations over a block that an earlier run has quantized."""
        if self.reference is not None:
            self.reference = self.reference.behind(index, self.source.block(index))
        self.activations = self.activations.behind(index, params)

    def quantize(self, index: int, on_epoch: OnEpoch | None = None) -> tuple[dict[str, Any], BlockReport]:
        """Quantizes block ``index``: its parameters, linear weights packed, and what was done."""
        start = time.monotonic()
        dense = dict(self.source.block(index))
        packed = [name for name, value in dense.items() if isinstance(value, MixedTensor)]
        if packed:
            raise ValueError(f"blocks.{index}.{packed[0]} is already quantized, expected a dense model")
        tensors, layers, expert_tokens, after = self._solve_block(index, dense)
        learning = None
        if self.learner is not None:
            samples = self._samples(index, dense)
            if tensors:
                tensors, learning = self.learner.improve(index, dense, tensors, samples, on_epoch)
            if learning is not None and self.config.learn == "clip-gptq":
                again, *_ = self._solve_block(index, dense, tensors)
                tensors, learning = self.learner.better(index, dense, tensors, again, samples, learning)
        result = {**dense, **{f"{name}.weight": tensor for name, tensor in tensors.items()}}
        for name in self._skipped(index):
            result[name] = self.placement.channels(as_computed(name, dense[name]))
        self.activations = after if self.learner is None else self.activations.behind(index, result)
        allocation = {f"blocks.{index}.{name}": tensor.bits().tolist() for name, tensor in tensors.items()}
        seconds = time.monotonic() - start
        total = self.source.config.num_layers
        report = BlockReport(index, total, layers, seconds, allocation, learning, expert_tokens)
        if report.warning:
            warnings.warn(report.warning, stacklevel=2)
        return result, report

    def ends(self) -> tuple[dict[str, Any], list[LayerReport]]:
        """What stands outside the blocks, once all of these are quantized; see `quantize_ends`."""
        return quantize_ends(self.source, self.config, self.activations, self.stride, self.placement)

    def _solve_block(
        self, index: int, dense: Params, given: Mapping[str, MixedTensor] | None = None
    ) -> tuple[dict[str, MixedTensor], list[LayerReport], list[int], Activations]:
        """Quantizes every layer of a block, by name in the block.

        ``given`` are layers whose bits and grids serve again; only codes are found anew. Also returns the
        number of tokens that each expert saw, and the activations behind the block.
        """
        current = dict(dense)
        tensors: dict[str, MixedTensor] = {}
        layers: list[LayerReport] = []
        expert_tokens: list[int] = []
        passing = self.activations.through(index, current)
        for names, observation in self._observations(passing):
            if names[0].startswith("moe.experts.") and not names[0].endswith(".down"):
                expert_tokens.append(observation.tokens)
            by_name = {f"blocks.{index}.{name}": name for name in names}
            for solver, some in self.solvers.of(list(by_name)):
                own = [by_name[full] for full in some]
                like = [given[name] for name in own] if given else None
                solved = solver.solve(some, [dense[f"{name}.weight"] for name in own], observation, like)
                for name, (tensor, report) in zip(own, solved):
                    tensors[name], current[f"{name}.weight"] = tensor, dense_weight(tensor)
                    rise = None if self.guide is None else self.guide.rises.get(report.name)
                    layers.append(dataclasses.replace(report, rise=rise))
        after = passing.after if self.config.sequential else self.activations.behind(index, current)
        return tensors, layers, expert_tokens, after

    def _skipped(self, index: int) -> list[str]:
        """The weights of a block that a rule leaves in full precision."""
        names = itertools.chain(*linear_groups(self.source.config.block(index)))
        return [f"{name}.weight" for name in names if self.config.of_layer(f"blocks.{index}.{name}") is None]

    def _samples(self, index: int, dense: Params) -> Samples:
        """What the block at hand learns from; passes the full-precision activations on."""
        assert self.reference is not None
        self.reference = self.reference.behind(index, dense)
        streams = (self.activations, self.reference, self.activations.behind(index, dense))
        return Samples(*(jnp.concatenate(list(stream.batches)) for stream in streams))

    def _observations(self, passing: Passing) -> Iterator[tuple[tuple[str, ...], Observation]]:
        """Yields each group of layers with what was seen of its inputs.

        The caller puts quantized weights into the passage's parameters; later layers see what these give,
        if the config is sequential, else what the unquantized block gives.
        """
        seen = self._observed(passing)
        yield from seen if self.config.sequential else list(seen)

    def _observed(self, passing: Passing) -> Iterator[tuple[tuple[str, ...], Observation]]:
        """What is seen at each stage; at an expert's, filled up from all tokens of the block."""
        entry: Observation | None = None  # of all tokens: gate and up of all experts read one input
        for names, inputs in passing:
            if self.guide is not None and self.config.guide:
                inputs = inputs._replace(weights=self.guide.of(passing.index, names))
            found = observe(inputs, self.stride, self.placement)
            if inputs.seen is not None:
                prior = None if names[0].endswith(".down") else entry
                prior = prior or observe(inputs._replace(seen=None), self.stride, self.placement)
                entry = entry or prior
                found = found.with_prior(prior)
            yield names, found


def _check(source: Source, tokens: np.ndarray, config: SlimConfig, devices: int) -> np.ndarray:
    check_rules(config.rules, linear_names(source.config))
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"calibration tokens are {tokens.dtype}{list(tokens.shape)}, expected int[samples, length]"
        )
    if tokens.min() < 0 or tokens.max() >= source.config.vocab_size:
        raise ValueError(
            f"calibration tokens range from {tokens.min()} to {tokens.max()}, "
            f"expected 0 to {source.config.vocab_size - 1}"
        )
    if tokens.shape[1] > source.config.max_positions:
        raise ValueError(
            f"samples are {tokens.shape[1]} tokens long, expected at most {source.config.max_positions}"
        )
    if tokens.shape[0] % devices:
        raise ValueError(f"there are {tokens.shape[0]} samples, expected a multiple of the {devices} devices")
    return tokens


def quantize(
    model: Decoder | Source,
    tokens: np.ndarray,
    config: SlimConfig,
    *,
    allocation: Allocation | None = None,
    optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    on_block: OnBlock | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    on_sweep: OnSweep | None = None,
) -> tuple[Decoder, Report]:
    """Quantizes the linear layers of a model's blocks, then embedding and head; norms stay as they are.

    Args:
      model: a decoder in memory, or a source that is read block by block.
      tokens: calibration text, ``int[samples, length]``.
      config: how to quantize.
      allocation: bit widths of every group, instead of a search.
      optimizer: of "slim-plus", instead of `slim_jax.run.learning.default_optimizer`.
      mesh: devices that share the work, of one process or several (then every process makes this call);
        all axes count alike. Their number must divide that of the samples.
      on_block: called with every finished block.
      on_epoch: of "slim-plus": called after every epoch with its number, the number of all, and the loss.
      on_sweep: called after every block of the gradient sweep with how many are done, and of how many.
      on_step: of tuning: called after every step with its number, the number of all, and the loss.

    Returns:
      The decoder on packed weights, and a report.

    Raises:
      ValueError: the tokens, the allocation or the rules do not fit the model.
    """
    source = DecoderSource(model) if isinstance(model, Decoder) else model
    placement = Placement(mesh)
    tokens = _check(source, tokens, config, placement.devices)
    quantizer = BlockQuantizer(source, tokens, config, allocation, optimizer, None, placement, on_sweep)
    blocks, reports = [], []
    for index in range(source.config.num_layers):
        params, report = quantizer.quantize(index, on_epoch)
        blocks.append(params)
        reports.append(report)
        if on_block is not None:
            on_block(report)
    outer, ends = quantizer.ends()
    tuning = None
    if config.tune:
        learned, tuning = tune(
            source, tokens, config, outer, blocks, placement, quantizer.reference, on_step=on_step
        )
        offset = source.config.norm_offset
        outer = apply(outer, learned.outer, offset)
        blocks = [apply(block, learned.of(i), offset) for i, block in enumerate(blocks)]
    whole = Report(reports, ends, *sizes(source.config, outer, blocks), tuning)
    return make_decoder(source.config, outer, blocks, placement.mesh), whole


def quantize_to_checkpoint(
    source: Source,
    tokens: np.ndarray,
    config: SlimConfig,
    path: Path,
    *,
    allocation: Allocation | None = None,
    resume: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    offload: bool = False,
    mesh: Mesh | None = None,
    on_block: OnBlock | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    on_sweep: OnSweep | None = None,
) -> Report:
    """:func:`quantize` for models larger than memory: every finished block is on disk before the next starts.

    Args:
      path: the checkpoint's folder; must not exist or be empty, unless ``resume``.
      resume: continue an interrupted run with the same model, tokens and settings; the result is the
        same, bit for bit.
      offload: keep the calibration activations in files beside the checkpoint, not in memory ("slim-plus"
        still has those of one block in memory).

    Raises:
      ValueError: as :func:`quantize`; or ``path`` holds something else, or a run with other settings.
    """
    placement = Placement(mesh)
    tokens = _check(source, tokens, config, placement.devices)
    settings = {**config.to_json(), "calibration": _fingerprint(tokens, allocation)}
    writer = CheckpointWriter(
        path,
        source.config,
        source.origin,
        settings,
        resume=resume,
        drafts=bool(config.tune),
        placement=placement,
    )
    if writer.complete:
        return writer.report()
    with _scratch(path / f"activations.{jax.process_index()}" if offload else None) as folder:
        reference = None
        if not writer.all_written:
            swept = path / "drafts/sweep.npz"
            quantizer = BlockQuantizer(
                source, tokens, config, allocation, optimizer, folder, placement, on_sweep, swept
            )
            _write_all(quantizer, writer, on_block, on_epoch)
            reference = quantizer.reference
            del quantizer
        if config.tune:
            outer, blocks = writer.read_outer(), list(map(writer.read_block, range(source.config.num_layers)))
            file = path / "drafts/tuning.npz"
            learned, tuning = tune(
                source, tokens, config, outer, blocks, placement, reference, folder, file, on_step
            )
            offset = source.config.norm_offset
            tuned = apply(outer, learned.outer, offset)
            writer.write_tuned(tuned, lambda i: apply(blocks[i], learned.of(i), offset), tuning)
    writer.finish()
    return writer.report()


def _write_all(
    quantizer: BlockQuantizer, writer: CheckpointWriter, on_block: OnBlock | None, on_epoch: OnEpoch | None
) -> None:
    """Writes all that an earlier run has not written."""
    for index in range(quantizer.source.config.num_layers):
        if index < len(writer.blocks):
            report = BlockReport.from_json(writer.blocks[index]["report"])
            quantizer.skip(index, writer.read_block(index))
        else:
            params, report = quantizer.quantize(index, on_epoch)
            writer.write_block(params, report)
        if on_block is not None:
            on_block(report)
    writer.write_outer(*quantizer.ends())


@contextlib.contextmanager
def _scratch(folder: Path | None) -> Iterator[Path | None]:
    """A folder that is empty at first, and gone in the end."""
    if folder is None:
        yield None
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fingerprint(tokens: np.ndarray, allocation: Mapping[str, list[int]] | None) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes())
    digest.update(json.dumps(allocation, sort_keys=True).encode())
    return {"samples": int(tokens.shape[0]), "length": int(tokens.shape[1]), "sha256": digest.hexdigest()}
