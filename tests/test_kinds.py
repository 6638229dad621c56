"""Models with several kinds of blocks: other sizes of heads and MLP, experts after a dense block."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_pipeline import CONFIG, TOKENS, dense

from slim_jax.calibrate import activations, pipeline
from slim_jax.config import SlimConfig
from slim_jax.eval.perplexity import perplexity
from slim_jax.infer.generate import Generator
from slim_jax.model import block
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.stage import Stage
from slim_jax.plan import make_plan
from slim_jax.store import checkpoint
from slim_jax.store.source import DecoderSource

TUNED = SlimConfig(bits=2, group_size=32, method="slim", tune=True)
WIDE = (("head_dim", 32), ("num_kv_heads", 1), ("intermediate_size", 64))
SIZES = dataclasses.replace(CONFIG, kinds=(WIDE, ()), block_kinds=(0, 1, 1))
EXPERTS = dataclasses.replace(
    CONFIG, kinds=((), (("num_experts", 2), ("experts_per_token", 1))), block_kinds=(0, 1, 1)
)


def test_the_config():
    assert [block.head_dim for block in SIZES.blocks()] == [32, 16, 16]
    assert SIZES.block(1) == CONFIG
    assert [len(run) for run in Decoder(SIZES, rngs=nnx.Rngs(0)).runs()] == [1, 2]
    assert [len(run) for run in Decoder(CONFIG, rngs=nnx.Rngs(0)).runs()] == [3]
    assert DecoderConfig.from_json(json.loads(json.dumps(SIZES.to_json()))) == SIZES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_kinds": (0, 1)}, "block_kinds has 2 blocks, expected num_layers = 3"),
        ({"block_kinds": (0, 1, 2)}, "block_kinds is .0, 1, 2., expected numbers below 2"),
        ({"kinds": (WIDE, (("vocab_size", 3),))}, "a kind of blocks changes vocab_size, expected one of"),
        ({"kinds": (WIDE, (("num_kv_heads", 3),))}, "num_heads is 4, expected a multiple of"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIZES, **change)


def parallel(config: DecoderConfig) -> tuple[Stage, ...]:
    """Attention parallel to the MLP, as in GPT-J: both read one norm and add to the residual stream."""
    entry = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")
    return (
        Stage(_normed, ("h",), ("x",), layers=entry),
        Stage(_attended, ("x", "positions", "cache"), ("seen", "cache"), layers=("attn.o",), input="seen"),
        Stage(_inner, ("x",), ("inner",), part="mlp", layers=("mlp.down",), input="inner"),
        Stage(_joined, ("h", "seen", "inner"), ("h",)),
    )


def _normed(block, h):
    return (block.attn_norm(h),)


def _attended(block, x, positions, cache):
    return block.attn.attend(x, positions, cache)


def _inner(mlp, x):
    return (mlp.hidden(x),)


def _joined(block, h, seen, inner):
    return (h + block.attn.o(seen) + block.mlp.down(inner),)


def test_another_kind_of_block_is_its_stages(monkeypatch):
    """Calibration, the report and the model itself know a kind of block only through its stages."""
    for module in (block, activations):
        monkeypatch.setattr(module, "stages", parallel)
    model = Decoder(dataclasses.replace(CONFIG, num_layers=1), rngs=nnx.Rngs(0))
    found, report = pipeline.quantize(model, TOKENS, SlimConfig(bits=8, group_size=32, method="gptq"))
    assert [layer.name.partition(".attn.")[2] for layer in report.layers[:3]] == ["q", "k", "v"]
    x = jnp.asarray(TOKENS[:2])
    logits, wanted = found(x), model(x)
    assert float(jnp.abs(logits - wanted).max() / jnp.abs(wanted).max()) < 0.05
    one = model.blocks[0]
    h = model.embed_tokens(x, block.sequence_positions(x))
    normed = one.attn_norm(h)
    mlp = one.mlp.down(one.mlp.hidden(normed))
    expected = h + one.attn.o(one.attn.attend(normed)[0]) + mlp
    np.testing.assert_allclose(one(h, block.sequence_positions(x))[0], expected, rtol=1e-5, atol=1e-5)


def test_quantized_and_read_alike(tmp_path):
    model = Decoder(SIZES, rngs=nnx.Rngs(0))
    uniform = SlimConfig(bits=2, group_size=32, method="rtn")
    pipeline.quantize_to_checkpoint(DecoderSource(model), TOKENS, uniform, tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    assert loaded.config == SIZES
    plan = make_plan(SIZES, uniform, "h100")
    assert plan.parameters == sum(np.prod(v.shape) for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    assert_reads_as_dense(loaded)


def assert_reads_as_dense(loaded: Decoder) -> None:
    tokens = TOKENS.reshape(-1)[:128]
    found, wanted = (perplexity(m, tokens, 32).perplexity for m in (loaded, dense(loaded)))
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SIZES, EXPERTS], ids=["sizes", "experts"])
@pytest.mark.filterwarnings("ignore:no calibration token")
def test_swept_tuned_and_generating(config, tmp_path):
    model = Decoder(config, rngs=nnx.Rngs(0))
    report = pipeline.quantize_to_checkpoint(DecoderSource(model), TOKENS, TUNED, tmp_path / "out")
    assert report.bits_per_weight < 4
    loaded = checkpoint.load(tmp_path / "out")
    assert_reads_as_dense(loaded)
    packed, plain = Generator(loaded), Generator(dense(loaded))
    assert packed.stacked == [True, True]
    prompts = [TOKENS[0, :9].tolist()]
    assert packed.generate(prompts, max_tokens=4) == plain.generate(prompts, max_tokens=4)
