"""Timing of products on the current device.

*On a GPU or a TPU* a product takes microseconds, and calling it from Python takes more. So whole programs are
timed: a loop over products with several weights, each of which waits for the previous one, and the same loop
three times as long. The difference, divided by the number of products in it, is the time of one product,
including everything around it (reordering ``x``, a scalar that passes ``y`` on to the next ``x``). The
weights are copies of one, together larger than the GPU's last-level cache, so that each is read from memory.

*On a CPU* single calls are timed. In both cases the products are measured alternately, and the median counts.
"""

import dataclasses
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.results import Record
from pallas_kernels import chips

CACHES = 3  # with random replacement, a cache still holds 6 % of data three times its size
MOST_WEIGHTS = 48
FEW_ROWS = 32
LOOP_SECONDS = 4e-3
LONGER = 2
UNKNOWN_CACHE = 64 << 20
LEAST_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Product:
    """A product to be timed.

    Attributes:
      run: ``(x, weight) -> y``, jitted; ``y`` is ``[M, N]``.
      x: ``[M, K]``.
      weights: one or more of one kind, for which ``run`` compiles once; their values do not matter.
      bytes: the least number of bytes that one product must read and write.
      flops: floating-point operations of one product.
    """

    run: Callable[[jax.Array, Any], jax.Array]
    x: jax.Array
    weights: tuple[Any, ...]
    bytes: int
    flops: int


def on_accelerator() -> bool:
    """True if the default device is not the CPU."""
    return jax.default_backend() != "cpu"


def copies(weight: Any, rows: int) -> tuple[Any, ...]:
    """Enough copies of a weight that a chain over them reads memory: one on a CPU, few with many rows."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    count = 1
    if on_accelerator():
        count = 4  # no last-level cache, or reading weights takes little of the time
        if jax.default_backend() == "gpu" and rows <= FEW_ROWS:
            known = chips.of_target().l2_bytes
            count = min(MOST_WEIGHTS, max(2, math.ceil(CACHES * (known or UNKNOWN_CACHE) / size)))
    return (weight, *(jax.tree.map(jnp.copy, weight) for _ in range(count - 1)))


def _chain(
    run: Callable[[jax.Array, Any], jax.Array], weights: tuple[Any, ...], zero: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns ``x`` and the last ``y`` after one product per weight, each waiting for the previous."""
    first = x
    for weight in weights:
        # The barrier keeps compilers from computing only the one element that is used; they cannot know that
        # zero is 0.
        y = lax.optimization_barrier(run(x, weight))
        bump = (y[0, 0] * zero).astype(x.dtype)
        # Few rows: the addition fuses with whatever reads x. Many rows: one element is updated in place, so
        # that x is not rewritten.
        few = x.shape[0] <= FEW_ROWS
        x = first + bump if few else lax.dynamic_update_slice(x, x[:1, :1] + bump, (0, 0))
    return x, y


def _turns(product: Product) -> int:
    """Number of passes over the weights in the shorter loop, for some milliseconds at peak speed."""
    device = chips.of_target()
    by_bytes = product.bytes / (device.bandwidth or 1e12)
    by_flops = product.flops / (device.bfloat16_flops or 1e14)
    floor = max(by_bytes, by_flops, 1e-6) * len(product.weights)
    return max(2, min(256, round(LOOP_SECONDS / floor)))


class Prepared(NamedTuple):
    """A compiled product: its output ``[M, N]``, and a function that times it once more."""

    y: jax.Array
    sample: Callable[[], float]


