"""Finds the fastest configuration of a kernel on the device at hand, and writes it into the tuning table.

    python -m bench.tune --shapes llama-2-7b --rows 1,16

Entries that are there already stay, unless ``--again``. Each is written as soon as it is known, so an
interrupted run loses nothing.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.decode import random_packed
from bench.matmul import Product, measure
from bench.shapes import SHAPES
from pallas_kernels import tuning

FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "mosaic_gpu": {
        "block_m": (16, 32, 64),
        "block_n": (64, 128, 256),
        "stages": (2, 3, 4),
        "groups_per_step": (1, 2, 4),
        "split_k": (1, 2, 4),
    },
    "mosaic_tpu": {"strips": (8, 16, 32), "groups": (4, 8, 16), "join": (1, 2), "deep": (False, True)},
}
"""What is tried of each field; the others keep the heuristic's value."""


def candidates(start: Any, fields: dict[str, tuple[Any, ...]]) -> Iterator[Any]:
    """``start``, then every combination of the fields that its class takes."""
    yield start
    for values in itertools.product(*fields.values()):
        try:
            config = dataclasses.replace(start, **dict(zip(fields, values)))
        except ValueError:
            continue
        if config != start:
            yield config


def fastest(products: dict[Any, Product], repeats: int) -> tuple[Any, dict[Any, float]]:
    """The configuration whose product takes least, and the seconds of all that compile."""
    works: dict[Any, Product] = {}
    for config, (run, operands, size) in products.items():
        try:
            run(*operands).block_until_ready()
        except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError):  # too large for this device
            continue
        works[config] = (run, operands, size)
    if not works:
        raise ValueError(f"none of {len(products)} configurations compiles on this device")
    seconds = measure(works, repeats)
    return min(seconds, key=lambda config: seconds[config]), seconds


def tune(kernel: Any, m: int, shape: tuple[int, int], arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of the fastest configuration of one product; prints how it compares."""
    rng = np.random.default_rng(0)
    w = random_packed(shape, arguments.bits, arguments.group_size, rng)
    x = jnp.asarray(rng.normal(size=(m, shape[0])), jnp.bfloat16)
    name = kernel.__name__.rpartition(".")[2]
    start = kernel.heuristic(jax.devices()[0].device_kind, m, *shape)
    products: dict[Any, Product] = {}
    for config in candidates(start, FIELDS[name]):
        run = jax.jit(lambda x, w, config=config: kernel.mixed_matmul(x, w, config=config))
        products[config] = (run, (x, w), 0)
    best, seconds = fastest(products, arguments.repeats)
    gain = seconds.get(start, float("nan")) / seconds[best]
    print(f"M {m}, K {shape[0]}, N {shape[1]}: {best}, {gain:.2f} x the heuristic's speed", flush=True)
    return dataclasses.asdict(best)


def store(table: Path, name: str, key: str, fields: dict[str, Any]) -> None:
    """Adds an entry; the file is written whole and then renamed."""
    content = json.loads(table.read_text())
    content.setdefault(name, {})[key] = fields
    part = table.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    os.replace(part, table)


def main() -> None:
    """Tunes every shape for every number of rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--rows", default="1,8,16,32", help="rows of x, M")
    parser.add_argument("--bits", type=int, default=2, help="mean width")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--again", action="store_true", help="measure what is in the table, too")
    arguments = parser.parse_args()
    platform = jax.default_backend()
    if platform == "gpu":
        from pallas_kernels import mosaic_gpu as kernel
    elif platform == "tpu":
        from pallas_kernels import mosaic_tpu as kernel  # type: ignore[no-redef]
    else:
        sys.exit(f"bench.tune: JAX's platform is {platform}, expected a GPU or a TPU")
    name = f"mosaic_{platform}"
    for shape in SHAPES[arguments.shapes]:
        for m in map(int, arguments.rows.split(",")):
            key = tuning.key(jax.devices()[0].device_kind, m, *shape)
            known = json.loads(tuning.TABLE.read_text()).get(name, {})
            if key not in known or arguments.again:
                store(tuning.TABLE, name, key, tune(kernel, m, shape, arguments))


if __name__ == "__main__":
    main()
