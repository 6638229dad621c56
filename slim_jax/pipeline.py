"""Quantizing a model block by block.

The calibration tokens run through the model once. Beside their activations only one block's weights
are in memory: the source is read, and the result handed on, block by block. All blocks have the same
shapes, so each jitted step here compiles once per model.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import MixedTensor, pack
from pallas_kernels.layout import group_count, zero_bits
from slim_jax.allocation import Allocation, allocate, scores
from slim_jax.checkpoint import CheckpointWriter
from slim_jax.config import SlimConfig
from slim_jax.decoder import Block, Decoder, Params, linear_groups, make_block, make_decoder
from slim_jax.gptq import Solution, solve
from slim_jax.hessian import dampen, gram, inverse_cholesky
from slim_jax.report import BlockReport, LayerReport, Report
from slim_jax.source import DecoderSource, Source

OnBlock = Callable[[BlockReport], None]

BATCH_TOKENS = 4096
"""Calibration tokens that pass through a block at once."""

DAMPING_TRIES = 4
"""How often damping is raised tenfold before a Hessian is given up."""


class Statistics(NamedTuple):
    """What the solver needs to know of a layer's inputs, ``K`` padded to whole groups.

    Attributes:
      u: ``[K, K]``, upper Cholesky factor of the inverse Hessian.
      importance: ``[K]``, ``1 / u_j^2``, 0 for padding.
      alive: ``[K]``, 0 for inputs that are always zero.
      h: ``[K, K]``, the damped Hessian.
    """

    u: jax.Array
    importance: jax.Array
    alive: jax.Array
    h: jax.Array


def _positions(h: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(h.shape[1], dtype=jnp.int32)[None], h.shape[:2])


Observation = tuple[jax.Array, jax.Array]
"""Gram matrix ``[K, K]`` of the inputs of a group of layers, and every ``stride``-th input."""


def _observation(block: Block, x: jax.Array, stride: int) -> Observation:
    tokens = x.reshape(-1, x.shape[-1])
    return gram(tokens.astype(block.attn.q.weight.get_value().dtype)), tokens[::stride]


@partial(jax.jit, static_argnames="stride")
def observe_all(block: Block, h: jax.Array, *, stride: int) -> dict[str, Observation]:
    """Observations of all groups of layers, in one pass through the block."""
    inputs: dict[str, jax.Array] = {}
    block(h, _positions(h), taps=inputs)
    return {tap: _observation(block, x, stride) for tap, x in inputs.items()}


@partial(jax.jit, static_argnames="stride")
def observe_attn(block: Block, h: jax.Array, *, stride: int) -> Observation:
    """The input of q, k and v."""
    return _observation(block, block.attn_input(h), stride)


@partial(jax.jit, static_argnames="stride")
def observe_o(block: Block, h: jax.Array, *, stride: int) -> tuple[Observation, jax.Array]:
    """The input of o, with q, k and v as they now are; it is also returned whole."""
    x, _ = block.attn.attend(block.attn_input(h), _positions(h))
    return _observation(block, x, stride), x


@partial(jax.jit, static_argnames="stride", donate_argnames="h")
def observe_mlp(block: Block, h: jax.Array, x: jax.Array, *, stride: int) -> tuple[Observation, jax.Array]:
    """The input of gate and up, and the residual stream after attention, from o's input ``x``."""
    h = block.after_attn(h, x)
    return _observation(block, block.mlp_input(h), stride), h


@partial(jax.jit, static_argnames="stride")
def observe_down(block: Block, h: jax.Array, *, stride: int) -> Observation:
    """The input of down, from the residual stream after attention."""
    return _observation(block, block.mlp.hidden(block.mlp_input(h)), stride)


@partial(jax.jit, donate_argnames="h")
def finish(block: Block, h: jax.Array) -> jax.Array:
    """The residual stream after the block, from that after attention."""
    return block.after_mlp(h, block.mlp.hidden(block.mlp_input(h)))


