"""The Hessian of a linear layer's squared error, and its inverse's Cholesky factor.

For ``y = x @ W`` the error ``|x @ (W - W_hat)|^2`` averaged over tokens has, in every output
channel, the Hessian ``H = (2 / T) X^T X [K, K]``. Layers that read the same input share it.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels.layout import group_count


def gram(x: Float[Array, "t k"]) -> Float[Array, "k k"]:
    """Returns ``X^T X`` in float32.

    It is symmetric, so three products of halves suffice. ``X^T`` is copied for XLA's CPU back end,
    which multiplies a transposed bfloat16 operand at half its speed.
    """
    half = x.shape[1] // 2
    xt = jax.lax.optimization_barrier(x.T)
    dot = partial(jnp.dot, preferred_element_type=jnp.float32)
    top, last = dot(xt[:half], x), dot(xt[half:], x[:, half:])
    return jnp.concatenate([top, jnp.concatenate([top[:, half:].T, last], axis=1)])


def cross_gram(x: Float[Array, "t k"], y: Float[Array, "t n"]) -> Float[Array, "k n"]:
    """Returns ``X^T Y`` in float32; ``X^T`` is copied for the reason given in :func:`gram`."""
    return jnp.dot(jax.lax.optimization_barrier(x.T), y, preferred_element_type=jnp.float32)


def dampen(
    h: Float[Array, "k k"], damping: float | Float[Array, ""]
) -> tuple[Float[Array, "k k"], Bool[Array, " k"]]:
    """Makes a Hessian positive definite.

    Returns:
      ``H + damping * mean(diag H) * I``, and a mask of the dead inputs, those that are always zero. Dead
      inputs are left out of the mean and get ``H_jj = 1``, undamped; all other entries scale with ``H``.
    """
    diagonal = jnp.diagonal(h)
    dead = diagonal == 0
    live = jnp.maximum(jnp.sum(~dead), 1).astype(h.dtype)
    diagonal = jnp.where(dead, 1.0, diagonal + damping * (jnp.sum(diagonal) / live))
    return jnp.fill_diagonal(h, diagonal, inplace=False), dead


def inverse_cholesky(h: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """Returns the upper triangular ``U`` with ``H^-1 = U^T U``; not finite if ``H`` is not positive definite.

    Flipping rows and columns turns the lower Cholesky factor of ``H`` into ``H = R R^T`` with ``R``
    upper triangular, so that ``U = R^-1``: one factorization and one triangular solve, and the
    inverse itself is never formed.
    """
    identity = jnp.eye(h.shape[0], dtype=h.dtype)
    return jax.scipy.linalg.solve_triangular(_upper_factor(h), identity, lower=False)


def _upper_factor(h: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """Returns the upper triangular ``R`` of ``H = R R^T``."""
    return jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]


class Statistics(NamedTuple):
    """Statistics of a layer's inputs that the solver needs, ``K`` padded to whole groups.

    Attributes:
      u: ``[K, K]``, upper Cholesky factor of the inverse of the damped Hessian.
      importance: ``[K]``, ``1 / u_j^2``, 0 for padding and for inputs that are always zero.
      alive: ``[K]``, 0 for inputs that are always zero.
      h: ``[K, K]``, the Hessian, not damped.
      damped: ``[K, K]``, the damped Hessian, 0 for padding and for inputs that are always zero.
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
    """Computes the statistics from ``total``, the sum of Gram matrices over ``tokens`` tokens."""
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
    """The two :class:`Statistics` that the costs of widths need: `importance` and `alive`."""

    importance: jax.Array
    alive: jax.Array


@partial(jax.jit, static_argnames="group_size")
def importance_only(
    total: Float[Array, "k k"], tokens: Float[Array, ""], damping: Float[Array, ""], *, group_size: int
) -> Importance:
    """Computes these as :func:`statistics` does, but without the factor ``U``, since ``1 / U_jj = R_jj``."""
    k = total.shape[0]
    flat = (0, group_count(k, group_size) * group_size - k)
    damped, dead = dampen(total * (2.0 / tokens), damping)
    importance = jnp.where(dead, 0.0, jnp.diagonal(_upper_factor(damped)) ** 2)
    return Importance(jnp.pad(importance, flat), jnp.pad(1.0 - dead, flat))


def low_discrepancy(count: int) -> np.ndarray:
    """Low-discrepancy sequence (golden ratio) of ``count`` numbers in [0, 1), evenly spread over any interval
    of indices."""
    return np.modf((np.arange(count) + 1) * (np.sqrt(5.0) - 1) / 2)[0]


