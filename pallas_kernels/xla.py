"""The matmul in plain XLA: correct on every platform, and the reference for the others."""

import jax
import jax.numpy as jnp

from pallas_kernels.layout import MixedTensor


def mixed_matmul(x: jax.Array, w: MixedTensor) -> jax.Array:
    """``x[..., K] @ w[K, N]`` -> float32 ``[..., N]``."""
    return jnp.dot(x.astype(w.dtype), w.dequantize(), preferred_element_type=jnp.float32)
