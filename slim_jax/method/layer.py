"""Quantizes the layers that share an input: statistics, bit search, one stacked solve, packing."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import MixedTensor, pack, side_by_side
from pallas_kernels.chips import product_dtype
from pallas_kernels.layout import zero_bits
from slim_jax.config import Settings
from slim_jax.method.budget import group_errors
from slim_jax.method.gptq import Solution, solve
from slim_jax.method.hessian import (
    Importance,
    Observation,
    Statistics,
    corrected,
    importance_only,
    output_errors,
    squared_errors,
    statistics,
)
from slim_jax.method.refine import refine
from slim_jax.method.sba import Allocation, allocate, output_divergence, scores
from slim_jax.method.scale_search import bytes_hold, scale_dtype
from slim_jax.placement import ONE_DEVICE, PANEL, Placement
from slim_jax.report import LayerReport

Found = TypeVar("Found", Statistics, Importance)

DAMPING_TRIES = 4
"""Number of dampings that are tried, each ten times the one before, before a Hessian is given up."""

CHUNK = 64 * PANEL
"""Output channels of a wide weight that are solved at once: tokens of the vocabulary."""


class LayerSolver:
    """Quantizes layers, given the observations of their inputs.

    Args:
      config: how to quantize.
      bits: widths of every group of every layer, by the layer's name; None searches for them.
      placement: the chips that split the output channels.
      widths: the widths that ``bits`` may contain; by default the config's.
    """

    def __init__(
        self,
        config: Settings,
        bits: Allocation | None,
        placement: Placement = ONE_DEVICE,
        widths: tuple[int, ...] | None = None,
    ) -> None:
        self.config, self.bits, self.placement = config, bits, placement
        self.widths = widths or config.widths
        self.zero_bits = zero_bits(self.widths)  # as stored; fits may have fewer
        self._options: dict[str, Any] = {
            "group_size": config.group_size,
            "zero_bits": config.fitted_zero_bits(self.widths),
            "placement": placement,
        }

    def errors(self, weights: Mapping[str, Any], observation: Observation) -> dict[str, np.ndarray]:
        """Errors ``float32[G, W]`` of each of the layers; see `slim_jax.method.budget.group_errors`.

        The layers share the observed input; ``weights`` are ``[K, N]`` each, by the layer's name. The default
        ``sqc``, "search", is replaced by "coarse", which is accurate enough here.
        """
        found, _ = self._damped(importance_only, observation, list(weights))
        sqc = "coarse" if self.config.sqc == "search" else self.config.sqc
        errors = {}
        for name, w in weights.items():
            padded = jnp.pad(self.placement.channels(w).astype(jnp.float32), _rows_up_to(found, w))
            padded = padded * found.alive[:, None]
            by_width = group_errors(
                padded,
                found.importance,
                widths=self.config.widths,
                sqc=sqc,
                scale_dtype=self.scale_dtype(padded, *self.config.widths),
                **self._options,
            )
            errors[name] = self.placement.fetch(by_width)
        return errors

    def solve(
        self, names: list[str], weights: Sequence[jax.Array | np.ndarray], observation: Observation
    ) -> list[tuple[MixedTensor, LayerReport]]:
        """Quantizes the layers that share an input, in one stacked solve.

        Args:
          names: the layers' names, for the allocation and the report.
          weights: ``[K, N]`` each.
          observation: the observation of the shared input.

        Returns:
          The packed weight and the report of each layer.

        Raises:
          ValueError: the Hessian is not positive definite, the given bits do not fit, or a layer's inputs or
            error are not finite.
        """
        found, damping = self.statistics(observation, names)
        solved = []
        for name, (tensor, mixed, sums) in zip(names, self._solved(names, weights, observation, found)):
            errors, borrowed = output_errors(name, [sums]), observation.share_borrowed
            report = LayerReport.of(name, tensor, errors, mixed, damping, borrowed)
            solved.append((self.placement.tensor(tensor), report))
        return solved

    def solve_wide(
        self, name: str, weight: Callable[[slice], Any], channels: int, observation: Observation
    ) -> tuple[MixedTensor, LayerReport]:
        """Quantizes one layer with many output channels, :data:`CHUNK` of them at a time.

        Args:
          name: the layer's name.
          weight: returns some columns of the weight, ``[K, n]``.
          channels: number of all columns, ``N``.
          observation: the observation of the layer's input.

        Raises:
          ValueError: as for :meth:`solve`.
        """
        found, damping = self.statistics(observation, [name])
        chunks = [slice(start, min(start + CHUNK, channels)) for start in range(0, channels, CHUNK)]
        solved = [next(self._solved([name], [weight(chunk)], observation, found)) for chunk in chunks]
        tensors, _, sums = zip(*solved)
        tensor = self.placement.tensor(side_by_side(tensors))
        return tensor, LayerReport.of(name, tensor, output_errors(name, sums), None, damping)

    def _solved(
        self,
        names: list[str],
        weights: Sequence[jax.Array | np.ndarray],
        observation: Observation,
        found: Statistics,
    ) -> Iterator[tuple[MixedTensor, int | None, list[float]]]:
        """Yields each layer's packed weight, the ``p`` of its bit search, and its :func:`squared_errors`."""
        config, k = self.config, weights[0].shape[0]
        padding = _rows_up_to(found, weights[0])
        placed = [self.placement.channels(w).astype(jnp.float32) for w in weights]
        padded = [jnp.pad(w, padding) * found.alive[:, None] for w in placed]
        if config.method != "rtn":
            padded = self.corrected(padded, found, observation)
        x = jnp.pad(self.placement.whole(observation.sample), ((0, 0), (0, padding[0][1])))
        chosen = [self._allocate(name, w, x, found) for name, w in zip(names, padded)]
        solutions = self._solutions(padded, found, [bits for bits, _ in chosen])
        if config.criterion != "paper" and any(mixed for _, mixed in chosen):
            uniform = [np.full_like(bits, int(config.bits)) for bits, _ in chosen]
            plain = self._solutions(padded, found, uniform)
            for i, (w, (_, mixed)) in enumerate(zip(padded, chosen)):
                if mixed and not _mixing_helps(*self.placement.tree((w, x, solutions[i], plain[i]))):
                    solutions[i], chosen[i] = plain[i], (uniform[i], 0)
        for w, (bits, mixed), solution in zip(padded, chosen, solutions):
            sums = [float(value) for value in squared_errors(w, _weight(solution), found.h)]
            yield self._pack(solution, bits, k), mixed, sums

    def scale_dtype(self, w: jax.Array, *widths: Any) -> jnp.dtype:
        """Returns the dtype of a padded weight's scales: uint8 if `bytes_hold` them at all ``widths``.

        Args:
          w: the weight, ``[K', N]``.
          widths: each is one width for all groups, or the width of every group, ``[G]``.
        """
        dtype, groups = scale_dtype(self.config.sqc), w.shape[0] // self.config.group_size
        for width in widths if dtype == jnp.uint8 else ():
            bits = jnp.broadcast_to(jnp.asarray(width, jnp.float32), groups)
            if not bool(bytes_hold(w, bits, group_size=self.config.group_size)):
                return jnp.dtype(jnp.bfloat16)
        return dtype

    def corrected(
        self, weights: list[jax.Array], found: Statistics, observation: Observation
    ) -> list[jax.Array]:
        """Returns the padded weights ``[K', N]`` to round; see `slim_jax.method.hessian.corrected`.

        The share of the upstream error that they compensate is ``asymmetric * (1 - K / T)``, since ``K / T``
        of a fit of ``K`` unknowns to ``T`` tokens is chance. If the observation has no input error or
        ``asymmetric`` is 0, these are ``weights``.
        """
        input_error, residual_error = observation.input_error, observation.residual_error
        asymmetric = self.config.asymmetric
        if input_error is None or not asymmetric:
            return weights
        missing, unit = weights[0].shape[0] - len(input_error), np.float32(2 / observation.tokens)
        share = jnp.float32(asymmetric * max(0.0, 1 - len(input_error) / observation.tokens))
        input_error = self.placement.whole(jnp.pad(input_error * unit, ((0, missing), (0, missing))))
        if residual_error is not None:
            residual_error = self.placement.channels(jnp.pad(residual_error * unit, ((0, missing), (0, 0))))
        return [corrected(w, found.u, input_error, residual_error, share) for w in weights]

    def statistics(self, observation: Observation, names: list[str]) -> tuple[Statistics, float]:
        """Returns the statistics of an observation and the damping that they needed."""
        return self._damped(statistics, observation, names)

    def _damped(
        self, of: Callable[..., Found], observation: Observation, names: list[str]
    ) -> tuple[Found, float]:
        """Calls ``of``, raising the damping tenfold until the Hessian is positive definite."""
        damping = wanted = self.config.damping
        for _ in range(DAMPING_TRIES):
            found = of(
                self.placement.whole(observation.gram),
                jnp.float32(observation.tokens + observation.borrowed),
                jnp.float32(damping),
                group_size=self.config.group_size,
            )
            if bool(jnp.all(jnp.isfinite(found.importance))):
                if damping > wanted:
                    needed = f"is positive definite only when damped by {damping:g}"
                    warnings.warn(f"the Hessian of {', '.join(names)} {needed}", stacklevel=2)
                return found, damping
            if not bool(jnp.all(jnp.isfinite(observation.gram))):
                raise ValueError(f"what {', '.join(names)} read for the calibration text is not finite")
            damping *= 10
        raise ValueError(
            f"the Hessian of {', '.join(names)} is not positive definite, damped by {damping / 10:g}"
        )

    def _solutions(
        self, weights: list[jax.Array], found: Statistics, bits: list[np.ndarray]
    ) -> list[Solution]:
        """Solves every layer for its bits; layers whose scales have the same stored dtype together."""
        dtypes = [self.scale_dtype(w, b) for w, b in zip(weights, bits)]
        solutions: dict[int, Solution] = {}
        for dtype in dict.fromkeys(dtypes):
            own = [i for i, other in enumerate(dtypes) if other == dtype]
            stacked = self._stacked([weights[i] for i in own], found, [bits[i] for i in own], dtype)
            solutions |= dict(zip(own, stacked))
        return [solutions[i] for i in range(len(weights))]

    def _stacked(
        self,
        weights: list[jax.Array],
        found: Statistics,
        bits: list[np.ndarray],
        scale_dtype: jnp.dtype,
    ) -> list[Solution]:
        """Solves all layers in one stacked solve."""
        config = self.config
        widths = [np.repeat(b[:, None].astype(np.float32), w.shape[1], axis=1) for b, w in zip(bits, weights)]
        w = self.placement.channels(jnp.concatenate(weights, axis=1))
        width = self.placement.channels(np.concatenate(widths, axis=1))
        solution = solve(
            w,
            found.u,
            found.importance,
            width,
            sqc=config.sqc,
            feedback=config.method != "rtn",
            scale_dtype=scale_dtype,
            **self._options,
        )
        if config.refine and config.method != "rtn":
            solution = refine(w, found.damped, solution, width, passes=config.refine, **self._options)
        stops = np.cumsum([w.shape[1] for w in weights]).tolist()
        return [solution.part(slice(stop - w.shape[1], stop)) for w, stop in zip(weights, stops)]

    def _allocate(
        self, name: str, w: jax.Array, x: jax.Array, found: Statistics
    ) -> tuple[np.ndarray, int | None]:
        """Returns the bit width of each group of a layer, and the ``p`` that the search chose, if it ran."""
        config = self.config
        groups = w.shape[0] // config.group_size
        if self.bits is not None:
            given = self.bits.get(name)
            if given is None or len(given) != groups:
                has = "nothing" if given is None else f"{len(given)} groups"
                raise ValueError(f"the allocation has {has} for {name}, expected {groups} groups")
            return np.asarray(given), None
        if not config.mixed:
            return np.full(groups, int(config.bits)), None
        mean = int(config.bits)
        score, order = scores(
            w,
            x,
            found.importance,
            bits=mean,
            sqc="minmax" if config.criterion == "paper" else config.sqc,
            criterion=config.criterion,
            scale_dtype=None if config.criterion == "paper" else self.scale_dtype(w, mean - 1, mean + 1),
            **self._options,
        )
        candidates = np.asarray(score)
        if not np.all(np.isfinite(candidates)):
            raise ValueError(f"the scores of {name}'s bit search are not finite: its outputs are too large")
        first = 0
        if config.criterion == "paper" and groups > 3:  # the authors always mix, and stop one p earlier
            first, candidates = 1, candidates[: groups // 2]
        p = first + int(np.argmin(candidates[first:]))
        return allocate(np.asarray(order), p, mean), p

    def _pack(self, solution: Solution, bits: np.ndarray, k: int) -> MixedTensor:
        zero_unit = np.exp2(bits - self.zero_bits)[:, None]
        code, scale, zero = map(self.placement.fetch, solution)
        return pack(
            code[:k],
            scale,
            np.rint(zero / zero_unit).astype(np.uint8),
            bits,
            group_size=self.config.group_size,
            widths=self.widths,
            dtype=product_dtype(),
        )


class LayerSolvers:
    """Solvers of one model's layers, one for each distinct config that the rules give.

    Args:
      config: how to quantize, with rules.
      bits: widths of every group of the layers that :class:`LayerSolver` does not search, by name.
      given: if True, ``bits`` covers all layers; otherwise those whose widths one budget over the model
        decides.
      placement: the chips that split the output channels.
    """

    def __init__(
        self,
        config: Settings,
        bits: Allocation | None,
        *,
        given: bool = False,
        placement: Placement = ONE_DEVICE,
    ) -> None:
        self.config, self.bits, self.given, self.placement = config, bits, given, placement
        occurring = {width for layer in (bits or {}).values() for width in layer}
        self.widths = tuple(sorted(occurring)) if given else None
        self._solvers: dict[Settings, LayerSolver] = {}

    def of(self, names: Sequence[str]) -> list[tuple[LayerSolver, list[str]]]:
        """Groups the names by their solver, in order; layers that a rule skips are left out."""
        found: dict[Settings, list[str]] = {}
        for name in names:
            config = self.config.of_layer(name)
            if config is not None:
                found.setdefault(config, []).append(name)
        return [(self._solver(config), same) for config, same in found.items()]

    def _solver(self, config: Settings) -> LayerSolver:
        if config not in self._solvers:
            bits = self.bits if self.given or config.over_model else None
            self._solvers[config] = LayerSolver(config, bits, self.placement, self.widths)
        return self._solvers[config]


def _mixing_helps(w: jax.Array, x: jax.Array, mixed: Solution, uniform: Solution) -> bool:
    """True if the solved mixed widths diverge less than the solved uniform widths.

    The search scores weights that are rounded to nearest. Error feedback gains most where all groups
    have the same width, so some mixes that win the search lose once solved.
    """
    return bool(output_divergence(w, _weight(mixed), x) < output_divergence(w, _weight(uniform), x))


def _rows_up_to(
    found: Statistics | Importance, w: jax.Array | np.ndarray
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the padding, as `jnp.pad` takes it, that fills a weight up to whole groups."""
    return (0, found.alive.shape[0] - w.shape[0]), (0, 0)


_weight = jax.jit(Solution.weight)
