"""Autotuning: finds a kernel's fastest configuration on this device, for the user's table.

    python -m bench.tune --shapes llama-2-7b --rows 1,16

Candidates are tried in order of their distance from the heuristic. Each is compiled, its values are compared
with float64, and it is timed briefly; the fastest few are then timed alternately (`bench.timing`: in a loop
over weights that exceed the cache). A candidate that is wrong, not finite or does not compile cannot win. The
time is divided among the products, and each result is written as soon as it is known, so an interrupted run
loses nothing. Existing entries are kept, unless ``--again``.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.decode import random_packed
from bench.limits import Limit
from bench.shapes import SHAPES
from bench.timing import Prepared, Product, Timing, copies, prepare, take_turns
from convert.errors import first_line
from pallas_kernels import autotune, chips

FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "mosaic_gpu": {
        "block_m": (16, 32, 64, 128),
        "block_n": (32, 64, 128, 256),
        "stages": (2, 3, 4),
        "groups_per_step": (1, 2, 4),
        "split_k": (1, 2, 4),
        "split_blocks": (1, 2, 4),
    },
    "mosaic_tpu": {"strips": (8, 16, 32), "groups": (4, 8, 16), "join": (1, 2), "deep": (False, True)},
}
"""Values to try for each field; other fields keep the heuristic's value."""

TOLERANCE = 0.01  # of the largest output; rounding x to bfloat16 causes less
FINALISTS = 4
CANDIDATE_SECONDS = 240  # a candidate that takes longer hangs


def candidates(start: Any, fields: dict[str, tuple[Any, ...]]) -> Iterator[Any]:
    """Yields ``start``, then every valid combination of the fields, those that differ least first."""
    found = []
    for values in itertools.product(*fields.values()):
        try:
            config = dataclasses.replace(start, **dict(zip(fields, values)))
        except ValueError:
            continue
        if config != start:
            found.append(config)
    yield start
    yield from sorted(found, key=lambda c: sum(getattr(c, f) != getattr(start, f) for f in fields))


def relative_error(found: jax.Array, wanted: np.ndarray) -> float:
    """Largest difference over the largest expected value; infinite if a value is not finite."""
    values = np.asarray(found, np.float64)
    if values.shape != wanted.shape or not np.isfinite(values).all():
        return math.inf
    return float(np.max(np.abs(values - wanted)) / np.max(np.abs(wanted)))


@dataclasses.dataclass
class Search:
    """The candidates of one product that may win, and the reasons why others failed."""

    works: dict[Any, tuple[Prepared, Timing]] = dataclasses.field(default_factory=dict)
    failed: dict[Any, str] = dataclasses.field(default_factory=dict)

    def attempt(self, config: Any, product: Product, wanted: np.ndarray) -> None:
        """Compiles, checks and times a candidate; keeps only the compiled programs that may still win."""
        try:
            prepared = prepare(product)
            error = relative_error(prepared.y, wanted)
            if not error <= TOLERANCE:
                raise ValueError(f"values are wrong, relative error {error:.1e}")
            self.works[config] = prepared, take_turns({config: prepared}, 3)[config]
        except Exception as error:  # compilers raise anything, and the next candidate may work
            self.failed[config] = first_line(error)
            return
        for slow in sorted(self.works, key=lambda c: self.works[c][1].median)[FINALISTS:]:
            del self.works[slow]

    def best(self, repeats: int, seconds: float = math.inf) -> tuple[Any, Timing]:
        """Returns the fastest of the remaining candidates, timed alternately.

        Raises:
          ValueError: no candidate is left.
        """
        if not self.works:
            reason = next(iter(self.failed.values()), "there was no time to try one")
            raise ValueError(f"none of {len(self.failed)} configurations works on this device: {reason}")
        timings = take_turns({c: prepared for c, (prepared, _) in self.works.items()}, repeats, seconds)
        return min(timings.items(), key=lambda item: item[1].median)


