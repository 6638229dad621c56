"""Values of the packed product against float64, in the shapes and configurations of real products.

    python -m bench check --seconds 120

Exit status 1: a value is wrong or missing, or there was no time for a case.
"""

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.machine import describe_device
from bench.models import random_packed
from bench.results import Record, Results
from convert.errors import first_line
from pallas_kernels import InputNorm, MixedTensor, chips, mixed_matmul, prepare_joined

TOLERANCE = 0.01
"""Largest error, relative to the largest output.

Rounding x or weights to bfloat16 causes about 0.001; leaving out one of 86 groups causes about 0.1.
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A product ``[m, k] @ [k, n]`` with a random weight of ``bits`` bits on average.

    Attributes:
      split_k: forces the GPU kernel's number of K-slices; None lets every kernel choose.
      joined: if True, the product follows a norm and is joined, where that gains, with a second product of
        the same weight with its columns rotated by half.
    """

    k: int
    n: int
    bits: int
    group_size: int
    m: int
    split_k: int | None = None
    joined: bool = False

    @property
    def weight(self) -> tuple[int, int, int, int]:
        """Key that cases with the same weight share."""
        return self.k, self.n, self.bits, self.group_size


def _cases() -> Iterator[Case]:
    for k, n in ((4096, 4096), (11008, 4096), (4096, 1024), (11008, 1024)):
        for m in (1, 8, 16, 33, 64):
            for split_k in (None, 1, 2, 4):
                yield Case(k, n, 2, 128, m, split_k)
        yield Case(k, n, 2, 128, 2048)
        for m in (1, 16, 64):
            yield Case(k, n, 2, 128, m, joined=True)
        for m in (1, 16, 2048):
            yield Case(k, n, 3, 128, m)
    for m in (1, 16):  # a vocabulary of indivisible size, over an odd number of groups
        yield Case(576, 4099, 4, 64, m)
    # Every group size; an odd number of groups, a short last one, and columns that fill no tile.
    for bits, group_size, m in itertools.product((2, 3, 4), (32, 64, 128), (1, 3, 16, 17, 128)):
        yield Case(5 * group_size + 32, 200, bits, group_size, m)


NORM_EPS = 1e-5
SHARING = 3  # cases that share a reference in a process
PATIENCE_SECONDS = 120.0  # longest wait for a process's next record
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"

CASES = tuple(_cases())


def check(
    cases: Sequence[Case] = CASES, *, implementation: str | None = None, seconds: float | None = None
) -> Iterator[Record]:
    """Compares products with float64; cases that share a weight should be adjacent, to share its reference.

    Args:
      cases: cases with a forced ``split_k`` are left out where the GPU kernel does not run.
      implementation: xla, mosaic_gpu or mosaic_tpu; None for the platform's.
      seconds: no further case begins after this time.

    Yields:
      The fields of the case, and ``ok``: True if all values are finite and correct, None if there was no time
      for the case; ``error``: the largest error relative to the largest output, None if there is no value or
      one is not finite; ``reason``: one line, if the case is not ok; ``seconds``: its duration, including
      compilation.
    """
    on_gpu = chips.of_target().platform == "cuda" and implementation in (None, "mosaic_gpu")
    start = time.monotonic()
    known = [case for case in cases if case.split_k is None or on_gpu]
    for _, sharing in itertools.groupby(known, lambda case: case.weight):
        shared = list(sharing)
        reference = None
        for case in shared:
            record = dataclasses.asdict(case) | {"ok": None, "error": None, "reason": None, "seconds": 0.0}
            begin = time.monotonic()
            if seconds is not None and begin - start >= seconds:
                yield record | {"reason": f"not run: {seconds:.0f} s are over"}
                continue
            reference = reference or _Reference(case, max(other.m for other in shared))
            yield record | reference.compare(case, implementation) | {"seconds": time.monotonic() - begin}


def check_in_processes(cases: Sequence[Case], processes: int) -> Iterator[Record]:
    """Runs :func:`check` in several processes, because on a GPU most of a case is compilation.

    Records are yielded as they arrive. Closing the generator drops the cases that have not begun.
    """
    context = multiprocessing.get_context("spawn")
    todo: Any = context.Queue()
    done: Any = context.Queue()
    for _, sharing in itertools.groupby(cases, lambda case: case.weight):
        for few in itertools.batched(sharing, SHARING):
            todo.put(few)
    before = os.environ.get(PREALLOCATE)
    os.environ[PREALLOCATE] = "false"  # JAX in this process already holds its part of the device's memory
    workers = [context.Process(target=_work, args=(todo, done), daemon=True) for _ in range(processes)]
    try:
        for worker in workers:
            worker.start()
        for _ in cases:
            yield done.get(timeout=PATIENCE_SECONDS)
    finally:
        for worker in workers:
            worker.terminate()
        os.environ.pop(PREALLOCATE)
        if before is not None:
            os.environ[PREALLOCATE] = before