@partial(jax.jit, donate_argnames="h")
def advance(block: Block, h: jax.Array) -> jax.Array:
    """The residual stream after the block."""
    return block(h, _positions(h))[0]


@partial(jax.jit, static_argnames="group_size")
def prepare(total: jax.Array, tokens: jax.Array, damping: jax.Array, *, group_size: int) -> Statistics:
    """Statistics from a sum of Gram matrices over ``tokens`` tokens."""
    k = total.shape[0]
    padding = group_count(k, group_size) * group_size - k
    h, dead = dampen(total * (2.0 / tokens), damping)
    u = inverse_cholesky(h)
    importance = 1.0 / jnp.diagonal(u) ** 2
    tail = (jnp.arange(k + padding) >= k).astype(jnp.float32)
    square, flat = ((0, padding), (0, padding)), (0, padding)
    return Statistics(
        u=jnp.pad(u, square) + jnp.diag(tail),
        importance=jnp.pad(importance, flat),
        alive=jnp.pad(1.0 - dead, flat),
        h=jnp.pad(h, square),
    )


@jax.jit
def _power(w: jax.Array, h: jax.Array) -> jax.Array:
    """``diag(W^T H W)``, twice the mean squared output of every channel, ``[N]``."""
    return jnp.sum(w * (h @ w), axis=0)


@partial(jax.jit, static_argnames="dtype")
def _dequantize(tensor: MixedTensor, dtype: jnp.dtype) -> jax.Array:
    return tensor.dequantize(dtype)


