"""The GPU's decode attention kernel (one new token) in the interpreter, and the model's choice of it."""

import dataclasses
import importlib.util
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas

from bench.fused import Attention
from pallas_kernels import chips
from pallas_kernels.gpu import attention
from slim_jax.model.cache import Int8Rows, KeyValues
from slim_jax.model.rotary import Rotation, frequencies

CASES = [
    Attention(4, 4, 16, 192, 150, parts=1),
    Attention(4, 4, 16, 192, 150, parts=8, dtype="float32"),  # most parts have no block
    Attention(
        6, 2, 32, 100, 99, batch=2, padding=30, parts=2, dtype="float32"
    ),  # slots that no block divides
    Attention(2, 1, 64, 128, 64, window=20, parts=2, dtype="float32"),  # alone in its block and part
    Attention(40, 2, 16, 64, 40, softcap=5.0, parts=1, dtype="float32"),  # more than 16 queries per KV head
    Attention(4, 2, 16, 128, 0, batch=3, parts=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_what_is_written(case):
    record = case.compare(interpret=True)
    assert record["ok"], record
    if case.dtype == "float32":
        assert record["error"] < 1e-5


def test_a_token_that_is_padding_gives_numbers():
    token, keys = jnp.ones((1, 6 * 16)), jnp.ones((1, 2, 64, 16))
    at = (jnp.full(1, -1), jnp.full((1, 64), -1), jnp.int32(5), jnp.int32(9))
    scores = attention.Scores(1.0)
    y, *_ = attention.attend(token, None, keys, keys, *at, scores=scores, parts=1, interpret=True)
    assert np.isfinite(np.asarray(y)).all()


def test_parts_fill_the_chip_and_no_more():
    h100 = chips.describe("h100")
    assert [attention.parts_of(h100, heads, 4096) for heads in (1, 8, 32, 64, 256)] == [8, 8, 4, 2, 1]
    assert attention.parts_of(h100, 8, 128) == 2  # as many as there are blocks of slots


@pytest.mark.parametrize(
    ("device", "width", "dtype", "wanted"),
    [
        ("h100", 128, "bfloat16", True),
        ("l4", 64, "float32", True),
        ("h100", 96, "bfloat16", False),
        ("h100", 512, "bfloat16", False),
        ("h100", 128, "float16", False),
        ("t4", 128, "bfloat16", False),
        ("mi300x", 128, "bfloat16", False),
        ("v6e", 128, "bfloat16", False),
    ],
)
def test_what_is_supported(device, width, dtype, wanted):
    assert attention.supported(chips.describe(device), width, jnp.dtype(dtype)) == wanted


@pytest.mark.parametrize("left", [(), ("CompilerParams", "load", "dot")], ids=["nothing", "some"])
def test_without_what_the_kernel_stands_on(left, monkeypatch, kernel):
    """JAX has announced the removal of Pallas's lowering to Triton; XLA then computes attention."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr(pallas, "triton")
    spec = importlib.util.spec_from_file_location("attend_again", attention.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    spec.loader.exec_module(again)
    assert again.triton is None
    monkeypatch.setattr(attention, "triton", SimpleNamespace(**dict.fromkeys(left)) if left else again.triton)
    assert not attention.supported(chips.describe("h100"), 16, jnp.dtype("float32"))
    q, k, cache = jnp.ones((2, 1, 4, 16)), jnp.ones((2, 1, 2, 16)), random_cache(np.random.default_rng(0))
    attend(q, k, k, jnp.full((2, 1), 66), cache)
    assert kernel == []


def attend(q, k, v, positions, cache, *, one_device=True, rotation=None, window=None, softcap=None):
    cache = dataclasses.replace(cache, one_device=one_device)
    how = {"rotation": rotation, "window": window, "softcap": softcap}
    return cache.attend(q, k, v, positions, scale=0.25, **how)


def random_cache(rng, dtype="float32") -> KeyValues:
    shape = (2, 2, 70, 16)
    keys, values = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    places = jnp.where(jnp.arange(70) <= 66, jnp.arange(70), -1)
    return KeyValues(keys, values, jnp.stack([places, places]), jnp.int32(66))


@pytest.fixture
def kernel(monkeypatch):
    """Makes this machine run what an H100 would; yields the list of calls."""
    calls = []

    def interpreted(*arrays, **how):
        calls.append(how)
        return run(*arrays, **how, interpret=True)

    run = attention.attend
    monkeypatch.setattr(attention, "attend", interpreted)
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
    with chips.target("h100"):
        yield calls


ROTATION = Rotation(frequencies(16, 1e4), 1.1)


@pytest.mark.parametrize(
    "how",
    [{}, {"window": 20}, {"window": jnp.int32(30), "softcap": 4.0}, {"rotation": ROTATION}],
    ids=["", "window", "softcap", "rotation"],
)
def test_the_model_gives_the_same_by_one_device(kernel, how):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 1, 4, 16)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 1, 2, 16)), jnp.float32) for _ in range(2))
    positions, cache = jnp.full((2, 1), 66), random_cache(rng)
    run = partial(attend, q, k, v, positions, cache, **how)
    (found, after), (wanted, plain) = run(one_device=True), run(one_device=False)
    assert len(kernel) == 1
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for own, other in zip(jax.tree.leaves(after), jax.tree.leaves(plain)):
        np.testing.assert_allclose(own, other, atol=1e-6 if "rotation" in how else 0)


def test_what_the_kernel_does_not_know_xla_takes(kernel):
    rng = np.random.default_rng(0)
    q, k = jnp.ones((2, 2, 4, 16)), jnp.ones((2, 2, 2, 16))
    positions = jnp.asarray([[65, 66]] * 2)
    several, one = random_cache(rng), random_cache(rng)
    int8 = KeyValues(Int8Rows.of(one.keys), Int8Rows.of(one.values), one.positions, one.start)
    attend(q, k, k, positions, several)
    attend(q[:, :1], k[:, :1], k[:, :1], positions[:, 1:], int8)
    assert kernel == []