def search(
    products: Iterable[tuple[Any, Product]], wanted: np.ndarray, end: float, limit: Limit | None = None
) -> Search:
    """Tries configurations until the time ``end`` (monotonic); the first is always tried."""
    found = Search()
    for i, (config, product) in enumerate(products):
        if i and time.monotonic() > end:
            break
        if limit is None:
            found.attempt(config, product, wanted)
        else:
            with limit.within(CANDIDATE_SECONDS, str(config)):
                found.attempt(config, product, wanted)
    return found


def tune(
    kernel: Any, m: int, shape: tuple[int, int], arguments: argparse.Namespace, seconds: float
) -> dict[str, Any] | None:
    """Returns the fastest configuration's fields for one product, None if none works; prints a comparison."""
    begin, limit = time.monotonic(), Limit(lambda sentence: print(f"bench.tune: {sentence}", flush=True))
    rng = np.random.default_rng(0)
    w = random_packed(shape, arguments.bits, arguments.group_size, rng)
    x = jnp.asarray(rng.normal(size=(m, shape[0])), jnp.bfloat16)
    wanted = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
    weights = copies(w, m)
    start = kernel.heuristic(chips.of_target().name, m, *shape)

    def products() -> Iterator[tuple[Any, Product]]:
        for config in candidates(start, FIELDS[kernel.NAME]):
            run = jax.jit(lambda x, w, config=config: kernel.mixed_matmul(x, w, config=config))
            moved = x.nbytes + w.nbytes + 4 * m * shape[1]
            yield config, Product(run, x, weights, moved, 2 * m * shape[0] * shape[1])

    found = search(products(), wanted, begin + 0.8 * seconds, limit)
    label = f"M {m}, K {shape[0]}, N {shape[1]}"
    for config, reason in found.failed.items():
        print(f"{label}: {config}: {reason}", flush=True)
    try:
        best, timing = found.best(arguments.repeats, 0.2 * seconds)
    except ValueError as error:
        print(f"{label}: {error}", flush=True)
        return None
    text = f"{label}: {best}, {1e6 * timing.median:.1f} us"
    text += f" ({1e6 * timing.least:.1f} to {1e6 * timing.most:.1f})"
    print(f"{text}, the heuristic's {'is the same' if best == start else start}", flush=True)
    return dataclasses.asdict(best)


def store(table: Path, name: str, key: str, fields: dict[str, Any]) -> None:
    """Adds an entry; the file is written completely and then renamed."""
    content = autotune.read_table(table)
    content.setdefault(name, {})[key] = fields
    table.parent.mkdir(parents=True, exist_ok=True)
    part = table.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    os.replace(part, table)


def main() -> None:
    """Autotunes every shape for every number of rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--rows", default="1,8,16,32", help="rows of x, M")
    parser.add_argument("--bits", type=int, default=2, help="mean width")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=55, help="for all products together")
    parser.add_argument("--again", action="store_true", help="measure what is in the user's table, too")
    arguments = parser.parse_args()
    platform = jax.default_backend()
    if platform == "gpu":
        from pallas_kernels.gpu import kernel
    elif platform == "tpu":
        from pallas_kernels.tpu import decode as kernel  # type: ignore[no-redef]
    else:
        sys.exit(f"bench.tune: JAX's platform is {platform}, expected a GPU or a TPU")
    name, kind = kernel.NAME, chips.of_target().name
    table, end = autotune.user_table(), time.monotonic() + 60 * arguments.minutes
    known = autotune.read_table(table).get(name, {})
    wanted = []
    for k, n in SHAPES[arguments.shapes]:
        for m in map(int, arguments.rows.split(",")):
            key = autotune.key(kind, m, k, n, arguments.bits, arguments.group_size)
            if key not in known or arguments.again:
                wanted.append((key, m, (k, n)))
    for i, (key, m, shape) in enumerate(wanted):
        fields = tune(kernel, m, shape, arguments, (end - time.monotonic()) / (len(wanted) - i))
        if fields is not None:
            store(table, name, key, fields)
    print(f"{len(wanted)} products; their configurations are in {table}")


if __name__ == "__main__":
    main()
