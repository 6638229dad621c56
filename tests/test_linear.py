"""The dtype of products, and products of one row in bfloat16."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import MixedTensor, chips, matmul
from pallas_kernels.chips import Device
from slim_jax import SlimConfig, quantize
from slim_jax.calibrate import embeddings
from slim_jax.method import layer
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import split_params
from slim_jax.store import checkpoint, manifest

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=40,  # shapes that no other test compiles
    hidden_size=48,
    intermediate_size=80,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=24,
    max_positions=16,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "expected"), [("cpu", "float32"), ("cuda", "bfloat16"), ("tpu", "bfloat16")]
)
def test_a_model_in_memory_equals_the_same_model_loaded(platform, expected, tmp_path, monkeypatch):
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 40, (2, 8))
    target = Device(name="a target", platform=platform)
    with chips.target(target):
        dtype = chips.product_dtype()
    assert dtype == expected
    # Patch only where weights are made: kernels for other back ends would not run here.
    for module in (layer, embeddings, manifest):
        monkeypatch.setattr(module, "product_dtype", lambda: dtype)
    memory, _ = quantize(model, tokens, SlimConfig(bits=2, group_size=32, method="rtn"))
    checkpoint.save(memory, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    for here, there in zip(*map(every_parameter, (memory, loaded)), strict=True):
        assert here.dtype == there.dtype
        if isinstance(here, MixedTensor):
            assert here.dtype.name == expected
            here, there = (
                dataclasses.replace(w, dtype=jnp.dtype("float32")).dequantize() for w in (here, there)
            )
        np.testing.assert_array_equal(here, there)


def every_parameter(model: Decoder) -> list[jax.Array | MixedTensor]:
    outer, blocks = split_params(model)
    return [params[name] for params in (outer, *blocks) for name in sorted(params)]


def bfloat16(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)


transposed = partial(matmul, transposed=True)


@pytest.mark.parametrize("k", [5, 8, 67])
@pytest.mark.parametrize("batch", [(), (1,), (1, 1), (3,)])
def test_products_with_bfloat16(k, batch):
    x, w = jax.random.normal(jax.random.key(1), (*batch, k)), bfloat16(k, 12)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    tolerance = 1e-5 if np.prod(batch) == 1 else 2e-2  # one row is not rounded, several are
    for found in (matmul(x, w), transposed(x, w.T)):
        assert found.dtype == jnp.float32
        assert found.shape == (*batch, 12)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=5 * tolerance)


def test_one_row_has_the_gradients_of_many():
    x, w = jax.random.normal(jax.random.key(1), (1, 20)), bfloat16(20, 12)
    for product, weight in ((matmul, w), (transposed, w.T)):
        loss = lambda x, weight, product=product: jnp.sum(jnp.sin(product(x, weight)))  # noqa: E731
        one = jax.grad(loss, (0, 1))(x, weight)
        two = jax.grad(loss, (0, 1))(jnp.concatenate([x, jnp.zeros_like(x)]), weight)
        np.testing.assert_allclose(one[0], two[0][:1], rtol=5e-2, atol=5e-2)
        np.testing.assert_allclose(*(np.asarray(g[1], np.float32) for g in (one, two)), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("rows", "dtype", "target", "left_to_xla"),
    [
        (1, "bfloat16", "cpu", False),
        (2, "bfloat16", "cpu", True),
        (1, "float32", "cpu", True),
        (1, "bfloat16", "cuda", True),
        (1, "bfloat16", "tpu", True),
    ],
)
def test_which_products_are_left_to_xla(rows, dtype, target, left_to_xla):
    """The compilation target decides, not this machine."""
    x, w = jnp.ones((rows, 16)), jnp.ones((16, 24), dtype)
    for product, weight in ((matmul, w), (transposed, w.T)):
        program = jax.jit(product).trace(x, weight).lower(lowering_platforms=(target,)).as_text()
        assert ("dot_general" in program) == left_to_xla