def _work(todo: Any, done: Any) -> None:
    """Worker process: runs cases until there are none left."""
    while True:
        try:
            cases = todo.get(timeout=1)
        except queue.Empty:
            return
        for record in check(cases):
            done.put(record)


def verdict(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> Record:
    """Returns ``ok``, ``error`` (relative to the largest wanted value) and ``reason``, one line if not ok."""
    if not (finite := np.isfinite(found)).all():
        reason = f"{np.size(finite) - np.sum(finite)} of {np.size(finite)} values are not finite"
        return {"ok": False, "error": None, "reason": reason}
    worst = float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))
    reason = None if worst <= tolerance else f"relative error {worst:.1e}, expected at most {tolerance}"
    return {"ok": reason is None, "error": worst, "reason": reason}


class _Reference:
    """A random weight, rows of x of which a case takes the first ``m``, and their exact product."""

    def __init__(self, case: Case, rows: int) -> None:
        rng = np.random.default_rng(case.k + case.bits)
        self.w: MixedTensor = random_packed((case.k, case.n), case.bits, case.group_size, rng)
        self.x = jnp.asarray(rng.normal(size=(rows, case.k)), jnp.bfloat16)
        dense = jax.jit(MixedTensor.dequantize)(self.w)
        self.y = np.asarray(self.x, np.float64) @ np.asarray(dense, np.float64)

    def compare(self, case: Case, implementation: str | None) -> Record:
        """Returns ``ok``, ``error`` and ``reason`` of a case."""
        wanted = self.y[: case.m]
        if case.joined:
            wanted = np.concatenate([wanted, np.roll(wanted, case.n // 2, axis=1)], axis=1)
            wide = np.asarray(self.x[: case.m], np.float64)
            wanted = wanted / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + NORM_EPS)
        try:
            found = np.asarray(jax.jit(_product(case, implementation))(self.x[: case.m], self.w), np.float64)
        except Exception as error:  # any error of a compiler or driver is this case's result
            return {"ok": False, "error": None, "reason": first_line(error)[:300]}
        return verdict(found, wanted, TOLERANCE)


def _product(case: Case, implementation: str | None) -> Callable[[jax.Array, MixedTensor], jax.Array]:
    if case.joined:
        return partial(_joined, implementation=implementation)
    if case.split_k is None:
        return lambda x, w: mixed_matmul(x, w, implementation=implementation)
    from pallas_kernels.gpu import kernel  # imported here because it takes a second
    from pallas_kernels.gpu.config import fitted

    config = kernel.Config(block_n=128 // case.split_k, stages=2, split_k=case.split_k)
    config = fitted(config, chips.of_target(), case.group_size)
    return lambda x, w: kernel.mixed_matmul(x, w, config=config)


def _joined(x: jax.Array, w: MixedTensor, implementation: str | None) -> jax.Array:
    moved = {name: jnp.roll(getattr(w, name), w.shape[1] // 2, axis=1) for name in ("words", "scale", "zero")}
    weights = [w, dataclasses.replace(w, **moved)]
    norm = InputNorm(jnp.ones(w.shape[0]), NORM_EPS)
    both = prepare_joined([weights], implementation=implementation)
    product = partial(mixed_matmul, implementation=implementation)
    if both is None:
        return jnp.concatenate([product(norm(x), one) for one in weights], axis=1)
    behind = both.behind(norm)
    return product(norm(x), both) if behind is None else product(x, behind)


def main(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Shows a row for each case."""
    parser.add_argument("--implementation", help="xla, mosaic_gpu or mosaic_tpu; by platform without")
    parser.add_argument("--seconds", type=float, help="after which no further case begins")
    arguments = parser.parse_args(given)
    records = check(implementation=arguments.implementation, seconds=arguments.seconds)
    results = Results(arguments.json, device=describe_device(), settings=vars(arguments))
    found = results.show("cases", records)
    good = sum(bool(record["ok"]) for record in found)
    print(f"{good} of {len(found)} cases are right")
    sys.exit(good < len(found))
