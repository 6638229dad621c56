"""SBA over the whole model: chooses the bit width of every group of every layer under one bit budget.

Every cost is a predicted increase of the model's loss, in nats per token, so bits go to the groups where
they lower the loss most. Within a layer the choice is exact for every sum of widths. Between layers a
Lagrange multiplier, the cost of one bit, decides; it is found by bisection. The rest of the budget is then
spent step by step on the layer that gains most per bit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from slim_jax.method.sba import Allocation, quantized_at, weighted_errors
from slim_jax.placement import ONE_DEVICE, Placement

SHAPES = 4
"""A layer's mean width is a multiple of ``1 / SHAPES``, where its number of groups allows it. Programs are
compiled anew for every number of rows of packed words, so there should be few such numbers."""

BISECTIONS = 100


@partial(jax.jit, static_argnames=("widths", "group_size", "zero_bits", "sqc", "scale_dtype", "placement"))
def group_errors(
    w: Float[Array, "k n"],
    importance: Float[Array, " k"],
    *,
    widths: tuple[int, ...],
    group_size: int,
    zero_bits: int,
    sqc: str,
    scale_dtype: jnp.dtype | None = None,
    placement: Placement = ONE_DEVICE,
) -> Float[Array, "groups widths"]:
    """Weighted squared error of every group at every width, on the grid that ``sqc`` fits to it.

    The error is ``sum_jn (w_jn - w_hat_jn(b))^2 / u_j^2``, and ``importance`` is ``1 / u_j^2``. ``K`` must be
    a multiple of ``group_size``; for ``scale_dtype`` see `slim_jax.method.sba.quantized_at`.
    """
    rounded = partial(quantized_at, group_size=group_size, zero_bits=zero_bits, sqc=sqc)

    def at(bits: jax.Array) -> jax.Array:
        w_hat = rounded(w, importance, bits, scale_dtype=scale_dtype, placement=placement)
        return weighted_errors(w, w_hat, importance, group_size, placement)

    return lax.map(at, jnp.asarray(widths, jnp.float32)).T


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """Costs of the widths of one layer's groups.

    Attributes:
      rise: ``float64[G, W]``, predicted loss increase of each group at each width, in nats per token.
      weights: number of weights in a group, ``group_size * N``.
    """

    rise: np.ndarray
    weights: int


@dataclasses.dataclass(frozen=True)
class _Curve:
    """A layer's least cost at each allowed sum of its groups' widths."""

    totals: np.ndarray  # allowed sums, ascending
    costs: np.ndarray
    choices: np.ndarray  # index of the chosen width, [G, sums], from :func:`_curve`
    widths: tuple[int, ...]

    def bits(self, total: int) -> list[int]:
        """Returns the widths of the groups that cost least among those whose sum is ``total``."""
        bits = []
        for choice in self.choices[::-1]:
            width = self.widths[choice[total]]
            bits.append(width)
            total -= width
        return bits[::-1]


def _curve(rise: np.ndarray, widths: tuple[int, ...]) -> _Curve:
    """Computes the least costs exactly, by dynamic programming over the groups."""
    groups = len(rise)
    rise = np.minimum.accumulate(rise, axis=1)  # a larger width never costs more
    best = np.full(groups * widths[-1] + 1, np.inf)
    best[0] = 0.0
    choices = np.zeros((groups, len(best)), np.uint8)
    for group, costs in enumerate(rise):
        tried = np.full((len(widths), len(best)), np.inf)
        for i, width in enumerate(widths):
            tried[i, width:] = best[: len(best) - width] + costs[i]
        choices[group] = tried.argmin(axis=0)
        best = tried.min(axis=0)
    step = max(1, groups // SHAPES)
    totals = np.flatnonzero(np.isfinite(best))
    totals = totals[(totals - groups * widths[0]) % step == 0]
    return _Curve(totals, best[totals], choices, widths)


def spend(layers: Mapping[str, LayerCosts], widths: Sequence[int], bits: float) -> Allocation:
    """Returns the allocation of least cost whose mean width over all weights is at most ``bits``.

    Raises:
      ValueError: ``bits`` is below the smallest width, or a cost is not finite.
    """
    if broken := [name for name, layer in layers.items() if not np.all(np.isfinite(layer.rise))]:
        raise ValueError(f"the predicted loss increase of {', '.join(broken)} is not finite")
    widths = tuple(sorted(widths))
    if bits < widths[0]:
        raise ValueError(f"bits is {bits}, expected at least {widths[0]}, the smallest width")
    curves = {name: _curve(layer.rise, widths) for name, layer in layers.items()}
    sizes = [layer.weights for layer in layers.values()]
    budget = bits * sum(layer.weights * len(layer.rise) for layer in layers.values())

    def cheapest(bit_weight: float) -> list[int]:
        """Index on each layer's curve where its cost plus ``bit_weight`` times its bits is least."""
        return [
            int(np.argmin(curve.costs + bit_weight * size * curve.totals))
            for curve, size in zip(curves.values(), sizes)
        ]

    def spent(chosen: list[int]) -> float:
        return float(sum(size * curve.totals[i] for i, curve, size in zip(chosen, curves.values(), sizes)))

    low, high = 0.0, 1.0
    while spent(cheapest(high)) > budget:
        low, high = high, high * 4
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(cheapest(middle)) <= budget else (middle, high)
    chosen = cheapest(high)
    _fill(chosen, list(curves.values()), sizes, budget - spent(chosen))
    return {name: curve.bits(int(curve.totals[i])) for (name, curve), i in zip(curves.items(), chosen)}


