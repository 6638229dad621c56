"""An MLP of prepared weights as one function, for back ends that fuse its products."""

import math
from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array, Float

from pallas_kernels import meshes
from pallas_kernels.api import taken
from pallas_kernels.backends import first_tried, importing
from pallas_kernels.prepared import Prepared


def few_launches(
    x: Float[Array, "*batch K"], w: Prepared, down: Prepared, activation: str
) -> Callable[[jax.Array, jax.Array | None], jax.Array] | None:
    """Returns an MLP of few rows on NVIDIA GPUs as one function, with a float32 result ``[..., N]``.

    The function is ``(x, residual) -> down(act(gate(x)) * up(x)) (+ residual)``.

    Args:
      x: an input like those that the function will be called with.
      w: gate and up, prepared to feed ``down`` (`prepare_joined`).
      down: the last product.
      activation: "silu" or "gelu_tanh".

    Returns:
      None if the products must be computed one by one: on other targets, for more than 16 rows, for other
        activations, shapes or weights.
    """
    rows = math.prod(x.shape[:-1])
    if first_tried(rows) != "mosaic_gpu" or meshes.spread(x, w, down).several:
        return None
    try:
        with importing("mosaic_gpu"):
            from pallas_kernels.gpu import gated
            from pallas_kernels.gpu.joined import Joined
    except NotImplementedError:
        return None
    if not isinstance(w, Joined) or not isinstance(down, Joined):
        return None
    plan = gated.plan(rows, taken(x).dtype, w, down, activation)
    if plan is None:
        return None
    run = partial(gated.mlp, activation=activation, plan=plan)

    def all_rows(x: jax.Array, residual: jax.Array | None) -> jax.Array:
        added = None if residual is None else residual.reshape(rows, -1)
        y = run(taken(x).reshape(rows, -1), w, down, added)
        return y.reshape(*x.shape[:-1], down.shape[1])

    return all_rows
