"""Packed against dense products on the device at hand: seconds, bytes per second, percent of the peak.

    python -m bench.matmul --shapes llama-2-7b --rows 1,16,2048
    python -m bench.matmul --check                      # values only, against float64

Every product is compiled, warmed up, and taken many times in turns with the others; the median counts.
bf16 and f32 are the plain XLA product; int4 is that with 4-bit weights and a scale for each group.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.check import check, line
from bench.decode import random_packed
from bench.shapes import SHAPES
from pallas_kernels import devices, mixed_matmul

Product = tuple[Callable[..., jax.Array], tuple[Any, ...], int]
"""A jitted product, its arguments, and the bytes that it must read and write at least."""


def products(m: int, k: int, n: int, arguments: argparse.Namespace) -> dict[str, Product]:
    """The packed product and its competitors on random data of one shape."""
    rng = np.random.default_rng(0)
    w = random_packed((k, n), arguments.bits, arguments.group_size, rng)
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    implementation = arguments.implementation
    packed = jax.jit(lambda x, w: mixed_matmul(x, w, implementation=implementation))
    dense = jnp.asarray(rng.normal(size=(k, n)), jnp.bfloat16)
    x32, dense32 = x.astype(jnp.float32), dense.astype(jnp.float32)
    int4 = jnp.asarray(rng.integers(-8, 8, (k, n)), jnp.int4)
    scale = jnp.asarray(rng.random((-(-k // arguments.group_size), n)), jnp.bfloat16)

    @jax.jit
    def by_group(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
        scales = jnp.repeat(scale, arguments.group_size, axis=0)[:k]
        return jnp.dot(x, w.astype(jnp.bfloat16) * scales, preferred_element_type=jnp.float32)

    plain = jax.jit(lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32))
    activations = x.nbytes + 4 * m * n
    return {
        "packed": (packed, (x, w), activations + w.nbytes),
        "bf16": (plain, (x, dense), activations + dense.nbytes),
        "f32": (plain, (x32, dense32), 4 * (m * k + k * n + m * n)),
        "int4": (by_group, (x, int4, scale), activations + k * n // 2 + scale.nbytes),
    }


def measure(products: dict[str, Product], repeats: int) -> dict[str, float]:
    """Median seconds of each, taking turns after a warm-up."""
    for run, operands, _ in products.values():
        for _ in range(3):
            run(*operands).block_until_ready()
    taken: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(repeats):
        for name, (run, operands, _) in products.items():
            start = time.perf_counter()
            run(*operands).block_until_ready()
            taken[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds)) for name, seconds in taken.items()}


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One record a shape and number of rows; printed as they come."""
    peak = devices.of_target().bandwidth
    out = []
    for k, n in SHAPES[arguments.shapes]:
        for m in map(int, arguments.rows.split(",")):
            contestants = products(m, k, n, arguments)
            seconds = measure(contestants, arguments.repeats)
            row: dict[str, Any] = {"m": m, "k": k, "n": n}
            for name, (_, _, size) in contestants.items():
                row[name] = {"microseconds": 1e6 * seconds[name], "gb_per_s": size / seconds[name] / 1e9}
                if peak is not None:
                    row[name]["percent_of_peak"] = 100 * size / seconds[name] / peak
            out.append(row)
            if not arguments.json:
                figures = "  ".join(
                    f"{name} {row[name]['microseconds']:10.1f} us {row[name]['gb_per_s']:8.1f} GB/s"
                    for name in contestants
                )
                print(f"M {m:5d}  K {k:6d}  N {n:6d}  {figures}", flush=True)
    return out


def main() -> None:
    """Prints a table or, with ``--json``, one document with device, versions and settings."""
    parser = argparse.ArgumentParser(prog="python -m bench.matmul", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--rows", default="1,8,16,128,1024,4096", help="rows of x, M")
    parser.add_argument("--bits", type=int, default=2, help="mean width")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--implementation", help="xla, mosaic_gpu or mosaic_tpu; by platform without")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--check", action="store_true", help="values instead of speed; fails above 1 %%")
    parser.add_argument("--seconds", type=float, help="after which --check begins no further case")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    out: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "settings": vars(arguments),
    }
    if arguments.check:
        records = out["cases"] = []
        for record in check(implementation=arguments.implementation, seconds=arguments.seconds):
            records.append(record)
            if not arguments.json:
                print(line(record), flush=True)
        good = sum(bool(record["ok"]) for record in records)
        print(json.dumps(out, indent=1) if arguments.json else f"{good} of {len(records)} cases are right")
        sys.exit(good < len(records))
    out["rows"] = rows(arguments)
    if arguments.json:
        print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