def spend_on_units(
    layers: Mapping[str, LayerCosts], units: Mapping[str, str], widths: Sequence[int], bits: float
) -> Allocation:
    """Returns what :func:`spend` does, with one width for all groups of the layers of a unit.

    Args:
      layers: costs by layer.
      units: each layer's unit.
      widths: widths to choose from.
      bits: the largest mean width.

    Raises:
      ValueError: see :func:`spend`.
    """
    joined: dict[str, LayerCosts] = {}
    for name, layer in layers.items():
        rise, weights = layer.rise.sum(axis=0, keepdims=True), layer.weights * len(layer.rise)
        if units[name] in joined:
            other = joined[units[name]]
            rise, weights = rise + other.rise, weights + other.weights
        joined[units[name]] = LayerCosts(rise, weights)
    spent = spend(joined, widths, bits)
    return {name: spent[units[name]] * len(layer.rise) for name, layer in layers.items()}


def predicted_increase(
    layers: Mapping[str, LayerCosts], widths: Sequence[int], allocation: Allocation
) -> dict[str, float]:
    """Predicted loss increase of each layer at its allocated widths, in nats per token."""
    column = {width: i for i, width in enumerate(sorted(widths))}
    return {
        name: float(sum(rise[column[width]] for rise, width in zip(layer.rise, allocation[name])))
        for name, layer in layers.items()
    }


def _fill(chosen: list[int], curves: list[_Curve], sizes: list[int], left: float) -> None:
    """Spends the ``left`` bits of the budget step by step, always on the layer that gains most per bit."""

    def gain(layer: int) -> tuple[float, int]:
        """Best gain per bit among a layer's steps that the ``left`` bits cover, and the index it leads to."""
        curve, at = curves[layer], chosen[layer]
        bits = sizes[layer] * (curve.totals[at + 1 :] - curve.totals[at])
        covered = int(np.searchsorted(bits, left, side="right"))
        if not covered:
            return 0.0, at
        ratios = (curve.costs[at] - curve.costs[at + 1 : at + 1 + covered]) / bits[:covered]
        best = int(np.argmax(ratios))
        return float(ratios[best]), at + 1 + best

    while True:
        gains = [gain(layer) for layer in range(len(curves))]
        best = max(range(len(gains)), key=lambda layer: gains[layer][0])
        ratio, target = gains[best]
        if ratio <= 0:
            return
        left -= sizes[best] * (curves[best].totals[target] - curves[best].totals[chosen[best]])
        chosen[best] = target
