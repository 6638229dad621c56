"""SBA: gives some groups one bit more and as many one bit less, so that the average width stays.

Groups are ranked by salience. For ``p = 0, 1, ...`` the ``p`` least salient groups get ``N - 1``
bits and the ``p`` most salient ``N + 1``; the ``p`` whose outputs diverge least from the full-precision
ones wins. ``p = 0``, no mixing, is a candidate.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from slim_jax.method.scale_search import FITS
from slim_jax.method.scale_search import scale_dtype as default_scale_dtype
from slim_jax.placement import ONE_DEVICE, Placement

Allocation = dict[str, list[int]]
"""Bit width of every group, by the layer's name (``"blocks.3.attn.q"``)."""


def group_salience(
    w: Float[Array, "k n"], importance: Float[Array, " k"], group_size: int
) -> Float[Array, " groups"]:
    """Salience ``delta_ij = w_ij^2 / u_j^2`` summed over each group (paper eq. 4, as in the paper's code).

    ``importance`` is ``1 / u_j^2``, with ``u`` the diagonal of the inverse Hessian's Cholesky factor, so
    that ``delta`` is the exact error of removing column ``j`` in GPTQ's order. ``K`` must be a multiple of
    ``group_size``.
    """
    salience = jnp.sum(w * w, axis=1) * importance
    return salience.reshape(-1, group_size).sum(axis=1)


def quantized_at(
    w: Float[Array, "k n"],
    importance: Float[Array, " k"],
    bits: int | jax.Array,
    *,
    group_size: int,
    zero_bits: int,
    sqc: str,
    scale_dtype: jnp.dtype | None = None,
    placement: Placement = ONE_DEVICE,
) -> Float[Array, "k n"]:
    """Rounds every group of ``w`` to nearest at one width, on the grid that ``sqc`` fits to it.

    The scales are stored in ``scale_dtype``; `slim_jax.method.scale_search.scale_dtype` if None.
    """
    dtype = default_scale_dtype(sqc) if scale_dtype is None else scale_dtype

    def panel(whole: tuple[jax.Array, jax.Array], w: jax.Array) -> jax.Array:
        importance, bits = whole

        def group(block: tuple[jax.Array, jax.Array]) -> jax.Array:
            w_group, importance_group = block
            widths = jnp.broadcast_to(bits, w_group.shape[1:])
            grid = FITS[sqc](w_group, importance_group, widths, zero_bits, dtype)
            return grid.value(grid.code(w_group))

        blocks = w.reshape(-1, group_size, w.shape[1]), importance.reshape(-1, group_size)
        return lax.map(group, blocks).reshape(w.shape)

    return placement.over_panels(panel, (importance, jnp.float32(bits)), w)


def weighted_errors(
    w: Float[Array, "k n"],
    w_hat: Float[Array, "k n"],
    importance: Float[Array, " k"],
    group_size: int,
    placement: Placement,
) -> Float[Array, " groups"]:
    """Returns ``sum_jn (w_jn - w_hat_jn)^2 / u_j^2`` of every group; ``importance`` is ``1 / u_j^2``."""
    square = placement.gathered((w - w_hat) ** 2)
    return (jnp.sum(square, axis=1) * importance).reshape(-1, group_size).sum(axis=1)


def divergence_from(y: Float[Array, "t n"]) -> Callable[[jax.Array], jax.Array]:
    """Returns ``KL(softmax(y) || softmax(y_hat))``, a mean over tokens, as a function of ``y_hat [t, n]``."""
    p = jax.nn.softmax(y)
    constant = jnp.sum(p * y, axis=1) - jax.nn.logsumexp(y, axis=1)

    def divergence(y_hat: jax.Array) -> jax.Array:
        cross_entropy = jax.nn.logsumexp(y_hat, axis=1) - jnp.sum(p * y_hat, axis=1)
        return jnp.mean(constant + cross_entropy)

    return divergence


@jax.jit
def output_divergence(
    w: Float[Array, "k n"], w_hat: Float[Array, "k n"], x: Float[Array, "t k"]
) -> Float[Array, ""]:
    """Divergence of a quantized layer's outputs from the full-precision ones; see :func:`divergence_from`."""
    return divergence_from(x @ w)(x @ w_hat)


def paper_divergence(y: Float[Array, "t n"], y_hat: Float[Array, "t n"]) -> Float[Array, ""]:
    """Authors' score: ``KL(softmax(y_hat) || softmax(y))``, a mean over tokens, both clamped at 1e-6."""
    p = jnp.maximum(jax.nn.softmax(y_hat), 1e-6)
    q = jnp.maximum(jax.nn.softmax(y), 1e-6)
    return jnp.mean(jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=1))


