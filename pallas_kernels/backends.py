"""The back ends of a product, and the choice among them by name, by the target's platform and by rows.

Each back end is a function ``(x[M, K], w, residual) -> float32[M, N]``, which raises ``NotImplementedError``
for products that it does not support.
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
    """Context for importing a kernel that the installed JAX may not support.

    Raises:
      NotImplementedError: the import fails.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"{name} does not import with jax {jax.__version__}: {error}") from error


def _xla(x: jax.Array, w: MixedTensor | Prepared, residual: jax.Array | None = None) -> jax.Array:
    return plus(residual, xla.mixed_matmul(x, w))


def _mosaic_tpu(x: jax.Array, w: Any, residual: jax.Array | None = None, **config: Any) -> jax.Array:
    with importing("mosaic_tpu"):
        from pallas_kernels.tpu.decode import mixed_matmul  # takes a second; CPUs do not need it

    return plus(residual, mixed_matmul(x, w, **config))


def _mosaic_gpu(x: jax.Array, w: Any, residual: jax.Array | None = None, **config: Any) -> jax.Array:
    with importing("mosaic_gpu"):
        from pallas_kernels.gpu.kernel import mixed_matmul

    return mixed_matmul(x, w, residual=residual, **config)


def plus(residual: jax.Array | None, y: jax.Array) -> jax.Array:
    """``y``, plus ``residual`` if there is one."""
    return y if residual is None else residual + y


IMPLEMENTATIONS: dict[str, Kernel] = {
    "xla": _xla,
    "mosaic_gpu": _mosaic_gpu,
    "mosaic_tpu": _mosaic_tpu,
}

PLATFORM = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu"}
"""Platform of each implementation that does not run everywhere."""

BY_PLATFORM = {"tpu": ("mosaic_tpu", "xla"), "cuda": ("mosaic_gpu", "xla")}
"""Implementations to try, in order, for a target (:func:`pallas_kernels.chips.of_target`) of each platform;
XLA on all others."""

MOST_ROWS = {"cuda": 128}
"""Rows of ``x`` above which a platform uses XLA's product with the dequantized weight instead; measured on an
H200 (docs/devices.md)."""

_chosen = jax.make_user_context(None)  # part of jit's cache key


def use_implementation(*names: str) -> AbstractContextManager[None]:
    """Makes products traced inside the context, in whole models too, try these implementations by default.

    For comparing implementations, and for programs that are compiled ahead of time without a target
    (:func:`pallas_kernels.chips.target`). A jitted function is traced again for other names.
    """
    return _chosen(names_for(names))


def first_tried(rows: Any) -> str:
    """Name of the implementation that a product with ``rows`` rows of ``x`` tries first, in this context."""
    return names_for(None, rows)[0]


def tried(rows: Any) -> tuple[str, ...]:
    """Implementations that the target tries, in order, for ``rows`` rows of ``x`` if none is named.

    A symbolic number of rows (`jax.export.symbolic_shape`) is left to XLA.
    """
    platform = chips.of_target().platform
    if not isinstance(rows, int) or rows > MOST_ROWS.get(platform, rows):
        return ("xla",)
    return BY_PLATFORM.get(platform, ("xla",))


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
    if not names or not set(names) <= set(IMPLEMENTATIONS):
        raise ValueError(
            f"implementation is {implementation!r}, expected one or more of {list(IMPLEMENTATIONS)}"
        )
    return names
