"""Linear attention: an oracle token by token, prompts in chunks, padding; hybrid models, quantized."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_models import decoder_of, load_golden, relative_error, write_hf
from jax.sharding import Mesh
from test_hf import same_parameters
from test_pipeline import CONFIG, TOKENS, Killed, assert_same_checkpoint, dense, kill_after

from convert import load_source
from pallas_kernels import pack
from slim_jax.calibrate import pipeline
from slim_jax.config import SlimConfig
from slim_jax.infer.forward import forward
from slim_jax.infer.generate import Generator, generate
from slim_jax.model.block import linear_groups
from slim_jax.model.cache import Run, State, state_bytes
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear_attention import CHUNK, GatedDelta, delta_rule
from slim_jax.model.params import make_decoder, make_outer, split_params
from slim_jax.model.stage import part_of
from slim_jax.plan import make_plan
from slim_jax.store import checkpoint
from slim_jax.store.source import DecoderSource

GPTQ = SlimConfig(bits=2, group_size=32, method="gptq", tune=False)
LINEAR = (("mixer", "gated_delta"),)
HYBRID = dataclasses.replace(
    CONFIG,
    intermediate_size=96,
    output_gate=True,
    rotary_dim=8,
    linear_key_heads=2,
    linear_value_heads=4,
    linear_key_dim=16,
    linear_value_dim=16,
    conv_size=4,
    num_experts=2,
    experts_per_token=1,
    shared_expert_size=64,
    shared_expert_gate=True,
    kinds=(LINEAR, ()),
    block_kinds=(0, 0, 1),
)


def inputs(time: int, seed: int = 0) -> list[np.ndarray]:
    """Random arguments of `delta_rule`, of which some tokens repeat the key before them."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, 2, time, 2, 8))
    k[:, 1::3] = k[:, 0:-1:3] if time > 1 else k[:, 1::3]
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, state = rng.normal(size=(2, time, 4, 12)), rng.normal(size=(2, 4, 8, 12))
    g, beta = -rng.exponential(0.3, (2, time, 4)), rng.random((2, time, 4))
    return [q, k, v, g, beta, state]


def oracle(q, k, v, g, beta, state):
    """The gated delta rule in float64, token by token and head by head."""
    state, y = state.copy(), np.zeros_like(v)
    for b in range(v.shape[0]):
        for t in range(v.shape[1]):
            for h in range(v.shape[2]):
                key, query = k[b, t, h // 2], q[b, t, h // 2]
                s = np.exp(g[b, t, h]) * state[b, h]
                s = s + np.outer(key, beta[b, t, h] * (v[b, t, h] - key @ s))
                state[b, h], y[b, t, h] = s, query @ s
    return y, state


@pytest.mark.parametrize("time", [1, 5, CHUNK, CHUNK + 1, 2 * CHUNK + 30])
def test_delta_rule_is_the_recurrence(time):
    given = inputs(time)
    y, state = delta_rule(*(jnp.asarray(a, jnp.float32) for a in given))
    expected, last = oracle(*given)
    assert relative_error(y, expected) < 2e-6 * time**0.5 + 1e-6
    assert relative_error(state, last) < 2e-6 * time**0.5 + 1e-6


def test_equal_keys_do_not_blow_up():
    """All keys alike, no decay, full corrections: the triangular system is the worst there is."""
    q, k, v, g, beta, state = inputs(2 * CHUNK)
    k, g, beta = np.broadcast_to(k[:, :1], k.shape), np.zeros_like(g), np.ones_like(beta)
    y, last = delta_rule(*(jnp.asarray(a, jnp.float32) for a in (q, k, v, g, beta, state)))
    expected, wanted = oracle(q, k, v, g, beta, state)
    assert relative_error(y, expected) < 1e-4
    assert relative_error(last, wanted) < 1e-4


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("time", [1, CHUNK + 3])
def test_it_lowers_for_other_platforms(time, platform):
    shapes = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in inputs(time)]
    text = jax.jit(delta_rule).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert ("triangular_solve" in text) == (time > 1)


