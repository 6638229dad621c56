"""The GPU's fused MLP in the interpreter: its values, and the rows and settings for which it is chosen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from matmul_cases import MOSAIC_GPU, random_weight, random_x, slow
from test_matmul_gpu import QUICK

from bench.fused import EXACT, MLP
from pallas_kernels import InputNorm, by_kernel, chips, mixed_matmul, prepare, prepare_joined
from pallas_kernels.gpu import gated, joined
from pallas_kernels.gpu.config import Config

pytestmark = pytest.mark.skipif(not MOSAIC_GPU, reason="this version of JAX cannot build the GPU kernel")


def rounded(a: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64)


def weights(k: int, inner: int, n: int, g: int):
    """Gate, up and down, packed and in float64, each with its own widths and order."""
    bits = [2, 3, 4] * (k // 32), [2, 2, 3] * (k // 32), [1, 2, 3] * (inner // g)
    shapes = zip(((k, inner, 32), (k, inner, 32), (inner, n, g)), bits)
    made = [
        random_weight(*shape, own[: -(-shape[0] // shape[2])], seed)
        for seed, (shape, own) in enumerate(shapes)
    ]
    return [w for w, _ in made], [dense for _, dense in made]


@pytest.mark.parametrize(
    ("m", "g", "splits", "activation", "normed"),
    [
        (1, 64, (2, 1), "silu", True),
        slow(3, 128, (1, 2), "gelu_tanh", False),
        slow(16, 32, (4, 4), "silu", True),
        slow(1, 128, (4, 1), "silu", False),
    ],
)
def test_values(m, g, splits, activation, normed):
    k, inner, n = 8 * 32, 6 * g if g > 32 else 18 * g, 64
    (gate, up, down), dense = weights(k, inner, n, g)
    x, residual = random_x(m, k) * 3, random_x(m, n, seed=5)
    norm = InputNorm(1 + random_x(k, seed=3) / 4, 1e-5)
    w, last = joined.join([gate, up], feeds=g), joined.join([down])
    entry, exit_ = (Config(block_n=32, stages=2, groups_per_step=1, split_k=split) for split in splits)
    plan = gated.Plan(entry, exit_)
    run = partial(gated.mlp, activation=activation, plan=plan, interpret=True)
    run = jax.jit(run, compiler_options=QUICK)
    found = run(x, w.behind(norm) if normed else w, last, residual)

    wide, factor = np.asarray(x, np.float64), 1.0
    if normed:
        factor = 1 / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + norm.eps)
        wide = np.asarray(x * norm.scale[None])
    first, second = (rounded(wide) * factor @ own for own in dense[:2])
    hidden = rounded(EXACT[activation](first) * second)
    error = np.abs(np.asarray(found - residual, np.float64) - hidden @ dense[2])
    # An input of down near the midpoint of two bfloat16 may be rounded the other way.
    assert np.max(error / (np.abs(hidden) @ np.abs(dense[2]))) < 5e-4


def test_what_a_device_is_asked():
    record = MLP(2, 256, 256, 64, 64).compare(interpret=True)
    assert record["ok"], record


def test_gate_and_up_are_still_what_they_were():
    """The joined weight still serves products with more rows, in any implementation."""
    (gate, up, _), dense = weights(128, 256, 32, 64)
    w, both = joined.join([gate, up], feeds=64), np.concatenate(dense[:2], axis=1)
    np.testing.assert_array_equal(w.dequantize(), np.float32(both))
    x = random_x(20, 128, dtype=jnp.bfloat16)
    run = partial(mixed_matmul, implementation="xla")
    np.testing.assert_allclose(run(x, w), run(x, joined.join([gate, up])), rtol=1e-6)
    y = jnp.arange(2 * 512.0).reshape(2, 512)
    stored = np.asarray(y).reshape(2, -1, 64)[..., joined.channels_of_slots(64)].reshape(2, 512)
    np.testing.assert_array_equal(w.in_order(jnp.asarray(stored)), y)


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes this machine run what an H100 would."""
    run = gated.mlp
    monkeypatch.setattr(gated, "mlp", partial(run, interpret=True))
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
    with chips.target("h100"):
        yield


@pytest.mark.slow
def test_the_rows_that_it_takes(on_gpu):
    (gate, up, down), dense = weights(128, 256, 32, 64)
    w, last = prepare_joined([[gate, up]], feeds=64), prepare(down)
    x = random_x(1, 2, 128)
    run = partial(by_kernel, "mlp", lambda *operands: None)  # None where XLA would compute it
    hidden = EXACT["silu"](np.asarray(x) @ dense[0]) * (np.asarray(x) @ dense[1])
    wanted = hidden @ dense[2]
    found = np.asarray(run(x, w, last, None, activation="silu"))
    error = np.max(np.abs(found - wanted)) / np.max(np.abs(wanted))
    assert error < 0.02
    assert run(random_x(1, 17, 128), w, last, None, activation="silu") is None
    assert run(x, w, last, None, activation="relu") is None
    assert run(x, prepare_joined([[gate, up]]), last, None, activation="silu") is None
    with chips.target("v6e"):
        assert run(x, w, last, None, activation="silu") is None
