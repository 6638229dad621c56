"""The back ends of a product, and which of them is tried: by name, by the target's platform, by rows.

Each is a function ``(x[M, K], w, residual) -> float32[M, N]``; what it cannot serve it refuses with
``NotImplementedError``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax

from pallas_kernels import chips
from pallas_kernels.layout import MixedTensor
from pallas_kernels.prepared import Prepared
from pallas_kernels.xla import product as xla

Kernel = Callable[..., jax.Array]


@contextmanager
def importing(name: str) -> Iterator[None]:
    """Imports of a kernel that JAX may have no longer.

    Raises:
      NotImplementedError: it has not.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"{name} does not import with jax {jax.__version__}: {error}") from error


def _xla(x: jax.Array, w: MixedTensor | Prepared, residual: jax.Array | None = None) -> jax.Array:
    return plus(residual, xla.mixed_matmul(x, w))


def _mosaic_tpu(x: jax.Array, w: Any, residual: jax.Array | None = None, **config: Any) -> jax.Array:
    with importing("mosaic_tpu"):
        from pallas_kernels.tpu.decode import mixed_matmul  # takes a second that CPUs need not spend

    return plus(residual, mixed_matmul(x, w, **config))


def _mosaic_gpu(x: jax.Array, w: Any, residual: jax.Array | None = None, **config: Any) -> jax.Array:
    with importing("mosaic_gpu"):
        from pallas_kernels.gpu.kernel import mixed_matmul

    return mixed_matmul(x, w, residual=residual, **config)


def plus(residual: jax.Array | None, y: jax.Array) -> jax.Array:
    """``y``, and ``residual`` where there is one."""
    return y if residual is None else residual + y


IMPLEMENTATIONS: dict[str, Kernel] = {
    "xla": _xla,
    "mosaic_gpu": _mosaic_gpu,
    "mosaic_tpu": _mosaic_tpu,
}

PLATFORM = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}
"""Where an implementation runs that does not run everywhere."""

BY_PLATFORM = {"tpu": ("mosaic_tpu", "xla"), "cuda": ("mosaic_gpu", "xla")}
"""What is tried, in order, for a target of each platform (:func:`pallas_kernels.chips.of_target`); XLA on
all others."""

MOST_ROWS = {"cuda": 128}
"""Rows of ``x`` above which a platform takes XLA's product with the dequantized weight instead: measured on
an H200 (docs/kernels.md)."""

_chosen = jax.make_user_context(None)  # part of what jit keeps programs by


def use_implementation(*names: str) -> AbstractContextManager[None]:
    """Products traced inside, of whole models too, try these implementations where none is named.

    To compare implementations, and for a program that is compiled ahead of time where no target is set
    (:func:`pallas_kernels.chips.target`). A jitted function is traced again for other names.
    """
    return _chosen(names_for(names))


def first_tried(rows: Any) -> str:
    """What a product with so many rows of ``x`` tries first, on the target and inside what is traced."""
    return names_for(None, rows)[0]


def tried(rows: Any) -> tuple[str, ...]:
    """What the target tries, in order, for so many rows of ``x`` where no implementation is named.

    A number of rows that only the program's caller will say (`jax.export.symbolic_shape`) is XLA's.
    """
    platform = chips.of_target().platform
    if not isinstance(rows, int) or rows > MOST_ROWS.get(platform, rows):
        return ("xla",)
    return BY_PLATFORM.get(platform, ("xla",))


def names_for(implementation: str | Sequence[str] | None, rows: Any = 1) -> tuple[str, ...]:
    """Names of what is tried, in order, for a product with so many rows."""
    return given(implementation) or tried(rows)


def given(implementation: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """The names that the caller or the context gives; None where target and number of rows decide.

    Raises:
      ValueError: an implementation has no such name.
    """
    if implementation is None:
        return _chosen.value  # type: ignore[no-any-return]
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or not set(names) <= set(IMPLEMENTATIONS):
        raise ValueError(
            f"implementation is {implementation!r}, expected one or more of {list(IMPLEMENTATIONS)}"
        )
    return names