def prepare(product: Product, *, loop: bool | None = None) -> Prepared:
    """Compiles and warms up, as a loop or (``loop=False``) as a call; None decides by platform.

    Raises any exception of the compiler or the device.
    """
    if not (on_accelerator() if loop is None else loop):
        x, weight = product.x, product.weights[0]
        y = product.run(x, weight).block_until_ready()
        for _ in range(2):
            product.run(x, weight).block_until_ready()
        return Prepared(y, lambda: _host_seconds(product.run, x, weight))
    turns = _turns(product)

    @jax.jit
    def loop_of(times: jax.Array, x: jax.Array, weights: tuple[Any, ...], zero: jax.Array) -> jax.Array:
        def chain(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return _chain(product.run, weights, zero, carry[0])

        # One program serves both lengths, because a kernel may take seconds to compile. On a GPU the host
        # reads the outer loop's condition, so nearly all iterations are in the inner loop, whose number of
        # iterations is static.
        def inner(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return lax.fori_loop(0, turns, chain, carry)

        y = jax.eval_shape(product.run, x, weights[0])
        return lax.fori_loop(0, times, inner, (x, jnp.zeros(y.shape, y.dtype)))[1]

    arguments = (product.x, product.weights, jnp.float32(0))
    short, long = jnp.int32(1), jnp.int32(1 + LONGER)
    y = loop_of(short, *arguments).block_until_ready()
    loop_of(long, *arguments).block_until_ready()

    def sample() -> float:
        difference = _host_seconds(loop_of, long, *arguments) - _host_seconds(loop_of, short, *arguments)
        return difference / (LONGER * turns * len(product.weights))

    return Prepared(y, sample)


def _host_seconds(run: Callable[..., jax.Array], *arguments: Any) -> float:
    start = time.perf_counter()
    run(*arguments).block_until_ready()
    return time.perf_counter() - start


def take_turns[K: Hashable](
    prepared: Mapping[K, Prepared], repeats: int, seconds: float = math.inf
) -> dict[K, list[float]]:
    """Seconds of each product, timed alternately, until the time is up but at least three times."""
    taken: dict[K, list[float]] = {name: [] for name in prepared}
    end = time.monotonic() + seconds
    for i in range(repeats):
        if i >= LEAST_REPEATS and time.monotonic() > end:
            break
        for name, one in prepared.items():
            taken[name].append(one.sample())
    return taken


def rates(product: Product, seconds: Sequence[float]) -> Record:
    """Returns the median time in microseconds, its range, and what it is of bandwidth and matrix peak.

    Raises:
      ValueError: the median is not positive.
    """
    device, median = chips.of_target(), float(np.median(seconds))
    if median <= 0:
        raise ValueError(
            f"the longer loop took {1e6 * median:.1f} us a product less than the shorter one: "
            "the device is not at rest"
        )
    row = {"microseconds": 1e6 * median, "least": 1e6 * min(seconds), "most": 1e6 * max(seconds)}
    row |= {"repeats": len(seconds), "weights": len(product.weights)}
    row |= {"gb_per_s": product.bytes / median / 1e9, "teraflops": product.flops / median / 1e12}
    if device.bandwidth is not None:
        row["percent_of_bandwidth"] = 100e9 * row["gb_per_s"] / device.bandwidth
    if device.bfloat16_flops is not None:
        row["percent_of_matrix_peak"] = 100e12 * row["teraflops"] / device.bfloat16_flops
    return row


def kernel_times(product: Product) -> dict[str, float]:
    """Microseconds of one product by kernel, from the profiler; empty where it sees no kernels.

    Time between kernels is not included: the sum is less than the time that :func:`prepare` measures.
    """
    product.run(product.x, product.weights[0]).block_until_ready()

    def run() -> None:
        for weight in product.weights:
            product.run(product.x, weight).block_until_ready()

    return {name: us / len(product.weights) for name, (us, _) in profiled(run).items()}


def profiled(run: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Microseconds and launches of every kernel while ``run`` runs, longest first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(files[0])).planes if files else ()
        taken: Counter[str] = Counter()
        launches: Counter[str] = Counter()
        for line in (line for plane in planes if plane.name.startswith("/device:") for line in plane.lines):
            if (line.name or "").startswith(("Stream", "XLA Ops")):
                for event in line.events:
                    taken[event.name] += event.duration_ns
                    launches[event.name] += 1
    return {name: (ns / 1e3, launches[name]) for name, ns in taken.most_common()}
