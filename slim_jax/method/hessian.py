"""The Hessian of a linear layer's squared error, and its inverse's Cholesky factor.

For ``y = x @ W`` the error ``|x @ (W - W_hat)|^2`` averaged over tokens has, in every output
channel, the Hessian ``H = (2 / T) X^T X [K, K]``. Layers that read the same input share it.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels.layout import group_count


def gram(x: Float[Array, "t k"]) -> Float[Array, "k k"]:
    """``X^T X`` in float32.

    In three products of halves, since it is symmetric. The copy of ``X^T`` is for XLA's CPU back end,
    which multiplies a transposed bfloat16 operand at half its speed.
    """
    half = x.shape[1] // 2
    xt = jax.lax.optimization_barrier(x.T)
    dot = partial(jnp.dot, preferred_element_type=jnp.float32)
    top, last = dot(xt[:half], x), dot(xt[half:], x[:, half:])
    return jnp.concatenate([top, jnp.concatenate([top[:, half:].T, last], axis=1)])


def cross_gram(x: Float[Array, "t k"], y: Float[Array, "t n"]) -> Float[Array, "k n"]:
    """``X^T Y`` in float32; the copy is for what :func:`gram` has it."""
    return jnp.dot(jax.lax.optimization_barrier(x.T), y, preferred_element_type=jnp.float32)


def dampen(
    h: Float[Array, "k k"], damping: float | Float[Array, ""]
) -> tuple[Float[Array, "k k"], Bool[Array, " k"]]:
    """Makes a Hessian positive definite.

    Returns:
      ``H + damping * mean(diag H) * I``, and which inputs are dead, always zero. These have no part in the
      mean and get ``H_jj = 1``, undamped: what comes of the others scales with the inputs.
    """
    diagonal = jnp.diagonal(h)
    dead = diagonal == 0
    live = jnp.maximum(jnp.sum(~dead), 1).astype(h.dtype)
    diagonal = jnp.where(dead, 1.0, diagonal + damping * (jnp.sum(diagonal) / live))
    return jnp.fill_diagonal(h, diagonal, inplace=False), dead


def inverse_cholesky(h: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """Upper triangular ``U`` with ``H^-1 = U^T U``; not finite where ``H`` is not positive definite.

    Flipping rows and columns turns the lower Cholesky factor of ``H`` into ``H = R R^T`` with ``R``
    upper triangular, so that ``U = R^-1``: one factorization and one triangular solve, and the
    inverse itself is never formed.
    """
    identity = jnp.eye(h.shape[0], dtype=h.dtype)
    return jax.scipy.linalg.solve_triangular(_upper_factor(h), identity, lower=False)


def _upper_factor(h: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """``R`` of ``H = R R^T``, upper triangular."""
    return jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]


class Statistics(NamedTuple):
    """What the solver needs to know of a layer's inputs, ``K`` padded to whole groups.

    Attributes:
      u: ``[K, K]``, upper Cholesky factor of the inverse of the damped Hessian.
      importance: ``[K]``, ``1 / u_j^2``, 0 for padding and for inputs that are always zero.
      alive: ``[K]``, 0 for inputs that are always zero.
      h: ``[K, K]``, the Hessian, not damped.
      damped: ``[K, K]``, damped, 0 for padding and for inputs that are always zero.
    """

    u: jax.Array
    importance: jax.Array
    alive: jax.Array
    h: jax.Array
    damped: jax.Array


@partial(jax.jit, static_argnames="group_size")
def statistics(
    total: Float[Array, "k k"], tokens: Float[Array, ""], damping: Float[Array, ""], *, group_size: int
) -> Statistics:
    """Statistics from a sum of Gram matrices over ``tokens`` tokens."""
    k = total.shape[0]
    padding = group_count(k, group_size) * group_size - k
    h = total * (2.0 / tokens)
    damped, dead = dampen(h, damping)
    u = inverse_cholesky(damped)
    importance = jnp.where(dead, 0.0, 1.0 / jnp.diagonal(u) ** 2)
    tail = (jnp.arange(k + padding) >= k).astype(jnp.float32)
    square, flat = ((0, padding), (0, padding)), (0, padding)
    return Statistics(
        u=jnp.pad(u, square) + jnp.diag(tail),
        importance=jnp.pad(importance, flat),
        alive=jnp.pad(1.0 - dead, flat),
        h=jnp.pad(h, square),
        damped=jnp.pad(damped - jnp.diag(dead.astype(h.dtype)), square),
    )


class Importance(NamedTuple):
    """Of :class:`Statistics` what prices widths: `importance` and `alive`."""

    importance: jax.Array
    alive: jax.Array


@partial(jax.jit, static_argnames="group_size")
def importance_only(
    total: Float[Array, "k k"], tokens: Float[Array, ""], damping: Float[Array, ""], *, group_size: int
) -> Importance:
    """As :func:`statistics`, without the inverse's factor ``U``: ``1 / U_jj`` is ``R_jj``."""
    k = total.shape[0]
    flat = (0, group_count(k, group_size) * group_size - k)
    damped, dead = dampen(total * (2.0 / tokens), damping)
    importance = jnp.where(dead, 0.0, jnp.diagonal(_upper_factor(damped)) ** 2)
    return Importance(jnp.pad(importance, flat), jnp.pad(1.0 - dead, flat))


