"""The product with a weight of any kind."""

from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.api import mixed_matmul
from pallas_kernels.layout import MixedTensor
from pallas_kernels.sharding import sharded_matmul
from pallas_kernels.xla.dense import dense_matmul


def matmul(x: Float[Array, "*batch K"], w: Any, *, transposed: bool = False) -> Float[Array, "*batch N"]:
    """``x @ w``, accumulated in float32, with a weight that is dense, packed or prepared.

    Args:
      x: ``[..., K]``.
      w: an array ``[K, N]``, multiplied in its own dtype; a `MixedTensor`, which may lie over a mesh
        (:func:`~pallas_kernels.sharded_matmul`); or the result of :func:`~pallas_kernels.prepare`.
      transposed: if True, ``w`` is an array ``[N, K]``.

    Returns:
      float32 ``[..., N]``.
    """
    if isinstance(w, jax.Array):
        return dense_matmul(x, w, transposed=transposed)
    if isinstance(w, MixedTensor) and w.mesh is not None:
        return sharded_matmul(x, w, w.mesh)
    return mixed_matmul(x, w)
