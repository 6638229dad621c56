"""The back ends, and the choice among them by name, by the target's platform and by rows."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
from jax import lax

from pallas_kernels import chips, meshes
from pallas_kernels.backend import Backend
from pallas_kernels.gpu.backend import BACKEND as GPU
from pallas_kernels.tpu.backend import BACKEND as TPU
from pallas_kernels.xla.backend import BACKEND as XLA

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (XLA, GPU, TPU)}

_chosen = jax.make_user_context(None)  # part of jit's cache key


def use_implementation(*names: str) -> AbstractContextManager[None]:
    """Makes products traced inside the context, in whole models too, try these implementations by default.

    For comparing implementations, and for programs that are compiled ahead of time without a target
    (:func:`pallas_kernels.chips.target`). A jitted function is traced again for other names.
    """
    return _chosen(names_for(names))


def tried(rows: Any) -> tuple[str, ...]:
    """Implementations that the target tries, in order, for ``rows`` rows of ``x`` if none is named.

    Those for the target's platform come first, then XLA. A symbolic number of rows
    (`jax.export.symbolic_shape`) is left to XLA.
    """
    platform = chips.of_target().platform

    def own(backend: Backend) -> bool:
        return backend.platform == platform and isinstance(rows, int) and rows <= (backend.most_rows or rows)

    return (*(name for name, backend in BACKENDS.items() if own(backend)), XLA.name)


def names_for(implementation: str | Sequence[str] | None, rows: Any = 1) -> tuple[str, ...]:
    """Names of the implementations that a product with ``rows`` rows of ``x`` tries, in order."""
    return given(implementation) or tried(rows)


def given(implementation: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """The names that the caller or the context gives; None if the target and the number of rows decide.

    Raises:
      ValueError: an implementation does not exist, or none is named.
    """
    if implementation is None:
        return _chosen.value  # type: ignore[no-any-return]
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or not set(names) <= set(BACKENDS):
        raise ValueError(f"implementation is {implementation!r}, expected one or more of {list(BACKENDS)}")
    return names


def by_kernel(
    operation: str,
    otherwise: Callable[..., Any],
    *operands: Any,
    implementation: str | Sequence[str] | None = None,
    **static: Any,
) -> Any:
    """Computes an operation by the kernel of the preferred back end, or else by ``otherwise(*operands)``.

    Args:
      operation: the field of :class:`~pallas_kernels.backend.Backend` that holds the kernel.
      otherwise: computes the same where that back end has no kernel, or none for these operands: on another
        platform, of another shape, or over several devices.
      operands: arrays, or trees of them.
      implementation: as for :func:`mixed_matmul`; only the first is tried.
      static: arguments of the kernel alone.
    """
    backend = BACKENDS[names_for(implementation)[0]]
    kernel = getattr(backend, operation)
    if kernel is None or meshes.spread(operands).several:
        return otherwise(*operands)
    return first_that_can([(backend.platform, partial(kernel, **static)), (None, otherwise)], *operands)


def first_that_can(kernels: Sequence[tuple[str | None, Callable[..., Any]]], *operands: Any) -> Any:
    """Runs the first kernel that supports the operands, on its platform; on others, those that follow.

    ``kernels`` are pairs of a platform, None for all, and a function that may raise ``NotImplementedError``.
    """
    (platform, run), *rest = kernels
    if not rest:
        return run(*operands)
    otherwise = partial(first_that_can, rest)
    try:
        if platform is None:
            return run(*operands)
        return lax.platform_dependent(*operands, default=otherwise, **{platform: run})
    except NotImplementedError:
        return otherwise(*operands)
