"""The Hessian of a linear layer's squared error, and its inverse's Cholesky factor.

For ``y = x @ W`` the error ``|x @ (W - W_hat)|^2`` averaged over tokens has, in every output
channel, the Hessian ``H = (2 / T) X^T X [K, K]``. Layers that read the same input share it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def gram(x: Float[Array, "*t k"]) -> Float[Array, "k k"]:
    """``X^T X`` summed over all leading axes, in float32 (inputs in bfloat16 keep their products' speed)."""
    tokens = x.reshape(-1, x.shape[-1])
    return jax.lax.dot_general(tokens, tokens, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def dampen(
    h: Float[Array, "k k"], damping: float | Float[Array, ""]
) -> tuple[Float[Array, "k k"], Bool[Array, " k"]]:
    """Makes a Hessian positive definite.

    Returns:
      ``H + damping * mean(diag H) * I``, after ``H_jj = 1`` for inputs that are always zero, and which
      inputs these are (their weights do not matter and are set to zero).
    """
    diagonal = jnp.diagonal(h)
    dead = diagonal == 0
    diagonal = jnp.where(dead, 1.0, diagonal)
    diagonal = diagonal + damping * jnp.mean(diagonal)
    return jnp.fill_diagonal(h, diagonal, inplace=False), dead


def inverse_cholesky(h: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """Upper triangular ``U`` with ``H^-1 = U^T U``; not finite where ``H`` is not positive definite.

    Flipping rows and columns turns the lower Cholesky factor of ``H`` into ``H = R R^T`` with ``R``
    upper triangular, so that ``U = R^-1``: one factorization and one triangular solve, and the
    inverse itself is never formed.
    """
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    upper = lower[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(h.shape[0], dtype=h.dtype), lower=False)
