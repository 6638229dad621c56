"""Carries the calibration activations through one block after another, stage by stage.

Every stage is a separate jitted step that compiles once per kind of block. The steps are the same whether
a run quantizes a block or, resumed, only passes through it, so the activations after the block are
bit-identical.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels import MixedTensor
from pallas_kernels.planes import WORD_BITS
from slim_jax.calibrate.offload import Batches, OnDisk
from slim_jax.method.hessian import Observation, cross_gram, gram, low_discrepancy
from slim_jax.model.block import stages
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import embed
from slim_jax.model.linear import COMPUTE_DTYPE
from slim_jax.model.params import Params, as_computed, make_part, without_tables
from slim_jax.model.stage import Stage
from slim_jax.placement import ONE_DEVICE, Placement
from slim_jax.store.source import Source

BATCH_TOKENS = 4096
"""Calibration tokens that pass through a block at once, on each chip."""


class Inputs(NamedTuple):
    """Inputs of layers that share an input.

    Attributes:
      x: ``[B, T, K]`` per batch.
      seen: ``bool[B, T]`` per batch, True for the tokens that go through these layers; None if all do.
      weights: token importance, ``float32[samples, length]``; None if all tokens count the same.
      residual: the residual stream that the layers add to, ``[B, T, N]`` per batch; None if they do not add
        to it.
      reference: the same inputs in the reference (full-precision) pass; None without such a pass.
    """

    x: Batches
    seen: list[jax.Array] | None = None
    weights: np.ndarray | None = None
    residual: Batches | None = None
    reference: "Inputs | None" = None

    def upstream_errors(self, batch: int) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """Pairs (reference, here) of a batch's ``x`` and of its residual stream, if it has one; none without
        a reference pass."""
        if self.reference is None:
            return ()
        found = ((self.reference.x[batch], self.x[batch]),)
        if self.residual is None or self.reference.residual is None:
            return found
        return (*found, (self.reference.residual[batch], self.residual[batch]))


ERRORS = ("input_error", "residual_error")
"""Fields of an `Observation` that the pairs of :meth:`Inputs.upstream_errors` give, in order."""

Solve = Callable[[tuple[str, ...], Inputs], Mapping[str, Any]]
"""``solve(names, inputs)`` returns new weights of layers that share an input, dense or packed, by the names
of the block's parameters (``"attn.q.weight"``). Weights that it leaves out stay as they are."""


def sample_positions(tokens: int, stride: int) -> np.ndarray:
    """Positions ``int32`` of one in every ``stride`` of ``tokens`` tokens, at a varying place in each stride.

    At a fixed distance that divides the windows' length, they would be the same few positions of every
    window, including the very first, where attention piles up.
    """
    size = len(range(0, tokens, stride))
    return ((np.arange(size) + low_discrepancy(size)) * (tokens / size)).astype(np.int32)