class BlockQuantizer:
    """Quantizes blocks one after another while it carries the calibration activations along."""

    def __init__(
        self, source: Source, tokens: np.ndarray, config: SlimConfig, bits: Allocation | None
    ) -> None:
        self.source, self.config, self.bits = source, config, bits
        self.zero_bits = zero_bits(_widths(config, bits))
        self.dtype = _compute_dtype()
        outer = source.outer()
        embed = make_decoder(_without_blocks(source), outer, [])
        batch = max(1, BATCH_TOKENS // tokens.shape[1])
        self.h: Sequence[jax.Array] = [
            _embed(embed, jnp.asarray(rows, jnp.int32)) for rows in _batches(tokens, batch)
        ]
        self.tokens = tokens.size
        self.stride = max(1, tokens.size // config.search_tokens)

    def skip(self, params: Params) -> None:
        """Carries the activations over a block that an earlier run has quantized."""
        block = self._block({name: self._dense(value) for name, value in params.items()})
        if self.config.sequential:  # through the same programs, so that the last bit is the same too
            for_o = [observe_o(block, h, stride=self.stride)[1] for h in self.h]
            middle = [observe_mlp(block, h, x, stride=self.stride)[1] for h, x in zip(self.h, for_o)]
            self.h = [finish(block, h) for h in middle]
        else:
            self.h = [advance(block, h) for h in self.h]

    def quantize(self, index: int) -> tuple[dict[str, Any], BlockReport]:
        """Quantizes block ``index``: its parameters, linear weights packed, and what was done."""
        start = time.monotonic()
        result = dict(self.source.block(index))
        packed = [name for name, value in result.items() if isinstance(value, MixedTensor)]
        if packed:
            raise ValueError(f"blocks.{index}.{packed[0]} is already quantized, expected a dense model")
        current = {name: self._dense(value) for name, value in result.items()}
        layers: list[LayerReport] = []
        allocation: Allocation = {}
        observe = self._observe_sequentially if self.config.sequential else self._observe_at_once
        for names, (total, x) in observe(current):
            weights = [jnp.asarray(result[f"{name}.weight"], jnp.float32) for name in names]
            prefix = f"blocks.{index}."
            for name, tensor, report in self._solve([prefix + name for name in names], weights, total, x):
                key = name.removeprefix(prefix) + ".weight"
                result[key], current[key] = tensor, self._dense(tensor)
                layers.append(report)
                allocation[name] = tensor.bits().tolist()
        seconds = time.monotonic() - start
        return result, BlockReport(index, self.source.config.num_layers, layers, seconds, allocation)

    def _observe_at_once(self, params: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Observation]]:
        """Yields each group of layers with its inputs in the unquantized block, then advances."""
        block = self._block(params)
        observed = [observe_all(block, h, stride=self.stride) for h in self.h]
        for tap, names in linear_groups(self.source.config).items():
            yield names, _merge(batch.pop(tap) for batch in observed)
        block = self._block(params)
        self.h = [advance(block, h) for h in self.h]

    def _observe_sequentially(self, params: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Observation]]:
        """Yields each group of layers with its inputs; the caller puts quantized weights into ``params``."""
        attn, o, mlp, down = linear_groups(self.source.config).values()
        block = self._block(params)
        yield attn, _merge(observe_attn(block, h, stride=self.stride) for h in self.h)
        block = self._block(params)
        seen, inputs = zip(*(observe_o(block, h, stride=self.stride) for h in self.h))
        yield o, _merge(seen)
        block = self._block(params)
        seen, self.h = zip(*(observe_mlp(block, h, x, stride=self.stride) for h, x in zip(self.h, inputs)))
        del inputs
        yield mlp, _merge(seen)
        block = self._block(params)
        yield down, _merge(observe_down(block, h, stride=self.stride) for h in self.h)
        block = self._block(params)
        self.h = [finish(block, h) for h in self.h]

    def _block(self, params: Params) -> Block:
        return make_block(self.source.config, params)

    def _dense(self, value: Any) -> jax.Array:
        """A parameter as the forward passes take it: matrices in the compute dtype, the rest in float32."""
        if isinstance(value, MixedTensor):
            return _dequantize(value, self.dtype)
        return jnp.asarray(value, self.dtype if value.ndim == 2 else jnp.float32)

    def _prepare(self, total: jax.Array, names: list[str]) -> Statistics:
        damping = self.config.damping
        for _ in range(DAMPING_TRIES):
            statistics = prepare(
                total,
                jnp.float32(self.tokens),
                jnp.float32(damping),
                group_size=self.config.group_size,
            )
            if bool(jnp.all(jnp.isfinite(statistics.u))):
                return statistics
            damping *= 10
        raise ValueError(
            f"the Hessian of {', '.join(names)} is not positive definite, damped by {damping / 10:g}: "
            "are the calibration activations finite?"
        )

    def _solve(
        self, names: list[str], weights: list[jax.Array], total: jax.Array, x: jax.Array
    ) -> Iterator[tuple[str, MixedTensor, LayerReport]]:
        """Quantizes the layers that share the input with this Gram matrix, in one stacked solve."""
        config, k = self.config, weights[0].shape[0]
        statistics = self._prepare(total, names)
        padding = ((0, statistics.alive.shape[0] - k), (0, 0))
        padded = [jnp.pad(w, padding) * statistics.alive[:, None] for w in weights]
        x = jnp.pad(x, ((0, 0), (0, padding[0][1])))
        chosen = [self._allocate(name, w, x, statistics) for name, w in zip(names, padded)]
        solution = solve(
            jnp.concatenate(padded, axis=1),
            statistics.u,
            statistics.importance,
            jnp.concatenate(
                [
                    jnp.broadcast_to(bits[:, None].astype(np.float32), (len(bits), w.shape[1]))
                    for (bits, _), w in zip(chosen, padded)
                ],
                axis=1,
            ),
            group_size=config.group_size,
            zero_bits=self.zero_bits,
            sqc=config.sqc or "search",
            feedback=config.method != "rtn",
        )
        ends = np.cumsum([w.shape[1] for w in weights]).tolist()
        for name, w, (bits, mixed), end in zip(names, padded, chosen, ends):
            part = slice(end - w.shape[1], end)
            tensor = self._pack(solution, part, bits, k)
            error = float(
                jnp.sum(solution.error[part]) / jnp.maximum(jnp.sum(_power(w, statistics.h)), 1e-30)
            )
            yield name, tensor, LayerReport.of(name, tensor, error, mixed)

    def _allocate(
        self, name: str, w: jax.Array, x: jax.Array, statistics: Statistics
    ) -> tuple[np.ndarray, int | None]:
        """Bit width of each group of a layer, and the ``p`` of the search if there was one."""
        config = self.config
        groups = w.shape[0] // config.group_size
        if self.bits is not None:
            given = self.bits.get(name)
            if given is None or len(given) != groups:
                found = "nothing" if given is None else f"{len(given)} groups"
                raise ValueError(f"the allocation has {found} for {name}, expected {groups} groups")
            return np.asarray(given), None
        if config.method != "slim":
            return np.full(groups, config.bits), None
        score, order = scores(
            w,
            x,
            statistics.importance,
            bits=config.bits,
            group_size=config.group_size,
            zero_bits=self.zero_bits,
            sqc="minmax" if config.criterion == "paper" else config.sqc or "search",
            criterion=config.criterion or "kl",
        )
        first = 1 if config.criterion == "paper" and len(score) > 1 else 0  # the authors always mix
        p = first + int(np.argmin(np.asarray(score)[first:]))
        return allocate(np.asarray(order), p, config.bits), p

    def _pack(self, solution: Solution, part: slice, bits: np.ndarray, k: int) -> MixedTensor:
        widths = _widths(self.config, self.bits)
        zero_unit = np.exp2(bits - self.zero_bits)[:, None]
        return pack(
            np.asarray(solution.code[:k, part]),
            np.asarray(solution.scale[:, part]),
            np.rint(np.asarray(solution.zero[:, part]) / zero_unit).astype(np.uint8),
            bits,
            group_size=self.config.group_size,
            widths=widths,
        )