def spread(count: int) -> np.ndarray:
    """Numbers in [0, 1) for indices up to ``count``, any run of which is spread evenly (golden ratio)."""
    return np.modf((np.arange(count) + 1) * (np.sqrt(5.0) - 1) / 2)[0]


class Observation(NamedTuple):
    """What the calibration inputs ``x[T, K]`` of a group of layers leave behind.

    Attributes:
      gram: ``float32[K, K]``, ``x^T x``.
      sample: ``float32[S, K]``, evenly spread inputs.
      tokens: how many inputs there were, ``T``.
      borrowed: how many more the Gram matrix counts, from :meth:`with_prior`.
      drift: ``float32[K, K]``, ``x^T (x' - x)``, where ``x'`` is what the layers read in the full-precision
        model; None where that is not known.
      shortfall: ``float32[K, N]``, ``x^T (h' - h)``, of the residual stream that they add to; None where
        they do not, or that is not known.
    """

    gram: jax.Array
    sample: jax.Array
    tokens: int
    borrowed: int = 0
    drift: jax.Array | None = None
    shortfall: jax.Array | None = None

    @property
    def share_borrowed(self) -> float:
        """Of the tokens that the Gram matrix counts."""
        return self.borrowed / (self.tokens + self.borrowed)

    def with_prior(self, prior: "Observation") -> "Observation":
        """What an expert's few tokens leave open is filled from what all tokens of its block would give.

        As many of the prior's tokens as there are channels ``K`` count beside its own, so that the prior's
        share ``K / (K + T)`` falls with the number of tokens. Below ``K`` tokens the Gram matrix has no
        full rank, and a solver would take the directions that it has not seen for free.
        """
        channels = len(self.gram)
        share = channels / (channels + self.tokens)
        gram = self.gram + (channels / prior.tokens) * prior.gram
        own = jnp.asarray(spread(len(self.sample)) >= share)
        sample = jnp.where(own[:, None], self.sample, prior.sample)
        return Observation(gram, sample, self.tokens, channels)


@jax.jit
def corrected(
    w: Float[Array, "k n"],
    u: Float[Array, "k k"],
    drift: Float[Array, "k k"],
    shortfall: Float[Array, "k n"] | None,
    share: Float[Array, ""],
) -> Float[Array, "k n"]:
    """The weight that makes up for a share of what the layers before have lost.

    In the full-precision model a layer reads ``x'`` and gives ``x' W``, which is added to ``h'`` if it is the
    last of a branch; in the quantized model it reads ``x`` and its result is added to ``h``. Over the
    calibration tokens ``|h' + x' W - (h + x V)|^2`` is least for

        V = W + H^-1 (2 / T) x^T ((x' - x) W + (h' - h)),

    so that is what should be rounded. Without ``h`` it is the asymmetric calibration of GPTAQ (arXiv
    2504.02692), here by way of the target and not of the solver. A damped ``H`` and a smaller share keep
    near ``W``.

    Args:
      w: the full-precision weight ``W``.
      u: ``H^-1 = U^T U``.
      drift: ``(2 / T) x^T (x' - x)``.
      shortfall: ``(2 / T) x^T (h' - h)``; None for layers whose result is not added to the residual stream.
      share: from 0, which leaves ``W``, to 1.
    """
    missing = drift @ w
    missing = missing if shortfall is None else missing + shortfall
    return w + share * (u.T @ (u @ missing))