@partial(jax.jit, static_argnames=("stride", "placement"))
def _observe(
    x: Float[Array, "b t k"],
    seen: Bool[Array, "b t"] | None,
    weights: Float[Array, "b t"] | None,
    pairs: tuple[tuple[jax.Array, jax.Array], ...],
    *,
    stride: int,
    placement: Placement,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Statistics of each chip's ``seen`` tokens: Gram matrix ``[devices, K, K]``, sample, number, total
    importance, and for each of the ``pairs (full, here)`` the product of the inputs with ``full - here``.

    The size of the sample does not depend on ``seen``: few tokens are repeated in it, and it is zeros if
    there are none.
    """

    def own(_: Any, inputs: tuple[Any, Any, Any, Any]):
        x, seen, weights, pairs = inputs
        tokens = x.reshape(-1, x.shape[-1])
        positions: Any = sample_positions(len(tokens), stride)
        count = jnp.int32(len(tokens))
        if seen is not None:
            mask = seen.reshape(-1)
            tokens = jnp.where(mask[:, None], tokens, 0)
            count = jnp.sum(mask, dtype=jnp.int32)
            ordered = jnp.argsort(~mask, stable=True)  # the seen tokens, in order, then the others
            evenly = positions / np.float32(len(mask)) * count
            positions = ordered[jnp.minimum(evenly.astype(jnp.int32), jnp.maximum(count - 1, 0))]
        sample, weight = tokens[positions].astype(jnp.float32), count.astype(jnp.float32)
        apart = [_apart(full, here).astype(tokens.dtype) for full, here in pairs]
        if weights is not None:
            flat = weights.reshape(-1) if seen is None else jnp.where(mask, weights.reshape(-1), 0)
            weight, root = jnp.sum(flat), jnp.sqrt(flat)[:, None].astype(tokens.dtype)
            tokens, apart = tokens * root, [difference * root for difference in apart]
        crossed = tuple(cross_gram(tokens, difference)[None] for difference in apart)
        return gram(tokens)[None], sample, count[None], weight[None], crossed

    return placement.over_samples(own)((), (x, seen, weights, pairs))


def _apart(full: Float[Array, "b t n"], here: Float[Array, "b t n"]) -> Float[Array, "tokens n"]:
    difference = full.astype(jnp.float32) - here.astype(jnp.float32)
    return difference.reshape(-1, here.shape[-1])


@jax.jit
def _add_in_order(total: jax.Array | None, parts: Float[Array, "devices k n"]) -> Float[Array, "k n"]:
    return reduce(jnp.add, list(parts) if total is None else [total, *parts])


def observe(inputs: Inputs, stride: int, placement: Placement = ONE_DEVICE) -> Observation:
    """Sums the Gram matrices of all batches and concatenates samples of one in every ``stride`` inputs.

    A chip's batch is as large as it would be with one chip, and the sums are taken in the order of the
    calibration samples: GPTQ would turn a difference in their last bits into different codes.

    Token importance is normalized: the Gram matrix counts as many tokens as there were.
    """
    total, samples, tokens, weight, row = None, [], 0, 0.0, 0
    errors: dict[str, jax.Array] = {}
    for i, x in enumerate(inputs.x):
        rows = None if inputs.weights is None else placement.samples(inputs.weights[row : row + len(x)])
        seen = None if inputs.seen is None else inputs.seen[i]
        parts, sample, counts, weights, crossed = _observe(
            x, seen, rows, inputs.upstream_errors(i), stride=stride, placement=placement
        )
        tokens += int(np.sum(placement.fetch(counts)))
        weight += float(np.sum(placement.fetch(weights), dtype=np.float64))
        row += len(x)
        total = _add_in_order(total, placement.rows(parts))
        for name, cross in zip(ERRORS, crossed):
            errors[name] = _add_in_order(errors.get(name), placement.rows(cross))
        samples.append(placement.whole(sample))
    assert total is not None
    if inputs.weights is not None and weight > 0:
        total, errors = jax.tree.map(lambda a: a * np.float32(tokens / weight), (total, errors))
    total, errors = jax.tree.map(placement.whole, (total, errors))
    input_error, residual_error = map(errors.get, ERRORS)
    return Observation(total, jnp.concatenate(samples), tokens, 0, input_error, residual_error)


@partial(jax.jit, static_argnames=("run", "reads", "rounded", "placement"))
def _run(
    part: Any,
    expert: jax.Array | None,
    given: tuple[Any, ...],
    *,
    run: Callable[..., tuple[Any, ...]],
    reads: tuple[str, ...],
    rounded: tuple[bool, ...],
    placement: Placement,
) -> tuple[Any, ...]:
    """Runs a `slim_jax.model.stage.Stage` on a batch; ``rounded`` outputs are cast to the compute dtype."""

    # On CPUs attention loops over samples: each chip must loop over its own.
    def own(whole: tuple[Any, jax.Array | None], given: tuple[Any, ...]) -> tuple[Any, ...]:
        part, expert = whole
        given = tuple(
            field if name != "route" or expert is None else jnp.take(field, expert, axis=-1)
            for name, field in zip(reads, given)
        )
        found = zip(run(part, *given), rounded, strict=True)
        return tuple(field.astype(COMPUTE_DTYPE) if round_it else field for field, round_it in found)

    return placement.over_samples(own)((part, expert), given)


@dataclasses.dataclass(frozen=True)
class Activations:
    """Residual stream of all calibration samples before a block; immutable, passing a block makes a new one.

    Attributes:
      config: the decoder's config.
      batches: ``float32[B, T, D]`` each.
      offload: a folder for the activations of all but one batch; None keeps them in memory.
      placement: the chips that split the samples; their number divides that of the samples.
    """

    config: DecoderConfig
    batches: Batches
    offload: Path | None = None
    placement: Placement = ONE_DEVICE

    @classmethod
    def of(
        cls,
        source: Source,
        tokens: np.ndarray,
        offload: Path | None = None,
        placement: Placement = ONE_DEVICE,
    ) -> "Activations":
        """Embeds the tokens; returns the activations before the first block.

        Args:
          source: the model whose embeddings are used.
          tokens: ``int[samples, length]``.
          offload: see the attributes.
          placement: see the attributes.
        """
        outer, numbers = without_tables(source.config, source.outer(), tokens)
        outer = placement.tree(outer)
        batches = sample_batches(numbers, placement.devices)
        empty = cls(source.config, [], offload, placement)
        return empty.with_batches(embed(outer, placement.samples(rows)) for rows in batches)

    def with_batches(self, batches: Iterable[jax.Array]) -> "Activations":
        """Returns a copy with other batches."""
        return dataclasses.replace(self, batches=self.keep(batches))

    def through(self, index: int, params: Params, solve: Solve | None = None) -> "Activations":
        """Returns the activations after block ``index``.

        Args:
          index: the block's index.
          params: its parameters; weights may be dense or packed.
          solve: called with every group of layers that share an input; the pass continues with the weights
            that it returns.
        """
        return self.alongside(None, index, params, solve)[0]

    def alongside(
        self, reference: "Activations | None", index: int, params: Params, solve: Solve | None = None
    ) -> "tuple[Activations, Activations | None]":
        """Returns the activations, and those of the reference pass if there is one, after block ``index``.

        Both passes go through the block stage by stage, so that ``solve`` sees, next to the inputs of layers,
        those of the reference pass, which keeps the given weights. Experts get no reference: routers that
        read different inputs send tokens to different experts.
        """
        own = _Pass(self, index, params)
        other = None if reference is None else _Pass(reference, index, params)
        for stage in own.stages:
            for each in (own, other):
                if each is not None:
                    each.run(stage)
            if stage.layers and solve is not None:
                inputs = own.inputs(stage)
                if other is not None and inputs.seen is None:
                    inputs = inputs._replace(reference=other.inputs(stage))
                own.replace(solve(stage.layers, inputs))
        return own.after, None if other is None else other.after

    def keep(self, arrays: Iterable[jax.Array]) -> Batches:
        """Stores the arrays, in memory or offloaded."""
        return list(arrays) if self.offload is None else OnDisk(arrays, self.offload)

    def part(self, index: int, name: str, params: Params) -> Any:
        """Builds a part of block ``index`` (all of it if ``name`` is empty), with dense matrices in the
        compute dtype and all else in float32."""
        own = {n: v for n, v in params.items() if not name or n.startswith(f"{name}.")}
        computed = {n: self.placement.whole(as_computed(n, value)) for n, value in own.items()}
        return make_part(self.config.block(index), name, computed)


class _Pass:
    """A pass through one block, stage by stage."""

    def __init__(self, before: Activations, index: int, params: Params) -> None:
        self.before, self.index, self.params = before, index, dict[str, Any]()
        self.replace(params)
        self.stream: dict[str, Batches] = {"h": before.batches}
        whole = stages(before.config.block(index))
        self.stages = [stage for outer in whole for stage in outer.inside or (outer,)]
        self.layer_inputs = {stage.input for stage in self.stages if stage.layers}

    def replace(self, params: Mapping[str, Any]) -> None:
        """Replaces parameters, which the stages from here on use; packed ones are dequantized."""
        self.params |= {name: dense_weight(value) for name, value in params.items()}

    @property
    def after(self) -> Activations:
        """The activations after the block, once all its stages have run."""
        return dataclasses.replace(self.before, batches=self.stream["h"])

    def inputs(self, stage: Stage) -> Inputs:
        """Returns the inputs of a stage's linear layers, once the stage has run."""
        residual = self.stream["h"] if stage.adds else None
        return Inputs(self.stream[stage.input], _seen(stage, self.stream), residual=residual)

    def run(self, stage: Stage) -> None:
        """Runs a stage on all batches. Its outputs overwrite fields of the same name that this pass made."""
        if stage.run is None:
            return
        stream = self.stream
        before, part = self.before, self.before.part(self.index, stage.part, self.params)
        expert = None if stage.expert is None else jnp.int32(stage.expert)
        held = [stream.get("routes" if name == "route" else name) for name in stage.reads]
        made = {name: before.keep([]) for name in stage.gives}
        for name, batches in stream.items():
            if name in made and batches is not before.batches:
                made[name] = batches
        for i in range(len(before.batches)):
            given = tuple(None if batches is None else batches[i] for batches in held)
            found = _run(
                part,
                expert,
                given,
                run=stage.run,
                reads=stage.reads,
                rounded=tuple(name in self.layer_inputs for name in stage.gives),
                placement=before.placement,
            )
            for name, array in zip(stage.gives, found):
                if array is None:
                    continue
                if i < len(made[name]):
                    made[name][i] = array
                else:
                    made[name].append(array)
        stream.update({name: batches for name, batches in made.items() if len(batches)})


def _seen(stage: Stage, stream: Mapping[str, Batches]) -> list[jax.Array] | None:
    if stage.expert is None:
        return None
    return [routes[..., stage.expert] > 0 for routes in stream["routes"]]


def dense_weight(value: Any) -> Any:
    """Dequantizes a packed weight to the compute dtype; returns any other value unchanged."""
    if not isinstance(value, MixedTensor):
        return value
    rows = value.groups * value.group_size * max(value.widths) // WORD_BITS
    return value.with_rows(rows).dequantize(COMPUTE_DTYPE)  # one program for all mean widths


def sample_batches(tokens: np.ndarray, devices: int) -> Iterator[np.ndarray]:
    """Yields rows of ``tokens [samples, length]`` in batches of one size, so that one program serves all."""
    batch = max(1, BATCH_TOKENS // tokens.shape[1])
    while tokens.shape[0] % (devices * batch):
        batch -= 1
    for start in range(0, tokens.shape[0], devices * batch):
        yield tokens[start : start + devices * batch]
