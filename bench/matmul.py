"""Packed and dense products on the current device: seconds, bytes per second, percent of the peak.

    python -m bench matmul --shapes llama-2-7b --rows 1,16,2048
    python -m bench matmul --profiler --rows 16         # time in kernels, as the profiler sees them
    python -m bench matmul --rows 1 --products packed --config block_n=32,split_k=4 --config block_n=64

`bench.timing` describes how a product is timed: the median of the repeats, and their range. xla is the packed
product without a kernel; with many rows it dequantizes and multiplies densely. bf16 and f32 are the plain XLA
product; int4 is the plain product with 4-bit weights and a scale for each group. With ``--profiler`` each
product is compiled alone, not in a loop, and time between its kernels does not count. `bench.check` compares
values.
"""

import argparse
import dataclasses
import importlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.machine import describe_device
from bench.models import SHAPES, random_packed
from bench.results import Record, Results
from bench.timing import Product, copies, kernel_times, prepare, rates, take_turns
from convert.errors import first_line
from pallas_kernels import chips, mixed_matmul
from pallas_kernels.chips import product_dtype

PRODUCTS = ("packed", "xla", "bf16", "f32", "int4")


def products(m: int, k: int, n: int, arguments: argparse.Namespace) -> dict[str, Product]:
    """The packed product and the products it is compared with, on random data of one shape."""
    rng, names = np.random.default_rng(0), arguments.products.split(",")
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
    packed = {"packed": partial(mixed_matmul, implementation=arguments.implementation)}
    packed |= {f"packed {config}": _configured(config) for config in arguments.config}
    packed |= {"xla": partial(mixed_matmul, implementation="xla")}
    for name, run in packed.items():
        if name.split()[0] in names:
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
    """The target's kernel with some fields of its configuration set."""
    name = "mosaic_tpu" if chips.of_target().platform == "tpu" else "mosaic_gpu"
    made = importlib.import_module(f"pallas_kernels.{name.removeprefix('mosaic_')}.config").Config
    fields = {field: int(value) for field, value in (text.split("=") for text in config.split(","))}
    return partial(mixed_matmul, implementation=name, config=made(**fields))


def measure(m: int, k: int, n: int, arguments: argparse.Namespace) -> list[Record]:
    """Returns a record of each product of one shape and number of rows: its figures, or the error."""
    contestants = products(m, k, n, arguments)
    found: dict[str, Record] = {}
    prepared = {}
    for name, product in contestants.items():
        try:
            if arguments.profiler:
                kernels = kernel_times(product)
                longest = max(kernels.values(), default=0.0)
                found[name] = {"microseconds": sum(kernels.values()), "longest": longest, "kernels": kernels}
            else:
                prepared[name] = prepare(product)
        except Exception as error:  # any error of a compiler or driver is this product's result
            found[name] = {"error": first_line(error)}
    for name, timing in take_turns(prepared, arguments.repeats, arguments.seconds).items():
        try:
            found[name] = rates(contestants[name], timing)
        except ValueError as error:
            found[name] = {"error": first_line(error)}
    return [{"m": m, "k": k, "n": n, "product": name, **found[name]} for name in contestants]


def options(parser: argparse.ArgumentParser, given: Sequence[str]) -> argparse.Namespace:
    """Adds the options to the parser, and parses what is given."""
    parser.add_argument("--shapes", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--rows", default="1,8,16,128,1024,4096", help="rows of x, M")
    parser.add_argument("--bits", type=int, default=2, help="mean width")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--implementation", help="xla, mosaic_gpu or mosaic_tpu; by platform without")
    parser.add_argument(
        "--config", action="append", default=[], help="one more packed product by the kernel; may be repeated"
    )
    parser.add_argument("--profiler", action="store_true", help="time in kernels instead of loops")
    parser.add_argument("--products", default="packed,bf16,f32,int4", help=f"some of {', '.join(PRODUCTS)}")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=20, help="after which a row has no further repeat")
    return parser.parse_args(given)


def main(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Shows a row for each product, shape and number of rows."""
    arguments = options(parser, given)
    sizes = itertools.product(SHAPES[arguments.shapes], map(int, arguments.rows.split(",")))
    records = (record for (k, n), m in sizes for record in measure(m, k, n, arguments))
    Results(arguments.json, device=describe_device(), settings=vars(arguments)).show("rows", records)
