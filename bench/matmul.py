"""Packed and dense products on the current device: seconds, bytes per second, percent of the peak.

    python -m bench.matmul --shapes llama-2-7b --rows 1,16,2048
    python -m bench.matmul --check                      # values only, against float64
    python -m bench.matmul --profiler --rows 16         # time in kernels, as the profiler sees them

`bench.timing` describes how a product is timed; the range in brackets is that of the repeats. xla is the
packed product without a kernel; with many rows it dequantizes and multiplies densely. bf16 and f32 are the
plain XLA product; int4 is the plain product with 4-bit weights and a scale for each group. With
``--profiler`` each product is compiled alone, not in a loop, and time between its kernels does not count.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.check import check
from bench.check import line as checked
from bench.decode import random_packed
from bench.machine import describe_device
from bench.shapes import SHAPES
from bench.timing import Product, copies, kernel_times, prepare, rates, take_turns
from convert.errors import first_line
from pallas_kernels import mixed_matmul
from pallas_kernels.chips import product_dtype
from pallas_kernels.gpu.config import Config

PRODUCTS = ("packed", "xla", "bf16", "f32", "int4")


def products(m: int, k: int, n: int, arguments: argparse.Namespace) -> dict[str, Product]:
    """The packed product and the products it is compared with, on random data of one shape."""
    rng = np.random.default_rng(0)
    names = arguments.products.split(",")
    x = jnp.asarray(rng.normal(size=(m, k)), jnp.bfloat16)
    found: dict[str, Product] = {}

    def add(name: str, run: Callable[..., jax.Array], x: jax.Array, weight: Any, size: int) -> None:
        moved = x.nbytes + size + 4 * m * n
        found[name] = Product(jax.jit(run), x, copies(weight, m), moved, 2 * m * k * n)

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.dot(x, w, preferred_element_type=jnp.float32)

    def by_group(x: jax.Array, weight: tuple[jax.Array, jax.Array]) -> jax.Array:
        w, scale = weight
        scales = jnp.repeat(scale, arguments.group_size, axis=0)[:k]
        return plain(x, w.astype(jnp.bfloat16) * scales)

    w = random_packed((k, n), arguments.bits, arguments.group_size, rng)
    w = dataclasses.replace(w, dtype=product_dtype())
    chosen = _configured(arguments.config) if arguments.config else None
    for name, implementation in (("packed", arguments.implementation), ("xla", "xla")):
        if name in names:
            run = (
                chosen
                if chosen and name == "packed"
                else partial(mixed_matmul, implementation=implementation)
            )
            add(name, run, x, w, w.nbytes)
    dense = jnp.asarray(rng.standard_normal((k, n), np.float32))
    if "bf16" in names:
        add("bf16", plain, x, dense.astype(jnp.bfloat16), 2 * k * n)
    if "f32" in names:
        add("f32", plain, x.astype(jnp.float32), dense, 4 * k * n)
    if "int4" in names:
        scale = jnp.asarray(rng.random((-(-k // arguments.group_size), n)), jnp.bfloat16)
        int4 = jnp.clip(jnp.round(3 * dense), -8, 7).astype(jnp.int4)
        add("int4", by_group, x, (int4, scale), k * n // 2 + scale.nbytes)
    return found


def _configured(config: str) -> Callable[..., jax.Array]:
    """The GPU kernel with some fields of its configuration set, such as ``"block_n=32,split_k=4"``."""
    fields = {name: int(value) for name, _, value in (field.partition("=") for field in config.split(","))}
    return partial(mixed_matmul, implementation="mosaic_gpu", config=Config(**fields))


def profile(m: int, k: int, n: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Like :func:`row`, but with the time in kernels: their sum, their number and each kernel's."""
    found: dict[str, Any] = {"m": m, "k": k, "n": n}
    for name, product in products(m, k, n, arguments).items():
        try:
            kernels = kernel_times(product)
        except Exception as error:  # any error of a compiler or driver is this product's result
            found[name] = {"error": first_line(error)}
            continue
        found[name] = {"microseconds": sum(kernels.values()), "kernels": kernels}
    return found