def _merge(observations: Iterable[Observation]) -> Observation:
    """Sums the Gram matrices of all batches and joins their sampled inputs."""
    grams, samples = zip(*observations)
    return sum(grams[1:], start=grams[0]), jnp.concatenate(samples)


def _widths(config: SlimConfig, bits: Allocation | None) -> tuple[int, ...]:
    if bits is None:
        return config.widths
    return tuple(sorted({b for layer in bits.values() for b in layer}))


def _compute_dtype() -> jnp.dtype:
    """bfloat16: on CPUs too it is the faster product where many tokens pass at once."""
    return jnp.dtype(jnp.bfloat16)


def _without_blocks(source: Source) -> Any:
    return dataclasses.replace(source.config, num_layers=0)


@jax.jit
def _embed(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    return decoder.embed_tokens(tokens, _positions(tokens))


def _batches(tokens: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """Rows of ``tokens`` in equal batches, so that one program serves all of them."""
    while tokens.shape[0] % batch:
        batch -= 1
    for start in range(0, tokens.shape[0], batch):
        yield tokens[start : start + batch]


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
    on_block: OnBlock | None = None,
) -> tuple[Decoder, Report]:
    """Quantizes the linear layers of a model's blocks; embeddings, norms and head stay as they are.

    Args:
      model: a decoder in memory, or a source that is read block by block.
      tokens: calibration text, ``int[samples, length]``.
      config: how to quantize.
      allocation: bit widths of every group, instead of a search.
      on_block: called with every finished block.

    Returns:
      The decoder on packed weights, and a report.

    Raises:
      ValueError: the tokens or the allocation do not fit the model.
    """
    source = DecoderSource(model) if isinstance(model, Decoder) else model
    quantizer = BlockQuantizer(source, _check(source, tokens), config, allocation)
    blocks, reports = [], []
    for index in range(source.config.num_layers):
        params, report = quantizer.quantize(index)
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
    on_block: OnBlock | None = None,
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
    quantizer = BlockQuantizer(source, tokens, config, allocation)
    reports = []
    for index in range(source.config.num_layers):
        if index < len(writer.blocks):
            report = BlockReport.from_json(writer.blocks[index]["report"])
            quantizer.skip(writer.read_block(index))
        else:
            params, report = quantizer.quantize(index)
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
