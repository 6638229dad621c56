"""Mechanisms that families share, together in small models: quantized, packed, split over devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_models import relative_error
from jax.sharding import Mesh
from test_linear_attention import GPTQ, randomly_packed
from test_pipeline import CONFIG, TOKENS, dense

from slim_jax.calibrate import pipeline
from slim_jax.infer.generate import Generator, generate
from slim_jax.model.block import growing_scale
from slim_jax.model.decoder import Decoder
from slim_jax.model.mlp import MoE
from slim_jax.model.norm import Scaled
from slim_jax.model.rotary import Rotation
from slim_jax.store import checkpoint
from slim_jax.store.source import DecoderSource

CONVOLUTION = (("mixer", "short_conv"), ("num_experts", 0))
NORMED = dataclasses.replace(
    CONFIG,
    intermediate_size=96,
    input_norms=False,
    output_norms=True,
    qk_norm=True,
    qk_norm_width="all",
    rotary_dim=8,
    rotary_interleaved=True,
    attn_scale=0.3,
    floor_scale=5,
    conv_size=3,
    num_experts=6,
    experts_per_token=2,
    router="sigmoid",
    router_score_bias=True,
    router_groups=3,
    router_top_groups=2,
    routed_scale=1.5,
    shared_expert_size=64,
    kinds=(CONVOLUTION, ()),
    block_kinds=(0, 0, 1),
)
SCALED = dataclasses.replace(
    CONFIG, intermediate_size=96, residual_scale=0.5, logit_scale=0.25, qk_norm=True, qk_norm_last=True
)


@pytest.fixture(
    scope="module", params=[pytest.param(NORMED, marks=pytest.mark.slow), SCALED], ids=["normed", "scaled"]
)
def model(request) -> Decoder:
    return Decoder(request.param, rngs=nnx.Rngs(0))


def test_it_is_quantized(model, tmp_path):
    report = pipeline.quantize_to_checkpoint(DecoderSource(model), TOKENS, GPTQ, tmp_path)
    first = [layer.name for layer in report.layers if layer.name.startswith("blocks.0.")]
    entry = [f"short_conv.{name}" for name in ("into", "outof", "value", "o")]
    entry = entry if model.config is NORMED else [f"attn.{name}" for name in "qkvo"]
    assert first == [f"blocks.0.{name}" for name in (*entry, "mlp.gate", "mlp.up", "mlp.down")]
    assert all(layer.error < 0.5 for layer in report.layers)
    loaded, tokens = checkpoint.load(tmp_path), jnp.asarray(TOKENS[:2])
    assert loaded.config == model.config
    np.testing.assert_allclose(loaded(tokens), dense(loaded)(tokens), rtol=1e-4, atol=1e-4)


def test_packed_blocks_write_what_dense_ones_do(model):
    found = randomly_packed(model)
    prompts = [TOKENS[0, :21].tolist(), TOKENS[1, :9].tolist()]
    written = [
        Generator(one, cache_dtype=jnp.float32, prompt_chunk=8).generate(prompts, max_tokens=20)
        for one in (found, dense(found))
    ]
    assert written[0] == written[1]


def test_a_model_over_devices(model):
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    prompts = [TOKENS[0, :9].tolist()]
    assert generate(model, prompts, max_tokens=5, mesh=mesh) == generate(model, prompts, max_tokens=5)


def test_routes_by_sigmoids_within_groups():
    moe, rng = MoE(NORMED.block(2), rngs=nnx.Rngs(1)), np.random.default_rng(0)
    bias, x = rng.normal(size=6), rng.normal(size=(2, 5, 64))
    assert moe.score_bias is not None
    moe.score_bias.set_value(jnp.float32(bias))
    found = np.asarray(moe.route(jnp.float32(x)))
    scores = 1 / (1 + np.exp(-x @ np.float64(moe.router.weight[...])))
    expected = np.zeros_like(scores)
    for place in np.ndindex(2, 5):
        ranked = scores[place] + bias
        worst = np.argmin(ranked.reshape(3, 2).sum(1))
        ranked[2 * worst : 2 * worst + 2] = -np.inf
        chosen = np.argsort(ranked)[-2:]
        expected[(*place, chosen)] = 1.5 * scores[place][chosen] / scores[place][chosen].sum()
    assert relative_error(found, expected) < 1e-5


def test_neighbours_are_rotated():
    x, positions = np.random.default_rng(0).normal(size=(1, 3, 1, 6)), np.array([[0, 2, 5]])
    frequency = np.array([1.0, 0.3])
    found = Rotation(jnp.float32(frequency), 1.0, True)(jnp.float32(x), jnp.asarray(positions))
    pairs = x[..., 0:4:2] + 1j * x[..., 1:4:2]
    turned = pairs * np.exp(1j * positions[:, :, None, None] * frequency)
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(1, 3, 1, 4)
    np.testing.assert_allclose(found, np.concatenate([expected, x[..., 4:]], axis=-1), atol=1e-6)


def test_queries_grow_by_steps_of_positions():
    factor = growing_scale(jnp.array([[-1, 0, 4, 5, 14]]), 0.5, 5)
    np.testing.assert_allclose(factor[0, :, 0, 0], 1 + 0.5 * np.log([1, 1, 1, 2, 3]), rtol=1e-6)
    assert Scaled(0.5)(jnp.ones((1, 2)))[0, 0] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_groups": 4}, "router_groups 4, expected 1 up to router_groups, and a divisor of num_exp"),
        ({"router_top_groups": 4}, "router_top_groups is 4"),
        ({"conv_size": 0}, "conv_size is 0, expected a positive number"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NORMED, **change)
