"""Mixtures of experts: calibration per expert, experts without tokens, packing and resuming."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_generate import packed, tiny
from test_pipeline import CONFIG, SLIM, TOKENS, Killed, assert_same_checkpoint, dense, kill_after

from pallas_kernels import MixedTensor, pack, use_implementation
from slim_jax.calibrate import activations, pipeline
from slim_jax.calibrate.activations import Activations, Inputs, observe
from slim_jax.eval.perplexity import perplexity
from slim_jax.infer.decode_loop import read
from slim_jax.infer.fuse import with_experts_as_one
from slim_jax.infer.generate import Generator, generate
from slim_jax.infer.sampling import Sampling
from slim_jax.method import gptq, hessian
from slim_jax.model.block import sequence_positions
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Packed
from slim_jax.model.mlp import MoE
from slim_jax.model.params import make_decoder, split_params
from slim_jax.report import BlockReport
from slim_jax.store.records import from_json
from slim_jax.store.source import DecoderSource

MOE = dataclasses.replace(CONFIG, num_layers=2, num_experts=3, experts_per_token=1)
UNREACHED = "blocks.1.moe.experts.2"


def random_model(layers: int = 2, **changes) -> Decoder:
    """A decoder in which no token of block 1 reaches the last expert: its logit, 0, is never the largest."""
    model = Decoder(dataclasses.replace(MOE, num_layers=layers, **changes), rngs=nnx.Rngs(0))
    if layers > 1:
        router = model.blocks[1].moe.router.weight
        v = router[...][:, 0]
        router.set_value(jnp.stack([v, -v, jnp.zeros_like(v)], axis=1))
    return model


@pytest.fixture(scope="module")
def model() -> Decoder:
    return random_model()


@pytest.fixture(scope="module")
def quantized(model):
    with pytest.warns(UserWarning, match=f"no calibration token was routed to {UNREACHED}:"):
        return pipeline.quantize(model, TOKENS, SLIM)


@pytest.mark.parametrize("norm_topk", [True, False])
def test_mixture_is_the_weighted_sum_of_the_chosen_experts(norm_topk):
    config = dataclasses.replace(MOE, experts_per_token=2, norm_topk=norm_topk)
    moe = MoE(config, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (1, 5, 64))
    logits = np.asarray(x[0] @ moe.router.weight[...], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    outputs = [np.asarray(expert.down(expert.hidden(x)))[0] for expert in moe.experts]
    for t in range(5):
        chosen = np.argsort(-p[t])[:2]
        weights = p[t, chosen] / (p[t, chosen].sum() if norm_topk else 1)
        expected = sum(w * outputs[e][t] for w, e in zip(weights, chosen))
        np.testing.assert_allclose(moe.mix(x, moe.route(x))[0, t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [33, 150])
def test_an_expert_takes_the_tokens_that_chose_it(tokens):
    """Chunks of many tokens, with one expert that none chose: the sum over all experts, and its gradient."""
    moe = MoE(dataclasses.replace(MOE, num_experts=8, experts_per_token=2), rngs=nnx.Rngs(1))
    keys = jax.random.split(jax.random.key(tokens), 2)
    x = jax.random.normal(keys[0], (2, tokens, 64))
    routes = moe.route(x).at[..., 3].set(0).at[:, :40, 5].set(0.5)
    assert moe._at_once(2 * tokens) == (64 if tokens == 150 else 32)

    def by_turns(x):
        return moe.mix(x, routes)

    def at_once(x):
        each = [expert.down(expert.hidden(x)) for expert in moe.experts]
        return sum(routes[..., i : i + 1] * y for i, y in enumerate(each))

    np.testing.assert_allclose(jax.jit(by_turns)(x), at_once(x), rtol=1e-4, atol=1e-5)
    towards = jax.random.normal(keys[1], x.shape)
    found, wanted = (
        jax.jit(jax.grad(lambda x, f=f: jnp.vdot(f(x), towards)))(x) for f in (by_turns, at_once)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_an_expert_is_calibrated_on_its_own_tokens():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 16, 8)).astype(np.float32)
    seen = rng.random((2, 4, 16)) < 0.3
    found = observe(Inputs(list(map(jnp.asarray, x)), list(map(jnp.asarray, seen))), 4)
    rows = x[seen]
    np.testing.assert_allclose(found.gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert found.tokens == len(rows)
    assert found.sample.shape == observe(Inputs(list(map(jnp.asarray, x))), 4).sample.shape
    assert {tuple(row) for row in np.asarray(found.sample)} <= {tuple(row) for row in rows}
    none = observe(Inputs([jnp.asarray(x[0])], [jnp.zeros((4, 16), bool)]), 4)
    assert (none.tokens, float(abs(none.sample).max())) == (0, 0.0)
    everyone = observe(Inputs([jnp.asarray(x[0])]), 4)
    filled = none.with_prior(everyone)
    np.testing.assert_allclose(filled.gram / filled.borrowed, everyone.gram / everyone.tokens, rtol=1e-6)
    assert filled.share_borrowed == 1
    np.testing.assert_array_equal(filled.sample, everyone.sample)


def test_stages_are_the_block(model):
    before = Activations.of(DecoderSource(model), TOKENS)
    x, groups = before.batches[0], []
    passed = before.through(0, DecoderSource(model).block(0), lambda names, _: groups.append(names) or {})
    assert groups[1:4] == [("attn.o",), ("moe.experts.0.gate", "moe.experts.0.up"), ("moe.experts.0.down",)]
    assert len(groups) == 2 + 2 * 3
    expected = model.blocks[0](x, sequence_positions(x))[0]
    after = passed.batches[0]
    assert float(jnp.abs(after - expected).max() / jnp.abs(expected).max()) < 0.02  # bfloat16


def test_coverage_is_in_the_report(quantized):
    report = quantized[1]
    for block in report.blocks:
        assert sum(block.expert_tokens) == TOKENS.size
        assert from_json(BlockReport, json.loads(json.dumps(dataclasses.asdict(block))), "") == block
    assert [block.unreached for block in report.blocks] == [[], [UNREACHED]]
    assert report.to_json()["expert_tokens"] == [block.expert_tokens for block in report.blocks]
    assert len(report.layers) == 2 * (4 + 3 * 3)


def test_router_stays_and_packed_equals_fake_quantized(model, quantized):
    decoder, plain = quantized[0], dense(quantized[0])
    for before, after in zip(model.blocks, decoder.blocks):
        np.testing.assert_array_equal(after.moe.router.weight[...], before.moe.router.weight[...])
    packed, fake = (perplexity(m, TOKENS.reshape(-1)[:64], 32).perplexity for m in (decoder, plain))
    assert packed == pytest.approx(fake, rel=1e-4)


@pytest.mark.slow
def test_packed_experts_write_what_fake_quantized_ones_do(quantized):
    decoder, plain = quantized[0], dense(quantized[0])
    prompts = [TOKENS[0, :9].tolist()]
    assert generate(decoder, prompts, max_tokens=5) == generate(plain, prompts, max_tokens=5)


def test_the_report_says_what_experts_borrow(quantized):
    for block in quantized[1].blocks:
        for layer in block.layers:
            expert = layer.name.split(".")[4] if ".experts." in layer.name else None
            own = None if expert is None else block.expert_tokens[int(expert)]
            k = layer.shape[0]
            assert layer.borrowed == (0 if own is None else pytest.approx(k / (k + own)))
            assert 0 < layer.error < 0.5


@pytest.mark.filterwarnings("ignore:no calibration token")
@pytest.mark.slow
def test_resumed_equals_uninterrupted(model, tmp_path):
    source = DecoderSource(model)
    pipeline.quantize_to_checkpoint(source, TOKENS, SLIM, tmp_path / "whole")

    with pytest.raises(Killed):
        pipeline.quantize_to_checkpoint(source, TOKENS, SLIM, tmp_path / "parts", on_event=kill_after(0))
    pipeline.quantize_to_checkpoint(source, TOKENS, SLIM, tmp_path / "parts", resume=True)
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.filterwarnings("ignore:no calibration token")
@pytest.mark.slow
def test_each_step_compiles_once_per_model(model):
    steps = [
        *(activations._run, activations._observe),
        *(hessian.statistics, gptq.solve),
    ]
    counts = []
    for layers in (1, 2):
        for step in steps:
            step.clear_cache()
        outer, blocks = split_params(model)
        small = make_decoder(dataclasses.replace(MOE, num_layers=layers), outer, blocks[:layers])
        pipeline.quantize(small, TOKENS, SLIM)
        counts.append([step._cache_size() for step in steps])
    assert counts[0] == counts[1]
    assert counts[0][0] == 8  # the stages of a block, for any number of experts


def test_too_few_experts():
    with pytest.raises(ValueError, match="experts_per_token is 4, expected 1 to num_experts = 3"):
        dataclasses.replace(MOE, experts_per_token=4)


def packed_experts(number: int, unlike: bool = False) -> Decoder:
    """A model of two blocks with random codes; if ``unlike``, one expert is packed in another width."""
    model = tiny(num_experts=number, experts_per_token=2)
    model = packed(model)
    if unlike:
        down = model.blocks[0].moe.experts[1].down
        down.weight = Packed(in_four_bits(down.weight.get_value()))
    return model


def in_four_bits(w: MixedTensor) -> MixedTensor:
    """Packs the same codes in another width."""
    scale = np.asarray(w.scale)[np.argsort(np.asarray(w.order))]
    zero = np.full(scale.shape, 4, np.uint8)
    return pack(np.asarray(w.codes()), scale, zero, np.full(w.groups, 4), group_size=32, widths=(4,))


@pytest.mark.parametrize("tokens", [pytest.param(1, marks=pytest.mark.slow), 40])
def test_experts_made_one_are_the_experts(tokens):
    """Compares single rows, and more rows than one chunk takes."""
    block = packed_experts(3).blocks[0]
    one = with_experts_as_one(nnx.clone(block))
    assert one.weights.keys() == {"moe"}
    assert len(block.moe.experts) == 3
    x = jax.random.normal(jax.random.key(0), (1, tokens, 64))
    run = jax.jit(lambda block, x: block(x, sequence_positions(x))[0])
    np.testing.assert_allclose(run(one, x), run(block, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "unlike"), [(["xla"], False), (["xla"], True), (["mosaic_tpu", "xla"], False)]
)
def test_experts_made_one_for_generating_say_the_same(names, unlike):
    """Tests the back end that prepares weights, and stacked weights for one that does not."""
    model = packed_experts(3, unlike)
    with use_implementation(*names):
        generator = Generator(model)
    _, (blocks, *_) = jax.tree.unflatten(generator._structure.tree, generator._leaves)
    one = blocks[0] if isinstance(blocks, list) else blocks
    assert ("moe" not in one.weights) == unlike
    prompt = list(range(40))
    with use_implementation(*names):
        tokens = generator.generate([prompt], max_tokens=4, stop=[])[0]
    read = jax.jit(lambda model, tokens: model(tokens))
    logits = np.asarray(read(model, jnp.array([prompt + tokens[:-1]])))
    chosen = logits[0, len(prompt) - 1 :]
    assert (chosen[np.arange(4), tokens] >= chosen.max(axis=1) - 1e-3).all()
    assert len(model.blocks[0].moe.experts) == 3  # the caller's model is unchanged


def test_what_is_compiled_does_not_grow_with_the_experts():
    def lines(number: int) -> int:
        generator = Generator(packed_experts(number))
        state = generator._empty(1, 64)
        tokens = np.zeros((1, 64), np.int32)
        choice = Sampling().start(0, 1, generator.config.vocab_size)
        lowered = read.lower(generator._structure, generator._leaves, state, tokens, tokens, choice)
        return lowered.as_text().count("\n")

    assert lines(12) == lines(4)


@pytest.mark.slow
def test_perplexity_of_packed_experts():
    model = packed_experts(4)
    tokens = np.resize(np.arange(61), 128)
    logits = np.asarray(model(jnp.asarray(tokens[None, :64], jnp.int32)), np.float64)[0, :-1]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(63), tokens[1:64]]
    found = perplexity(model, tokens[:64], 64).perplexity
    assert np.log(found) == pytest.approx(losses.mean(), rel=1e-4)
