"""The one public matmul: checks its arguments, picks a back end, and knows the gradient.

It knows nothing of how any back end works; each is a function ``(x[M, K], w) -> float32[M, N]``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import chips, meshes
from pallas_kernels.layout import MixedTensor, stack, vary_like
from pallas_kernels.prepared import Prepared, stack_consumed
from pallas_kernels.xla import product as xla
from pallas_kernels.xla.prepared import joinable, prepare_stack

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
    return _plus(residual, xla.mixed_matmul(x, w))


def _mosaic_tpu(x: jax.Array, w: Any, residual: jax.Array | None = None, **config: Any) -> jax.Array:
    with importing("mosaic_tpu"):
        from pallas_kernels.tpu.decode import mixed_matmul  # takes a second that CPUs need not spend

    return _plus(residual, mixed_matmul(x, w, **config))


def _mosaic_gpu(x: jax.Array, w: Any, residual: jax.Array | None = None, **config: Any) -> jax.Array:
    with importing("mosaic_gpu"):
        from pallas_kernels.gpu.kernel import mixed_matmul

    return mixed_matmul(x, w, residual=residual, **config)


def _plus(residual: jax.Array | None, y: jax.Array) -> jax.Array:
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
    return _chosen(_names(names))


def prepare(
    w: MixedTensor | Sequence[MixedTensor],
    *,
    implementation: str | Sequence[str] | None = None,
    consume: bool = False,
) -> MixedTensor | Prepared:
    """A packed weight made ready to be multiplied often, by a back end that gains from it; else ``w``.

    What the product would work out of ``w`` alone, each time, is worked out once. The result is for running,
    not for storing.

    Args:
      w: the packed weight; or those of several layers, alike but for the values of their leaves and the
        rows of their words. These come back stacked, on a leading axis of the leaves where the back end
        gains nothing; else choose one by ``at(layer)``, which slices nothing.
      implementation: as for :func:`mixed_matmul`.
      consume: whether words, scales and zero codes of ``w`` are deleted as they are copied, so that never two
        of all layers are in memory; not for traced code.
    """
    name, alone = _names(implementation)[0], isinstance(w, MixedTensor)
    layers: Sequence[MixedTensor] = [w] if isinstance(w, MixedTensor) else w
    if name == "xla" and _on_cpu():
        return prepare_stack([[one] for one in layers], consume=consume)
    if name == "mosaic_tpu":
        found = _layers_on_tpu([[one] for one in layers], not alone, consume)
        if found is not None:
            return found
    if name == "mosaic_gpu" and alone and (joined := _joined_on_gpu(layers)) is not None:
        return joined
    if isinstance(w, MixedTensor):
        return w
    return stack_consumed(layers) if consume else stack(layers)


def prepare_joined(
    layers: Sequence[Sequence[MixedTensor]],
    *,
    feeds: int = 0,
    implementation: str | Sequence[str] | None = None,
    consume: bool = False,
) -> Prepared | None:
    """Weights that read one input as one product whose result has theirs side by side, of stacked layers.

    Args:
      layers: of each layer, its weights; layers are alike as for :func:`prepare`.
      feeds: the group size of the one product that will take all that these give, such as an MLP's last, if
        it divides every ``N``: a back end may then make the two one (`pallas_kernels.mlp`).
      implementation: as for :func:`mixed_matmul`.
      consume: as for :func:`prepare`.

    Returns:
      What :func:`prepare` gives, or None if the back end gains nothing or the weights do not fit together.
    """
    name = _names(implementation)[0]
    if name == "mosaic_gpu" and len(layers) == 1:
        return _joined_on_gpu(layers[0], feeds)
    if name == "mosaic_tpu":
        return _layers_on_tpu(layers, len(layers) > 1, consume)
    if name != "xla" or not _on_cpu() or not joinable(layers[0]):
        return None
    return prepare_stack(layers, consume=consume)


def _on_cpu() -> bool:
    """Whether the target has loops that multiply packed words: elsewhere XLA dequantizes."""
    return chips.of_target().platform == "cpu"


def _layers_on_tpu(layers: Sequence[Sequence[MixedTensor]], stacked: bool, consume: bool) -> Prepared | None:
    try:
        with importing("mosaic_tpu"):
            from pallas_kernels.tpu import config
            from pallas_kernels.tpu.layers import joinable, prepare
    except NotImplementedError:
        return None
    supported = layers[0][0].group_size in config.GROUP_SIZES and joinable(layers[0])
    return prepare(layers, stacked=stacked, consume=consume) if supported else None


def _joined_on_gpu(weights: Sequence[MixedTensor], feeds: int = 0) -> Prepared | None:
    try:
        with importing("mosaic_gpu"):
            import pallas_kernels.gpu.kernel  # noqa: F401
            from pallas_kernels.gpu import config, joined
        config.check_supported(chips.of_target(), jnp.dtype(jnp.bfloat16), 1, weights[0].group_size, None)
    except NotImplementedError:
        return None
    return joined.join(weights, feeds=feeds) if joined.joinable(weights) else None


def mixed_matmul(
    x: Float[Array, "*batch K"],
    w: MixedTensor | Prepared,
    *,
    bias: Float[Array, "N"] | None = None,
    residual: Float[Array, "..."] | None = None,
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
    preferred_element_type: DTypeLike = jnp.float32,
) -> Float[Array, "*batch N"]:
    """``x @ w.dequantize() + bias + residual``, accumulated in float32.

    Differentiable in ``x``, ``bias`` and ``residual``, forwards and backwards; ``w`` is a constant. Off CPUs,
    or with more than a few rows of ``x``, XLA's result is that of a dense product in ``w.dtype``; else
    products are taken in float32. Gradients are products in ``w.dtype``. Operands over several devices:
    docs/kernels.md.

    Args:
      x: ``[..., K]``; rounded to float32 where it is neither that nor bfloat16.
      w: the packed weight ``[K, N]``, or what :func:`prepare` made of it; index or scan over stacked
        leaves first.
      bias: ``[N]``, added in float32.
      residual: ``[*batch, N]``, such as the residual stream that the product belongs to, added in float32; on
        NVIDIA GPUs one row of it by the kernel, where it would be a launch beside it.
      implementation: ``"xla"``, ``"mosaic_gpu"``, ``"mosaic_tpu"``, or several to try in order;
        by platform if None.
      config: how the one kernel that is named cuts the product (`pallas_kernels.gpu.config.Config`,
        `pallas_kernels.tpu.config.Config`); as was tuned for the target, or guessed, if None.
      preferred_element_type: of the result.

    Returns:
      ``[..., N]``, float32 if nothing else is preferred.

    Raises:
      ValueError: a shape does not fit, an implementation has no such name, or ``config`` is given and not
        one kernel named.
      NotImplementedError: none of the implementations asked for can do this product.
    """
    _check(x, w, bias, residual)
    x = taken(x)
    rows = math.prod(x.shape[:-1])
    names = _given(implementation)
    tries = names or tried(rows)
    if config is not None and (len(tries) != 1 or tries[0] not in PLATFORM):
        raise ValueError(f"config is for one of {list(PLATFORM)}, implementation is {implementation!r}")
    spread = meshes.spread(x, w, residual)
    if spread.explicit:
        y = meshes.per_device(_on_one, (names, config), spread.mesh, x, w, residual)
    else:
        y = _on_one(names, config, x, w, residual)
    if bias is not None:
        y = y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)
    return y.astype(preferred_element_type)


def _on_one(
    names: tuple[str, ...] | None,
    config: Any,
    x: jax.Array,
    w: MixedTensor | Prepared,
    residual: jax.Array | None,
) -> jax.Array:
    """The product of operands ``[..., K]`` and ``[..., N]`` that lie on one device, or that XLA divides."""
    rows = math.prod(x.shape[:-1])
    tries = names or tried(rows)
    if len(tries) > 1 and meshes.spread(x, w, residual).auto:  # XLA divides its own products alone
        names = tries = tuple(name for name in tries if name not in PLATFORM) or tries
    if isinstance(w, Prepared) and tries[0] not in ("xla", w.implementation):
        x = x if w.norm is None else w.norm(x)
        parts = [_on_one(names, config, x, one, None) for one in w.weights()]
        return _plus(residual, jnp.concatenate(parts, axis=-1))
    x = vary_like(x, w)  # so that the gradient sums over devices that share x and cut w
    added = residual
    if residual is not None:
        added = vary_like(residual.reshape(rows, w.shape[1]).astype(jnp.float32), (x, w))
    y = _matmul(names, config, x.reshape(rows, w.shape[0]), w, added)
    return y.reshape(*x.shape[:-1], w.shape[1])


def taken(x: jax.Array) -> jax.Array:
    """``x`` in a dtype that every back end takes: float32, unless it is bfloat16."""
    return x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


def first_tried(rows: Any) -> str:
    """What a product with so many rows of ``x`` tries first, on the target and inside what is traced."""
    return _names(None, rows)[0]


def tried(rows: Any) -> tuple[str, ...]:
    """What the target tries, in order, for so many rows of ``x`` where no implementation is named.

    A number of rows that only the program's caller will say (`jax.export.symbolic_shape`) is XLA's.
    """
    platform = chips.of_target().platform
    if not isinstance(rows, int) or rows > MOST_ROWS.get(platform, rows):
        return ("xla",)
    return BY_PLATFORM.get(platform, ("xla",))


def _names(implementation: str | Sequence[str] | None, rows: Any = 1) -> tuple[str, ...]:
    """What is tried for a product with so many rows."""
    return _given(implementation) or tried(rows)


def _given(implementation: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """What is named; None where the target and the number of rows decide."""
    if implementation is None:
        return _chosen.value  # type: ignore[no-any-return]
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or not set(names) <= set(IMPLEMENTATIONS):
        raise ValueError(
            f"implementation is {implementation!r}, expected one or more of {list(IMPLEMENTATIONS)}"
        )
    return names


def _check(
    x: jax.Array, w: MixedTensor | Prepared, bias: jax.Array | None, residual: jax.Array | None
) -> None:
    k, n = w.shape
    stacked = w.stacked and w.layer is None if isinstance(w, Prepared) else w.words.ndim != 2
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x has shape {x.shape}, expected [..., {k}] for a weight of shape {w.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}, expected a floating type")
    if stacked:
        raise ValueError(
            f"w.words has shape {w.words.shape}, expected [rows, {n}]: scan over stacked weights"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {bias.shape}, expected {(n,)} for a weight of shape {w.shape}")
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise ValueError(f"residual has shape {residual.shape}, expected {(*x.shape[:-1], n)}")


Operands = tuple[jax.Array, MixedTensor | Prepared, jax.Array | None]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _matmul(
    names: tuple[str, ...] | None,
    config: Any,
    x: jax.Array,
    w: MixedTensor | Prepared,
    residual: jax.Array | None,
) -> jax.Array:
    """``x[M, K] @ w (+ residual)`` by the first back end that can on the platform: of those named, or of what
    the target tries for so many rows."""
    tries = names or tried(x.shape[0])
    if tries == ("xla",) and not xla.is_decode(x.shape[0]):
        return _first_that_can(tries, config, x, w, residual)
    product = jax.custom_batching.custom_vmap(partial(_first_that_can, tries, config))
    product.def_vmap(partial(_batched, names, config))
    return product(x, w, residual)  # type: ignore[no-any-return]


def _first_that_can(
    names: tuple[str, ...],
    config: Any,
    x: jax.Array,
    w: MixedTensor | Prepared,
    residual: jax.Array | None,
) -> jax.Array:
    name, rest = names[0], names[1:]
    run = IMPLEMENTATIONS[name] if config is None else partial(IMPLEMENTATIONS[name], config=config)
    if not rest:
        return run(x, w, residual)
    try:
        if name not in PLATFORM:
            return run(x, w, residual)
        kernel = {PLATFORM[name]: run}
        return lax.platform_dependent(x, w, residual, default=partial(_first_that_can, rest, None), **kernel)
    except NotImplementedError:
        return _first_that_can(rest, None, x, w, residual)


def _batched(
    names: tuple[str, ...] | None,
    config: Any,
    size: int,
    batched: Any,
    x: jax.Array,
    w: MixedTensor | Prepared,
    residual: jax.Array | None,
) -> tuple[jax.Array, bool]:
    """The product of ``size`` batches: their rows are those of one, or several weights take turns."""
    product = partial(_matmul, names, config)
    if any(jax.tree.leaves(batched[1])):
        operands, structure = jax.tree.flatten((x, w, residual))
        several = jax.tree.leaves(tuple(batched))

        def one(own: list[jax.Array]) -> jax.Array:
            turn = iter(own)
            leaves = [next(turn) if b else a for a, b in zip(operands, several)]
            return product(*jax.tree.unflatten(structure, leaves))

        return lax.map(one, [a for a, b in zip(operands, several) if b]), True
    if not batched[0]:
        return _plus(residual, product(x, w, None)[None]), True
    if residual is not None:
        residual = jnp.broadcast_to(residual, (*x.shape[:2], w.shape[1])).reshape(-1, w.shape[1])
    y = product(x.reshape(-1, x.shape[2]), w, residual)
    return y.reshape(*x.shape[:2], -1), True


@_matmul.defjvp
def _tangent(
    names: tuple[str, ...] | None, config: Any, primals: Operands, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    x, w, residual = primals
    if isinstance(w, Prepared) and w.norm is not None:
        raise NotImplementedError("a product with a norm in it has no gradient: it is for generating")
    moves = linear(tangents[0], lax.stop_gradient(w))
    return _matmul(names, config, x, w, residual), _plus(tangents[2], moves)


@jax.checkpoint  # or the dense weight would be kept for the way back
def linear(x: jax.Array, w: MixedTensor | Prepared) -> jax.Array:
    """``x @ w`` of tangents, and of gradients its transpose, in the weight's dtype both."""
    dense = w.dequantize()
    # A result in float32 would bring float32 gradients to a weight in bfloat16, which XLA would convert.
    dtype = dense.dtype if dense.dtype == jnp.bfloat16 else jnp.float32
    return jnp.dot(x.astype(dense.dtype), dense, preferred_element_type=dtype).astype(jnp.float32)