@partial(
    jax.jit,
    static_argnames=("bits", "group_size", "zero_bits", "sqc", "criterion", "scale_dtype", "placement"),
)
def scores(
    w: Float[Array, "k n"],
    x: Float[Array, "t k"],
    importance: Float[Array, " k"],
    *,
    bits: int,
    group_size: int,
    zero_bits: int,
    sqc: str,
    criterion: str,
    scale_dtype: jnp.dtype | None = None,
    placement: Placement = ONE_DEVICE,
) -> tuple[Float[Array, " candidates"], Int[Array, " groups"]]:
    """Score of every candidate ``p = 0 ... (G - 1) // 2``, and the groups by ascending salience.

    From ``p`` to ``p + 1`` two groups change their width, so the outputs change by two
    ``[T, g] @ [g, N]`` products: the search costs about three dense products, not one per candidate.

    Args:
      w: weights; ``K`` a multiple of ``group_size``.
      x: calibration inputs.
      importance: ``1 / u_j^2``, 0 for padding.
      bits: the mean width ``N``.
      group_size: channels per group.
      zero_bits: bits of a stored zero point.
      sqc: the calibration that candidates are rounded with, a name of `slim_jax.method.scale_search.FITS`.
      criterion: "kl"; "paper" for the authors' variant; "error" for ``sum (w - w_hat)^2 / u^2``.
      scale_dtype: dtype of the scales that candidates are rounded with, see :func:`quantized_at`.
      placement: the chips that split the output channels.
    """
    gather = placement.gathered
    order = jnp.argsort(group_salience(gather(w), importance, group_size))
    groups = order.shape[0]
    candidates = (groups - 1) // 2 + 1
    at = partial(
        quantized_at,
        w,
        importance,
        group_size=group_size,
        zero_bits=zero_bits,
        sqc=sqc,
        scale_dtype=scale_dtype,
        placement=placement,
    )
    low, middle, high = at(bits - 1), at(bits), at(bits + 1)
    # Step p changes group `down[p]` to N - 1 bits and group `up[p]` to N + 1.
    down, up = order[: candidates - 1], order[::-1][: candidates - 1]

    if criterion == "error":
        less, error, more = (
            weighted_errors(w, w_hat, importance, group_size, placement) for w_hat in (low, middle, high)
        )
        change = (less - error)[down] + (more - error)[up]
        total = jnp.sum(error) + jnp.concatenate([jnp.zeros(1), jnp.cumsum(change)])
        return total, order

    y = gather(x @ w)
    by_group = x.reshape(x.shape[0], groups, group_size)

    def product(group: jax.Array, w_hat: jax.Array) -> jax.Array:
        change = (w_hat - middle).reshape(groups, group_size, -1)[group]
        return by_group[:, group] @ change

    score = partial(paper_divergence, y) if criterion == "paper" else divergence_from(y)

    def step(y_hat: jax.Array, change: tuple[jax.Array, jax.Array]):
        y_hat = y_hat + product(change[0], low) + product(change[1], high)
        return y_hat, score(gather(y_hat))

    start = x @ middle
    _, rest = lax.scan(step, start, (down, up))
    return jnp.concatenate([score(gather(start))[None], rest]), order


def allocate(order: np.ndarray, p: int, bits: int) -> np.ndarray:
    """Bit widths ``int[G]``: the first ``p`` of ``order`` get one bit less, the last ``p`` one more."""
    allocation = np.full(len(order), bits)
    allocation[order[:p]] -= 1
    allocation[order[len(order) - p :]] += 1
    return allocation


def save_allocation(allocation: Mapping[str, list[int]], path: Path) -> None:
    """Writes an allocation as JSON, one layer per line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(bits)}" for name, bits in allocation.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def load_allocation(path: Path) -> Allocation:
    """Reads a file that :func:`save_allocation` wrote.

    Raises:
      ValueError: the file cannot be read, or is not a JSON object of lists of integers from 1 to 8.
    """
    try:
        allocation = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the allocation {path}: {error}") from None
    if not isinstance(allocation, dict):
        raise ValueError(f"{path} holds a {type(allocation).__name__}, expected an object of layers")
    for name, bits in allocation.items():
        if not isinstance(bits, list) or not all(type(b) is int and 1 <= b <= 8 for b in bits):
            raise ValueError(f"{path}: {name} is not a list of bit widths from 1 to 8")
    return allocation