@pytest.mark.slow
def test_gradients_are_finite_and_those_of_the_recurrence():
    given = [jnp.asarray(a, jnp.float32) for a in inputs(CHUNK + 3)]

    def by_tokens(*given):
        *tokens, state = given
        ys = []
        for t in range(tokens[0].shape[1]):
            y, state = delta_rule(*(a[:, t : t + 1] for a in tokens), state)
            ys.append(y)
        return jnp.concatenate(ys, axis=1), state

    def loss(rule, given):
        y, state = rule(*given)
        return jnp.sum(jnp.sin(y)) + jnp.sum(state**2)

    found, expected = (
        jax.jit(jax.grad(lambda a, r=rule: loss(r, a)))(given) for rule in (delta_rule, by_tokens)
    )
    for ours, theirs in zip(found, expected):
        assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5", "qwen3_next"])
@pytest.mark.parametrize("chunk", [1, 7, 70])
def test_a_prompt_in_chunks_behind_padding(name, chunk, tmp_path):
    golden = load_golden(name)
    decoder, time = decoder_of(load_source(write_hf(golden, tmp_path))), golden.tokens.shape[1]
    lengths, width = np.array([time, time - 5]), time
    outer = make_outer(decoder.config, split_params(decoder)[0])
    runs = decoder.runs()
    state = State.empty([Run(r[0].config, len(r), False) for r in runs], 2, width)
    step = jax.jit(forward)
    for start in range(0, width, chunk):
        positions = np.arange(start, min(start + chunk, width))[None] - (width - lengths)[:, None]
        piece = np.take_along_axis(golden.tokens, np.maximum(positions, 0), axis=1)
        logits, state = step(outer, runs, state, piece, np.maximum(positions, -1).astype(np.int32))
    assert relative_error(logits, golden.logits[[0, 1], lengths - 1]) <= 1e-4


def test_padding_leaves_the_state_as_it_is():
    layer = GatedDelta(HYBRID.block(0), rngs=nnx.Rngs(0))
    state = State.empty([Run(HYBRID.block(0), 1, False)], 1, 8).kv[0][0]
    x = jax.random.normal(jax.random.key(0), (1, 6, 64))
    _, seen = layer.attend(x[:, 2:], jnp.arange(4)[None], state)
    _, padded = layer.attend(x, jnp.array([[-1, -1, 0, 1, 2, 3]]), state)
    np.testing.assert_allclose(padded.state, seen.state, atol=1e-6)
    np.testing.assert_array_equal(padded.before, seen.before)
    _, after = layer.attend(x, jnp.full((1, 6), -1), seen)
    np.testing.assert_array_equal(after.state, seen.state)


