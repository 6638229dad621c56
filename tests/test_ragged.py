"""``mixed_ragged_dot`` compared with float64 NumPy, expert by expert, and on every back end."""

import dataclasses
import re
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from matmul_cases import random_weight, random_x
from test_layout import dequantize

from pallas_kernels import backends, mixed_ragged_dot
from pallas_kernels.layout import stack
from pallas_kernels.ragged import chunk_rows
from pallas_kernels.xla import product as xla

K, N, G = 128, 64, 32


def experts(count):
    """Packed weights of different widths, stacked, and the same weights in float64."""
    bits = [[1, 3, 2, 2], [2, 2, 2, 2], [3, 3, 1, 3], [1, 1, 1, 2], [2, 3, 3, 1]]
    made = [random_weight(K, N, G, bits[i % 5], seed=i, widths=(1, 2, 3)) for i in range(count)]
    return stack([w for w, _ in made]), [dense for _, dense in made]


def expected(x, dense, sizes):
    ends = np.cumsum(sizes)
    y = np.zeros((len(x), N))
    for weight, size, end in zip(dense, sizes, ends):
        y[end - size : end] = np.asarray(x, np.float64)[end - size : end] @ weight
    return y


product = jax.jit(mixed_ragged_dot, static_argnames="rows")


@pytest.mark.parametrize(
    "sizes", [[10, 10, 10, 10], [0, 33, 0, 7], [40, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 5, 35]]
)
@pytest.mark.parametrize("rows", [None, 4, 16])
def test_values(sizes, rows):
    w, dense = experts(4)
    x = random_x(40, K)
    found = product(x, w, jnp.asarray(sizes), rows=rows)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected(x, dense, sizes), atol=2e-4)


def test_it_is_jax_ragged_dot():
    w, _ = experts(4)
    x, sizes = random_x(40, K), jnp.asarray([3, 0, 20, 9])
    dense = jnp.stack([dequantize(one) for one in w])
    theirs = jax.lax.ragged_dot(x, dense, sizes, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(product(x, w, sizes, rows=None), theirs, atol=2e-4)
    halved = jax.eval_shape(partial(mixed_ragged_dot, preferred_element_type=jnp.bfloat16), x, w, sizes)
    assert halved.dtype == jnp.bfloat16


def test_gradient():
    w, dense = experts(3)
    x, sizes = random_x(20, K), jnp.asarray([7, 0, 9])
    dy = random_x(20, N, seed=3)
    dx = jax.jit(jax.grad(lambda x: jnp.vdot(mixed_ragged_dot(x, w, sizes, rows=4), dy)))(x)
    wanted = np.zeros((20, K))
    wanted[:7] = np.asarray(dy[:7], np.float64) @ dense[0].T
    wanted[7:16] = np.asarray(dy[7:16], np.float64) @ dense[2].T
    np.testing.assert_allclose(dx, wanted, atol=2e-4)


def test_the_gradient_is_taken_in_the_weights_dtype():
    w, _ = experts(2)
    w, sizes = w.astype(jnp.bfloat16), jnp.asarray([8, 8])
    loss = jax.grad(lambda x: jnp.sum(jnp.sin(mixed_ragged_dot(x, w, sizes))))
    text = jax.jit(loss).lower(random_x(16, K)).as_text()
    operands = re.findall(r"dot_general.*: \((.*)\) ->", text)
    assert operands
    assert all(found.count("bf16") == 2 for found in operands)


def test_export_of_a_symbolic_number_of_rows():
    w, dense = experts(2)
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, K), jnp.float32)
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    call = jax.export.export(jax.jit(mixed_ragged_dot))(x, w, sizes).call
    x, own = random_x(5, K), [2, 3]
    np.testing.assert_allclose(call(x, w, jnp.asarray(own)), expected(x, dense, own), atol=2e-4)


def test_only_turns_with_rows_are_taken(monkeypatch):
    """Twelve rows of two experts among 64, four per chunk: three chunks, in one program."""
    taken = []

    def product(x, w, residual):
        jax.debug.callback(lambda: taken.append(len(x)))
        return xla.mixed_matmul(x, w)

    monkeypatch.setitem(backends.BACKENDS, "xla", dataclasses.replace(backends.XLA, matmul=product))
    w, _ = experts(64)
    sizes = jnp.zeros(64, jnp.int32).at[jnp.asarray([5, 60])].set(jnp.asarray([8, 4]))
    mixed_ragged_dot(random_x(12, K), w, sizes, rows=4, implementation="xla").block_until_ready()
    jax.effects_barrier()
    assert taken == [4, 4, 4]


@pytest.mark.parametrize("name", ["mosaic_gpu", pytest.param("mosaic_tpu", marks=pytest.mark.slow)])
def test_kernels(name, monkeypatch):
    if name == "mosaic_gpu":
        from pallas_kernels.gpu.kernel import mixed_matmul
    else:
        from pallas_kernels.tpu.decode import mixed_matmul
    interpret = True if name == "mosaic_gpu" else pltpu.InterpretParams(uninitialized_memory="nan")

    def product(x, w, residual):
        return mixed_matmul(x, w, interpret=interpret)

    monkeypatch.setitem(backends.BACKENDS, name, dataclasses.replace(backends.XLA, name=name, matmul=product))
    bits = [[1, 3], [2, 2], [3, 3]]
    made = [random_weight(256, 128, 128, bits[i], seed=i, widths=(1, 2, 3)) for i in range(3)]
    w, sizes = stack([w for w, _ in made]), [5, 0, 6]
    x = random_x(11, 256, dtype=jnp.bfloat16)
    found = mixed_ragged_dot(x, w, jnp.asarray(sizes), rows=8, implementation=name)
    ends = np.cumsum(sizes)
    for (_, dense), size, end in zip(made, sizes, ends):
        own = np.asarray(x, np.float64)[end - size : end]
        bound = 1e-3 * np.abs(own) @ np.abs(dense)
        assert np.all(np.abs(found[end - size : end] - own @ dense) <= bound)


def test_rows_of_a_chunk():
    assert [chunk_rows(m, e) for m, e in ((1, 8), (512, 8), (4096, 8), (4096, 128))] == [32, 64, 512, 32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": "one"}, "w is no stack of experts"),
        ({"x": jnp.zeros((4, K + 1))}, r"x has shape \(4, 129\), expected \[M, 128\]"),
        ({"group_sizes": jnp.zeros(3, jnp.int32)}, r"group_sizes has shape \(3,\), expected \[2\]"),
        ({"rows": 0}, "rows is 0, expected at least 1"),
    ],
)
def test_refuses(change, message):
    w, _ = experts(2)
    given = {"x": jnp.zeros((4, K)), "w": w, "group_sizes": jnp.asarray([2, 2])} | change
    if change.get("w") == "one":
        given["w"] = w[0]
    with pytest.raises(ValueError, match=message):
        mixed_ragged_dot(**given)