def row(m: int, k: int, n: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Record of one shape and number of rows: figures of every product, or the error."""
    contestants = products(m, k, n, arguments)
    found: dict[str, Any] = {"m": m, "k": k, "n": n}
    prepared = {}
    for name, product in contestants.items():
        try:
            prepared[name] = prepare(product)
        except Exception as error:  # any error of a compiler or driver is this product's result
            found[name] = {"error": first_line(error)}
    for name, timing in take_turns(prepared, arguments.repeats, arguments.seconds or 20).items():
        try:
            found[name] = rates(contestants[name], timing)
        except ValueError as error:
            found[name] = {"error": first_line(error)}
    return found


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a :func:`row` for each shape and number of rows."""
    for k, n in SHAPES[arguments.shapes]:
        for m in map(int, arguments.rows.split(",")):
            yield (profile if arguments.profiler else row)(m, k, n, arguments)


def line(row: dict[str, Any]) -> str:
    """Formats a row of the table as text."""
    figures = [f"M {row['m']:5d}  K {row['k']:6d}  N {row['n']:6d}"]
    for name in PRODUCTS:
        if name not in row:
            continue
        found = row[name]
        if "error" in found:
            figures.append(f"{name}: {found['error']}")
            continue
        if "kernels" in found:
            longest = max(found["kernels"].values(), default=0.0)
            text = f"{name} {found['microseconds']:7.2f} us in {len(found['kernels'])} kernels"
            figures.append(f"{text}, {longest:.2f} in the longest")
            continue
        text = f"{name} {found['microseconds']:9.1f} us ({found['least']:.1f} to {found['most']:.1f})"
        text += f" {found['gb_per_s']:7.1f} GB/s"
        if "percent_of_bandwidth" in found:
            text += f" {found['percent_of_bandwidth']:4.1f} %"
        if "percent_of_matrix_peak" in found:
            text += f", {found['percent_of_matrix_peak']:4.1f} % of the matrix peak"
        figures.append(text)
    return "  ".join(figures)


def main() -> None:
    """Prints a table or, with ``--json``, one document with device, versions and settings."""
    parser = argparse.ArgumentParser(prog="python -m bench.matmul", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--rows", default="1,8,16,128,1024,4096", help="rows of x, M")
    parser.add_argument("--bits", type=int, default=2, help="mean width")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--implementation", help="xla, mosaic_gpu or mosaic_tpu; by platform without")
    parser.add_argument(
        "--config", help="of the GPU kernel, such as block_n=32,split_k=4; it chooses without"
    )
    parser.add_argument("--profiler", action="store_true", help="time in kernels instead of loops")
    parser.add_argument("--products", default="packed,bf16,f32,int4", help=f"some of {', '.join(PRODUCTS)}")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--check", action="store_true", help="values instead of speed; fails above 1 %%")
    parser.add_argument(
        "--seconds", type=float, help="after which --check begins no further case, or a row no further repeat"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    out: dict[str, Any] = {
        "device": describe_device(),
        "settings": vars(arguments),
    }
    if arguments.check:
        records = out["cases"] = []
        for record in check(implementation=arguments.implementation, seconds=arguments.seconds):
            records.append(record)
            if not arguments.json:
                print(checked(record), flush=True)
        good = sum(bool(record["ok"]) for record in records)
        print(json.dumps(out, indent=1) if arguments.json else f"{good} of {len(records)} cases are right")
        sys.exit(good < len(records))
    out["rows"] = []
    if not arguments.json:
        print(json.dumps(out["device"]))
    for found in rows(arguments):
        out["rows"].append(found)
        if not arguments.json:
            print(line(found), flush=True)
    if arguments.json:
        print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