def packed_weight(shape):
    """A weight of random codes of mixed widths, alike in all layers of a shape."""
    rng, (k, n) = np.random.default_rng(0), shape
    widths = np.resize([2, 3, 1], k // 32)
    codes = rng.integers(0, 256, shape) % np.repeat(1 << widths, 32)[:, None]
    zero, scale = rng.integers(0, 16, (k // 32, n)), rng.random((k // 32, n)) * 0.1 + 0.02
    return pack(codes, scale, zero, widths, group_size=32, widths=(1, 2, 3))


def randomly_packed(model):
    """The model with :func:`packed_weight` in place of its linear layers, and logits that lie far apart."""
    config, (outer, blocks) = model.config, split_params(model)
    names = [{f"{n}.weight" for group in linear_groups(kind) for n in group} for kind in config.blocks()]
    each = [
        {n: packed_weight(v.shape) if n in own else v for n, v in block.items()}
        for block, own in zip(blocks, names)
    ]
    found = make_decoder(config, outer, each)
    found.embed.set_value(found.embed[...] * 20)
    return found


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(HYBRID, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_a_hybrid_is_quantized_and_resumed(model, tmp_path):
    source = DecoderSource(model)
    report = pipeline.quantize_to_checkpoint(source, TOKENS, GPTQ, tmp_path / "whole")
    names = [layer.name for layer in report.layers]
    assert [name for name in names if name.startswith("blocks.1.")] == [
        *(f"blocks.1.linear_attn.{name}" for name in "qkvzo"),
        *(f"blocks.1.moe.shared.{name}" for name in ("gate", "up", "down")),
        *(f"blocks.1.moe.experts.{i}.{name}" for i in range(2) for name in ("gate", "up", "down")),
    ]
    assert all(layer.error < 0.5 for layer in report.layers)

    with pytest.raises(Killed):
        pipeline.quantize_to_checkpoint(source, TOKENS, GPTQ, tmp_path / "parts", on_event=kill_after(1))
    pipeline.quantize_to_checkpoint(source, TOKENS, GPTQ, tmp_path / "parts", resume=True)
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts")
    loaded = checkpoint.load(tmp_path / "whole")
    for name in ("conv.weight", "log_decay", "decay.weight", "decay.bias", "beta.weight", "norm.weight"):
        kept, given = (part_of(m.blocks[0].linear_attn, name)[...] for m in (loaded, model))
        np.testing.assert_array_equal(kept, given, err_msg=name)
    tokens = jnp.asarray(TOKENS[:2])
    np.testing.assert_allclose(loaded(tokens), dense(loaded)(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache_dtype", [jnp.float32, pytest.param(jnp.int8, marks=pytest.mark.slow)])
def test_packed_blocks_write_what_dense_ones_do(model, cache_dtype):
    found = randomly_packed(model)
    prompts = [TOKENS[0, :21].tolist(), TOKENS[1, :9].tolist()]
    plain, generators = dense(found), []
    for one in (found, plain):
        generators.append(Generator(one, cache_dtype=cache_dtype, prompt_chunk=8))
    assert generators[0].stacked == [True, True]
    written = [one.generate(prompts, max_tokens=20) for one in generators]
    assert written[0] == written[1]
    if cache_dtype == jnp.int8:
        np.testing.assert_array_equal(*(one.sample_text(samples=2, length=9, seed=0) for one in generators))


@pytest.mark.slow
def test_a_model_over_devices(model):
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    prompts = [TOKENS[0, :9].tolist()]
    assert generate(model, prompts, max_tokens=5, mesh=mesh) == generate(model, prompts, max_tokens=5)


def test_the_plan_counts_states():
    plan, longer = (make_plan(HYBRID, GPTQ, "h100", context=context) for context in (64, 128))
    states = 2 * 4 * (4 * 16 * 16 + 3 * (2 * 2 * 16 + 4 * 16))
    assert plan.cache_bytes_per_token == 2 * 2 * 2 * 16
    assert longer.device_bytes - plan.device_bytes == 64 * plan.cache_bytes_per_token
    attended = dataclasses.replace(HYBRID, kinds=(), block_kinds=())
    assert make_plan(attended, GPTQ, "h100", context=64).cache_bytes_per_token == 3 * 2 * 2 * 2 * 16
    assert sum(map(state_bytes, HYBRID.blocks())) == states


def test_the_text_of_a_multimodal_checkpoint(tmp_path):
    """As on the hub: names of the text tower, fused experts, a vision tower and multi-token prediction."""
    golden = load_golden("qwen3_5_moe")
    weights = {k.replace("model.", "model.language_model.", 1): v for k, v in golden.weights.items()}
    for block in range(golden.config["num_hidden_layers"]):
        experts = f"model.language_model.layers.{block}.mlp.experts"
        each = [
            [weights.pop(f"{experts}.{i}.{part}_proj.weight") for i in range(5)]
            for part in ("gate", "up", "down")
        ]
        weights[f"{experts}.gate_up_proj"] = np.concatenate(list(map(np.stack, each[:2])), axis=1)
        weights[f"{experts}.down_proj"] = np.stack(each[2])
    weights |= {name: np.ones(3, np.float32) for name in ("model.visual.norm.weight", "mtp.fc.weight")}
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": {**golden.config, "mtp_num_hidden_layers": 1, "attn_output_gate": True},
        "vision_config": {"model_type": "qwen3_5_moe", "hidden_size": 4},
    }
    whole = dataclasses.replace(golden, config=config, weights=weights)
    found = load_source(write_hf(whole, tmp_path / "whole"))
    text = load_source(write_hf(golden, tmp_path / "text"))
    assert found.config == text.config
    assert same_parameters(found, text)
    assert found.origin["left_out"] == {"vision tower": 1, "multi-token prediction": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_key_heads": 3}, "linear_value_heads is 4, expected a multiple of linear_key_heads = 3"),
        ({"conv_size": 0}, "conv_size is 0, expected a positive number"),
        ({"rotary_dim": 5}, "rotary_dim is 5, expected an even number up to head_dim = 16"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HYBRID, **change)
