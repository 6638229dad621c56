"""Quantizing a model block by block.

The calibration tokens run through the model once. Beside their activations only one block's weights
are in memory: the source is read, and the result handed on, block by block. All blocks have the same
shapes, so each jitted step here compiles once per model.
"""

import copy
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels import MixedTensor, pack
from pallas_kernels.layout import zero_bits
from slim_jax.activations import COMPUTE_DTYPE, Activations, Observation, observe
from slim_jax.allocation import Allocation, allocate, output_divergence, scores
from slim_jax.calibration import Grid, stored_grids
from slim_jax.checkpoint import CheckpointWriter
from slim_jax.config import SlimConfig
from slim_jax.decoder import Decoder, Params, make_decoder
from slim_jax.gptq import Solution, solve
from slim_jax.hessian import Statistics, statistics
from slim_jax.learning import BlockLearner, OnEpoch
from slim_jax.plus import Samples
from slim_jax.report import BlockReport, LayerReport, Report
from slim_jax.source import DecoderSource, Source

OnBlock = Callable[[BlockReport], None]

DAMPING_TRIES = 4
"""How often damping is raised tenfold before a Hessian is given up."""


@jax.jit
def _power(w: jax.Array, h: jax.Array) -> jax.Array:
    """``diag(W^T H W)``, twice the mean squared output of every channel, ``[N]``."""
    return jnp.sum(w * (h @ w), axis=0)


def _dense(value: Any) -> Any:
    return value.dequantize(COMPUTE_DTYPE) if isinstance(value, MixedTensor) else value


def _pass(activations: Activations, params: Params) -> None:
    """Carries activations over a block, dense or packed."""
    for _ in activations.stages({name: _dense(value) for name, value in params.items()}):
        pass


