"""The record of a back end: the operations it has kernels for, and the platform they run on."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp

Kernel = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Backend:
    """Kernels of one platform, which raise ``NotImplementedError`` for operands that they do not support.

    Attributes:
      name: name of the implementation.
      platform: the only platform that its kernels run on; None for all.
      matmul: ``(x[M, K], w, residual) -> float32[M, N]``; a ``config`` may be given by name.
      prepare: ``(layers, stacked=..., feeds=..., consume=...) -> Prepared | None``, which does
        :func:`pallas_kernels.prepare_joined`; ``stacked`` if a layer is to be chosen by its number.
      most_rows: rows of ``x`` above which XLA's product with the dequantized weight is used instead, unless
        the back end is named; None for no limit.
      mlp: ``(x, w, down, residual, activation=...) -> down(act(gate(x)) * up(x)) (+ residual)``, with
        ``gate`` and ``up`` prepared as ``w`` to feed ``down``. None if there is no such kernel; likewise
        below.
      attend: ``(q, k, v, keys, values, rotation, positions, slot_positions, start, window, scale=...,
        softcap=...) -> (y, keys, values)``: attention of one new token, ``q`` and others
        ``[b, 1, heads, d]``, which joins the cache; otherwise as `pallas_kernels.gpu.attention.attend`.
      write_token: ``(keys, values, k, v, layer, start) -> (keys, values)``: writes one token's keys and
        values into a layer's slot (`pallas_kernels.tpu.cache_write.write_slot`).
    """

    name: str
    platform: str | None
    matmul: Kernel
    prepare: Kernel
    most_rows: int | None = None
    mlp: Kernel | None = None
    attend: Kernel | None = None
    write_token: Kernel | None = None


@contextmanager
def importing(name: str) -> Iterator[None]:
    """Context for importing a kernel that the installed JAX may not support.

    Raises:
      NotImplementedError: the import fails.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"{name} does not import with jax {jax.__version__}: {error}") from error


def taken(x: jax.Array) -> jax.Array:
    """``x`` in a dtype that every back end accepts: float32, unless it is bfloat16."""
    return x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


def plus(residual: jax.Array | None, y: jax.Array) -> jax.Array:
    """``y``, plus ``residual`` if there is one."""
    return y if residual is None else residual + y