class Observation(NamedTuple):
    """Statistics of the calibration inputs ``x[T, K]`` of layers that share an input.

    Attributes:
      gram: ``float32[K, K]``, ``x^T x``.
      sample: ``float32[S, K]``, evenly spread inputs.
      tokens: number of inputs, ``T``.
      borrowed: number of tokens that :meth:`with_prior` added to the Gram matrix.
      input_error: ``float32[K, K]``, ``x^T (x' - x)``, where ``x'`` is the input of the layers in the
        full-precision model; None if unknown.
      residual_error: ``float32[K, N]``, ``x^T (h' - h)``, where ``h`` is the residual stream that the layers
        add to; None if they do not add to it or it is unknown.
    """

    gram: jax.Array
    sample: jax.Array
    tokens: int
    borrowed: int = 0
    input_error: jax.Array | None = None
    residual_error: jax.Array | None = None

    @property
    def share_borrowed(self) -> float:
        """Borrowed share of the tokens that the Gram matrix counts."""
        return self.borrowed / (self.tokens + self.borrowed)

    def with_prior(self, prior: "Observation") -> "Observation":
        """Fills up an expert's observation from ``prior``, that of all tokens of its block.

        The prior counts as ``K`` tokens, ``K`` the number of channels, so that its share ``K / (K + T)``
        falls with the expert's own number of tokens. With fewer than ``K`` tokens the Gram matrix does not
        have full rank, and to a solver errors in the unseen directions would cost nothing.
        """
        channels = len(self.gram)
        share = channels / (channels + self.tokens)
        gram = self.gram + (channels / prior.tokens) * prior.gram
        own = jnp.asarray(low_discrepancy(len(self.sample)) >= share)
        sample = jnp.where(own[:, None], self.sample, prior.sample)
        return Observation(gram, sample, self.tokens, channels)


@jax.jit
def corrected(
    w: Float[Array, "k n"],
    u: Float[Array, "k k"],
    input_error: Float[Array, "k k"],
    residual_error: Float[Array, "k n"] | None,
    share: Float[Array, ""],
) -> Float[Array, "k n"]:
    """Returns the weight that compensates a share of the upstream error.

    In the full-precision model a layer reads ``x'`` and outputs ``x' W``, which is added to ``h'`` if the
    layer is the last of a branch; in the quantized model it reads ``x`` and its output is added to ``h``.
    Over the calibration tokens ``|h' + x' W - (h + x V)|^2`` is least for

        V = W + H^-1 (2 / T) x^T ((x' - x) W + (h' - h)),

    so ``V`` is the weight to round. Without ``h`` this is the asymmetric calibration of GPTAQ (arXiv
    2504.02692), which here changes the target and not the solver. A damped ``H`` and a smaller share keep
    ``V`` close to ``W``.

    Args:
      w: the full-precision weight ``W``.
      u: ``U``, with ``H^-1 = U^T U``.
      input_error: ``(2 / T) x^T (x' - x)``.
      residual_error: ``(2 / T) x^T (h' - h)``; None for layers whose output is not added to the residual
        stream.
      share: from 0, which returns ``W``, to 1.
    """
    missing = input_error @ w
    missing = missing if residual_error is None else missing + residual_error
    return w + share * (u.T @ (u @ missing))


@jax.jit
def squared_errors(w: jax.Array, w_hat: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Squared error of a layer's outputs, its squared outputs, and their largest ratio in one output channel.

    The first two are ``tr(dW^T H dW)`` and ``tr(W^T H W)`` with ``dW = W - W_hat``, ``[K, N]``, however
    ``W_hat`` was found.
    """
    delta = w - w_hat
    error, total = jnp.sum(delta * (h @ delta), axis=0), jnp.sum(w * (h @ w), axis=0)
    ratio = jnp.where(total > 0, error / jnp.where(total > 0, total, 1.0), 0.0)
    return jnp.sum(error), jnp.sum(total), jnp.max(ratio)


def output_errors(name: str, sums: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Squared error of a layer's outputs over the squared outputs, and the worst output channel's ratio.

    ``sums`` are the results of :func:`squared_errors` for parts of the layer's output channels. If the
    outputs are 0, the first is the error itself.

    Raises:
      ValueError: it is NaN or infinite.
    """
    errors, totals, worst = zip(*sums)
    relative = sum(errors) / sum(totals) if sum(totals) else sum(errors)
    if not math.isfinite(relative):
        raise ValueError(f"{name} cannot be quantized: the error of its outputs is {relative}")
    return relative, max(worst)
