"""Rotary position embeddings, and their extensions beyond the trained context."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies that extends the trained context.

    The ``kind`` "linear" divides all frequencies by ``factor``. "llama3" divides those whose wavelength is
    longer than ``original_max_positions / low_freq_factor``, keeps those whose wavelength is shorter than
    ``original_max_positions / high_freq_factor`` and blends between. "longrope" divides each by its own entry
    of ``short_factors``, or of ``long_factors`` in a pass that reaches beyond ``original_max_positions``
    tokens, and multiplies queries and keys by ``attention_factor``. "yarn" (arXiv:2309.00071) keeps those
    that turn more than ``beta_fast`` times within ``original_max_positions``, divides those that turn less
    than ``beta_slow`` times and blends between, from one whole pair of features to another if ``truncate``;
    it multiplies too. "proportional" rotates the first ``proportion`` of the pairs alone.
    """

    kind: Literal["linear", "llama3", "longrope", "yarn", "proportional"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    proportion: float = 1.0


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, tokens: int | Int[Array, ""] = 0
) -> Float[Array, " half"]:
    """Returns the angular frequency of each pair of features, ``[head_dim / 2]`` radians per position.

    Args:
      head_dim: features of a head.
      theta: base of the frequencies.
      scaling: scaling of the frequencies, if any.
      tokens: the greatest position of the batch plus one, by which "longrope" chooses its factors, as
        transformers does. It may be traced.
    """
    frequency = 1.0 / (theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        short, long = jnp.asarray(scaling.short_factors), jnp.asarray(scaling.long_factors)
        return frequency / jnp.where(tokens > scaling.original_max_positions, long, short)
    if scaling.kind == "yarn":
        keep = _kept_by_yarn(head_dim, theta, scaling)
        return frequency * (keep + (1 - keep) / scaling.factor)
    if scaling.kind == "proportional":
        rotated = jnp.arange(head_dim // 2) < int(scaling.proportion * head_dim // 2)
        return jnp.where(rotated, frequency / scaling.factor, 0)
    turns = scaling.original_max_positions * frequency / (2 * jnp.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return frequency * (keep + (1 - keep) / scaling.factor)


def _kept_by_yarn(head_dim: int, theta: float, scaling: RopeScaling) -> Float[Array, " half"]:
    """Returns how far each frequency stays as it is, 0 to 1."""

    def pair(turns: float) -> float:
        """Returns the pair of features, in fractions, that turns so often within the trained context."""
        wavelength = scaling.original_max_positions / (2 * math.pi * turns)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / max(high - low, 0.001)
    return 1 - jnp.clip(ramp, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Rotary position embedding by angles of ``frequency`` radians per position, times ``factor``.

    Feature ``i`` pairs with ``i + d / 2``, as in most of Hugging Face's checkpoints, ``d`` being twice the
    number of frequencies; with its neighbour, if ``interleaved``. Features of a head from ``d`` on are not
    rotated.
    """

    frequency: Float[Array, " half"]
    factor: float | Float[Array, ""] = 1.0
    interleaved: bool = False

    def __call__(self, x: Float[Array, "b t h d"], positions: Int[Array, "b t"]) -> Float[Array, "b t h d"]:
        """Rotates queries or keys."""
        cos, sin = self._of(positions[:, :, None, None])
        half = self.frequency.shape[-1]
        x1, x2, rest = jnp.split(x, [half, 2 * half], axis=-1)
        if self.interleaved:
            pairs = x[..., : 2 * half].reshape(*x.shape[:-1], half, 2)
            x1, x2 = pairs[..., 0], pairs[..., 1]
            turned = jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
            return jnp.concatenate([turned.reshape(*x.shape[:-1], 2 * half), rest], axis=-1)
        return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)

    def by_feature(self, positions: Int[Array, " b"]) -> Float[Array, "b 2 d"]:
        """Returns the rotation as two factors per feature: of the feature itself, and of its partner.

        The partner is the feature half a head away; the two products are added.
        """
        cos, sin = self._of(positions[:, None])
        return jnp.stack([jnp.concatenate(pair, axis=-1) for pair in ((cos, cos), (-sin, sin))], axis=1)

    def _of(self, positions: Array) -> tuple[Array, Array]:
        angle = positions.astype(jnp.float32) * self.frequency.reshape((1,) * (positions.ndim - 1) + (-1,))
        return jnp.cos(angle) * self.factor, jnp.sin(angle) * self.factor
