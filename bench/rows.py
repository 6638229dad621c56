"""Dense products with few rows: an LM head in float32, in XLA's bfloat16, and in `slim_jax`'s.

``python -m bench.rows [--shape 576,49152] [--rows 1,2,512] [--rounds 15]``
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import matmul


def xla(x: jax.Array, w: jax.Array) -> jax.Array:
    """Computes ``x @ w`` in the dtype of ``w``."""
    return jnp.dot(x.astype(w.dtype), w, preferred_element_type=jnp.float32)


def xla_unembed(x: jax.Array, table: jax.Array) -> jax.Array:
    """Computes ``x @ table.T`` in the dtype of ``table``."""
    return jnp.einsum("...d,vd->...v", x.astype(table.dtype), table, preferred_element_type=jnp.float32)


def milliseconds(
    candidates: dict[str, tuple[Callable[..., jax.Array], jax.Array]], x: jax.Array, rounds: int
) -> dict[str, list[float]]:
    """Least CPU time and least wall time of each, measured alternately; other load disturbs CPU time less."""
    run = {name: (jax.jit(function), w) for name, (function, w) in candidates.items()}
    taken: dict[str, list[np.ndarray]] = {name: [] for name in run}
    for i in range(rounds + 1):
        for name, (function, w) in run.items():
            start = np.array([time.process_time(), time.perf_counter()])
            function(x, w).block_until_ready()
            if i:  # the first run compiles
                taken[name].append(1e3 * (np.array([time.process_time(), time.perf_counter()]) - start))
    return {name: np.min(times, axis=0).tolist() for name, times in taken.items()}


def main() -> None:
    """Prints a line per layout and number of rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.rows", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="576,49152", help="K,N; SmolLM2's head by default")
    parser.add_argument("--rows", default="1,2,512")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    k, n = map(int, args.shape.split(","))
    w = jax.random.normal(jax.random.key(0), (k, n)).astype(jnp.bfloat16)
    layouts = {
        "[K, N]": (w, xla, matmul),
        "[N, K]": (w.T.copy(), xla_unembed, partial(matmul, transposed=True)),
    }
    print(f"{jax.devices()[0].device_kind}, K = {k}, N = {n}, {args.rounds} rounds: CPU (wall) ms, the least")
    for layout, (narrow, theirs, ours) in layouts.items():
        candidates = {
            "float32": (theirs, narrow.astype(jnp.float32)),
            "bfloat16": (theirs, narrow),
            "bfloat16, slim_jax": (ours, narrow),
        }
        for rows in map(int, args.rows.split(",")):
            x = jax.random.normal(jax.random.key(1), (rows, k))
            times = milliseconds(candidates, x, args.rounds)
            figures = ", ".join(f"{name} {cpu:.1f} ({wall:.1f})" for name, (cpu, wall) in times.items())
            print(f"{layout} M = {rows}: {figures}", flush=True)


if __name__ == "__main__":
    main()