class BlockQuantizer:
    """Quantizes blocks one after another while it carries the calibration activations along."""

    def __init__(
        self,
        source: Source,
        tokens: np.ndarray,
        config: SlimConfig,
        bits: Allocation | None,
        optimizer: optax.GradientTransformation | None = None,
    ) -> None:
        self.source, self.config, self.bits = source, config, bits
        self.zero_bits = zero_bits(_widths(config, bits))
        self.activations = Activations(source, tokens)
        self.stride = max(1, tokens.size // config.search_tokens)
        self.learner: BlockLearner | None = None
        if config.method == "slim-plus":
            self.reference = Activations(source, tokens)  # behind full-precision blocks
            self.learner = BlockLearner(source.config, config, self.zero_bits, len(tokens), optimizer)

    def skip(self, index: int, params: Params) -> None:
        """Carries the activations over a block that an earlier run has quantized."""
        if self.learner is not None:
            _pass(self.reference, self.source.block(index))
        _pass(self.activations, params)

    def quantize(self, index: int, on_epoch: OnEpoch | None = None) -> tuple[dict[str, Any], BlockReport]:
        """Quantizes block ``index``: its parameters, linear weights packed, and what was done."""
        start = time.monotonic()
        dense = dict(self.source.block(index))
        packed = [name for name, value in dense.items() if isinstance(value, MixedTensor)]
        if packed:
            raise ValueError(f"blocks.{index}.{packed[0]} is already quantized, expected a dense model")
        before = self.activations.batches
        tensors, layers, expert_tokens = self._solve_block(f"blocks.{index}.", dense)
        learning = None
        if self.learner is not None:
            samples = self._samples(dense, before)
            tensors, learning = self.learner.improve(index, dense, tensors, samples, on_epoch)
            if self.config.learn == "clip-gptq":
                self.activations.batches = before
                again, *_ = self._solve_block(f"blocks.{index}.", dense, tensors)
                tensors, learning = self.learner.better(dense, tensors, again, samples, learning)
        result = {**dense, **{f"{name}.weight": tensor for name, tensor in tensors.items()}}
        if self.learner is not None:
            self.activations.batches = before
            _pass(self.activations, result)
        allocation = {f"blocks.{index}.{name}": tensor.bits().tolist() for name, tensor in tensors.items()}
        seconds = time.monotonic() - start
        total = self.source.config.num_layers
        report = BlockReport(index, total, layers, seconds, allocation, learning, expert_tokens)
        if report.warning:
            warnings.warn(report.warning, stacklevel=2)
        return result, report

    def _solve_block(
        self, prefix: str, dense: Params, given: Mapping[str, MixedTensor] | None = None
    ) -> tuple[dict[str, MixedTensor], list[LayerReport], list[int]]:
        """Quantizes every layer of a block, by name in the block, and passes the activations on.

        ``given`` are layers whose bits and grids serve again; only codes are found anew. Also returns the
        number of tokens that each expert saw.
        """
        current = dict(dense)
        tensors: dict[str, MixedTensor] = {}
        layers: list[LayerReport] = []
        expert_tokens: list[int] = []
        for names, observation in self._observations(current):
            if names[0].startswith("moe.experts.") and not names[0].endswith(".down"):
                expert_tokens.append(observation.tokens)
            observation = observation.or_weights_only()
            weights = [jnp.asarray(dense[f"{name}.weight"], jnp.float32) for name in names]
            like = [given[name] for name in names] if given else None
            solved = self._solve([prefix + name for name in names], weights, observation, like)
            for name, (tensor, report) in zip(names, solved):
                tensors[name], current[f"{name}.weight"] = tensor, _dense(tensor)
                layers.append(report)
        return tensors, layers, expert_tokens

    def _samples(self, dense: Params, before: list[jax.Array]) -> Samples:
        """What the block at hand learns from; passes the full-precision activations on."""
        here = copy.copy(self.activations)
        here.batches = before
        _pass(here, dense)
        _pass(self.reference, dense)
        x, y, y_here = (jnp.concatenate(b) for b in (before, self.reference.batches, here.batches))
        return Samples(x, y, y_here)

    def _observations(self, params: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Observation]]:
        """Yields each group of layers with what was seen of its inputs, and passes the block.

        The caller puts quantized weights into ``params``; later layers see what these give, if the
        config is sequential, else what the unquantized block gave.
        """
        if self.config.sequential:
            for names, x in self.activations.stages(params):
                yield names, observe(x, self.stride)
            return
        before = self.activations.batches
        seen = [(names, observe(x, self.stride)) for names, x in self.activations.stages(params)]
        self.activations.batches = before
        yield from seen
        _pass(self.activations, params)

    def _statistics(self, observation: Observation, names: list[str]) -> Statistics:
        damping = self.config.damping
        for _ in range(DAMPING_TRIES):
            found = statistics(
                observation.gram,
                jnp.float32(observation.tokens),
                jnp.float32(damping),
                group_size=self.config.group_size,
            )
            if bool(jnp.all(jnp.isfinite(found.u))):
                return found
            damping *= 10
        raise ValueError(
            f"the Hessian of {', '.join(names)} is not positive definite, damped by {damping / 10:g}: "
            "are the calibration activations finite?"
        )

    def _solve(
        self,
        names: list[str],
        weights: list[jax.Array],
        observation: Observation,
        like: list[MixedTensor] | None,
    ) -> Iterator[tuple[MixedTensor, LayerReport]]:
        """Quantizes the layers that share the input with this Gram matrix, in one stacked solve."""
        config, k = self.config, weights[0].shape[0]
        found = self._statistics(observation, names)
        padding = ((0, found.alive.shape[0] - k), (0, 0))
        padded = [jnp.pad(w, padding) * found.alive[:, None] for w in weights]
        x = jnp.pad(observation.sample, ((0, 0), (0, padding[0][1])))
        if like is None:
            chosen = [self._allocate(name, w, x, found) for name, w in zip(names, padded)]
            grids = None
        else:
            chosen = [(tensor.bits(), None) for tensor in like]
            all_grids = [stored_grids(tensor) for tensor in like]
            grids = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *all_grids)
        solutions = self._solutions(padded, found, [bits for bits, _ in chosen], grids)
        if config.criterion != "paper" and any(mixed for _, mixed in chosen):
            uniform = [np.full_like(bits, config.bits) for bits, _ in chosen]
            plain = self._solutions(padded, found, uniform)
            for i, (w, (_, mixed)) in enumerate(zip(padded, chosen)):
                if mixed and not _pays(w, x, solutions[i], plain[i]):
                    solutions[i], chosen[i] = plain[i], (uniform[i], 0)
        for name, w, (bits, mixed), solution in zip(names, padded, chosen, solutions):
            tensor = self._pack(solution, bits, k)
            error = float(jnp.sum(solution.error) / jnp.maximum(jnp.sum(_power(w, found.h)), 1e-30))
            yield tensor, LayerReport.of(name, tensor, error, mixed)

    def _solutions(
        self, weights: list[jax.Array], found: Statistics, bits: list[np.ndarray], grids: Grid | None = None
    ) -> list[Solution]:
        """Every layer's solution for its bits, from one stacked solve; ``grids`` instead of fits."""
        config = self.config
        widths = [
            jnp.broadcast_to(b[:, None].astype(np.float32), (len(b), w.shape[1]))
            for b, w in zip(bits, weights)
        ]
        solution = solve(
            jnp.concatenate(weights, axis=1),
            found.u,
            found.importance,
            jnp.concatenate(widths, axis=1),
            group_size=config.group_size,
            zero_bits=self.zero_bits,
            sqc=config.sqc or "search",
            feedback=config.method != "rtn",
            grids=grids,
        )
        ends = np.cumsum([w.shape[1] for w in weights]).tolist()
        return [solution.part(slice(end - w.shape[1], end)) for w, end in zip(weights, ends)]

    def _allocate(
        self, name: str, w: jax.Array, x: jax.Array, found: Statistics
    ) -> tuple[np.ndarray, int | None]:
        """Bit width of each group of a layer, and the ``p`` of the search if there was one."""
        config = self.config
        groups = w.shape[0] // config.group_size
        if self.bits is not None:
            given = self.bits.get(name)
            if given is None or len(given) != groups:
                has = "nothing" if given is None else f"{len(given)} groups"
                raise ValueError(f"the allocation has {has} for {name}, expected {groups} groups")
            return np.asarray(given), None
        if not config.mixed:
            return np.full(groups, config.bits), None
        score, order = scores(
            w,
            x,
            found.importance,
            bits=config.bits,
            group_size=config.group_size,
            zero_bits=self.zero_bits,
            sqc="minmax" if config.criterion == "paper" else config.sqc or "search",
            criterion=config.criterion or "kl",
        )
        candidates = np.asarray(score)
        first = 0
        if config.criterion == "paper" and groups > 3:  # the authors always mix, and stop one p earlier
            first, candidates = 1, candidates[: groups // 2]
        p = first + int(np.argmin(candidates[first:]))
        return allocate(np.asarray(order), p, config.bits), p

    def _pack(self, solution: Solution, bits: np.ndarray, k: int) -> MixedTensor:
        zero_unit = np.exp2(bits - self.zero_bits)[:, None]
        return pack(
            np.asarray(solution.code[:k]),
            np.asarray(solution.scale),
            np.rint(np.asarray(solution.zero) / zero_unit).astype(np.uint8),
            bits,
            group_size=self.config.group_size,
            widths=_widths(self.config, self.bits),
        )


def _pays(w: jax.Array, x: jax.Array, mixed: Solution, uniform: Solution) -> bool:
    """Whether mixed widths diverge less than uniform ones also as solved.

    The search scores what is rounded to nearest. Feeding errors forward gains most where all groups
    are alike, so some of the mixes that win there lose here.
    """
    return bool(output_divergence(w, _weight(mixed), x) < output_divergence(w, _weight(uniform), x))


_weight = jax.jit(Solution.weight)


def _widths(config: SlimConfig, bits: Allocation | None) -> tuple[int, ...]:
    if bits is None:
        return config.widths
    return tuple(sorted({b for layer in bits.values() for b in layer}))


def _check(source: Source, tokens: np.ndarray) -> np.ndarray:
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
    return tokens


def quantize(
    model: Decoder | Source,
    tokens: np.ndarray,
    config: SlimConfig,
    *,
    allocation: Allocation | None = None,
    optimizer: optax.GradientTransformation | None = None,
    on_block: OnBlock | None = None,
    on_epoch: OnEpoch | None = None,
) -> tuple[Decoder, Report]:
    """Quantizes the linear layers of a model's blocks; embeddings, norms and head stay as they are.

    Args:
      model: a decoder in memory, or a source that is read block by block.
      tokens: calibration text, ``int[samples, length]``.
      config: how to quantize.
      allocation: bit widths of every group, instead of a search.
      optimizer: of "slim-plus", instead of `slim_jax.learning.default_optimizer`.
      on_block: called with every finished block.
      on_epoch: of "slim-plus": called after every epoch with its number, the number of all, and the loss.

    Returns:
      The decoder on packed weights, and a report.

    Raises:
      ValueError: the tokens or the allocation do not fit the model.
    """
    source = DecoderSource(model) if isinstance(model, Decoder) else model
    quantizer = BlockQuantizer(source, _check(source, tokens), config, allocation, optimizer)
    blocks, reports = [], []
    for index in range(source.config.num_layers):
        params, report = quantizer.quantize(index, on_epoch)
        blocks.append(params)
        reports.append(report)
        if on_block is not None:
            on_block(report)
    return make_decoder(source.config, source.outer(), blocks), Report(reports)


def quantize_to_checkpoint(
    source: Source,
    tokens: np.ndarray,
    config: SlimConfig,
    path: Path,
    *,
    allocation: Allocation | None = None,
    resume: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    on_block: OnBlock | None = None,
    on_epoch: OnEpoch | None = None,
) -> Report:
    """:func:`quantize` for models larger than memory: every finished block is on disk before the next starts.

    Args:
      path: the checkpoint's folder; must not exist or be empty, unless ``resume``.
      resume: continue an interrupted run with the same model, tokens and settings; the result is the
        same, bit for bit.

    Raises:
      ValueError: as :func:`quantize`; or ``path`` holds something else, or a run with other settings.
    """
    tokens = _check(source, tokens)
    settings = {**config.to_json(), "calibration": _fingerprint(tokens, allocation)}
    writer = CheckpointWriter(path, source.config, source.origin, settings, resume=resume)
    if writer.complete:
        return Report([BlockReport.from_json(entry["report"]) for entry in writer.blocks])
    if not writer.blocks:
        writer.write_outer(source.outer())
    quantizer = BlockQuantizer(source, tokens, config, allocation, optimizer)
    reports = []
    for index in range(source.config.num_layers):
        if index < len(writer.blocks):
            report = BlockReport.from_json(writer.blocks[index]["report"])
            quantizer.skip(index, writer.read_block(index))
        else:
            params, report = quantizer.quantize(index, on_epoch)
            writer.write_block(params, report)
        reports.append(report)
        if on_block is not None:
            on_block(report)
    finished = Report(reports)
    writer.finish()
    return finished


def _fingerprint(tokens: np.ndarray, allocation: Mapping[str, list[int]] | None) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes())
    digest.update(json.dumps(allocation, sort_keys=True).encode())
    return {"samples": int(tokens.shape[0]), "length": int(tokens.shape[1]), "sha256": digest.hexdigest()}
