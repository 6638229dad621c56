"""Packed embedding and LM head: look-up, product, generation, quantization, files, devices, sizes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_generate import forward, oracle, tiny
from test_layout import dequantize
from test_pipeline import CONFIG, TOKENS, assert_same_checkpoint
from test_training import next_token_loss, train

from convert.readers.hf import load_hf
from convert.writers.export import export_hf
from pallas_kernels import MixedTensor, Prepared, pack, side_by_side
from slim_jax import plan
from slim_jax.calibrate import embeddings, pipeline, quantizer
from slim_jax.config import SlimConfig
from slim_jax.eval.perplexity import perplexity
from slim_jax.infer.generate import Generator
from slim_jax.method import layer
from slim_jax.method.hessian import Observation
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Packed
from slim_jax.model.params import make_decoder, split_params
from slim_jax.placement import Placement
from slim_jax.store import checkpoint, entries
from slim_jax.store.checkpoint_sink import CheckpointSink
from slim_jax.store.source import DecoderSource

ENDS = SlimConfig(
    bits=2, group_size=32, criterion="kl", embedding_bits=4, embedding_group_size=32, tune=False
)
SMALL = dataclasses.replace(CONFIG, num_layers=1)


def table(d: int, vocab: int, bits: tuple[int, ...], seed: int = 0) -> MixedTensor:
    """A random packed embedding ``[d, vocab]`` whose logits lie far apart."""
    rng = np.random.default_rng(seed)
    groups = -(-d // 32)
    widths = rng.permutation(np.resize(bits, groups))
    codes = rng.integers(0, 256, (d, vocab)) % np.repeat(1 << widths, 32)[:d, None]
    scale = rng.random((groups, vocab)) * 0.3 + 0.1
    return pack(codes, scale, rng.integers(0, 16, (groups, vocab)), widths, group_size=32)


def with_packed_ends(decoder: Decoder) -> Decoder:
    """Rebuilds the decoder with a random packed embedding and LM head."""
    outer, blocks = split_params(decoder)
    vocab, d = outer["embed"].shape
    outer["embed"] = table(d, vocab, (3, 4))
    if "head.weight" in outer:
        outer["head.weight"] = table(d, vocab, (3, 4), seed=1)
    return make_decoder(decoder.config, outer, blocks)


def with_dense_ends(decoder: Decoder) -> Decoder:
    outer, blocks = split_params(decoder)
    outer["embed"] = dequantize(outer["embed"]).T
    if "head.weight" in outer:
        outer["head.weight"] = dequantize(outer["head.weight"])
    return make_decoder(decoder.config, outer, blocks)


@pytest.mark.parametrize("bits", [(4,), (1, 2, 3), (5, 8)])
def test_columns_are_those_of_the_dense_weight(bits):
    w = table(112, 67, bits)
    tokens = jnp.asarray([[0, 66, 5], [5, 31, 64]])
    for dtype in (jnp.float32, jnp.bfloat16):
        wanted = np.asarray(w.dequantize(dtype)[:, tokens]).transpose(1, 2, 0)
        np.testing.assert_array_equal(w.columns(tokens, dtype), wanted)


def test_a_look_up_makes_no_dense_table():
    w = table(64, 4099, (4,))
    text = jax.jit(w.columns).lower(jnp.zeros((2, 3), jnp.int32)).as_text()
    assert "64x4099xf32" not in text
    assert "64x6xf32" in text


def test_weights_side_by_side():
    w = table(64, 67, (2, 3))
    columns = [jax.tree.map(lambda leaf, cut=cut: leaf if leaf.ndim == 1 else leaf[:, cut], w)
               for cut in (slice(0, 40), slice(40, None))]  # fmt: skip
    parts = [dataclasses.replace(one, shape=(64, one.words.shape[1])) for one in columns]
    np.testing.assert_array_equal(dequantize(side_by_side(parts)), dequantize(w))
    with pytest.raises(ValueError, match="different bits"):
        side_by_side([table(64, 4, (2,)), table(64, 4, (3,))])


VARIANTS = {
    "tied": {},
    "scaled": {"embed_scale": 8.0, "logit_softcap": 30.0},
    "untied": {"tied_head": False},
    "projected": {"embed_size": 32, "positions": "learned", "position_offset": 2, "norm": "layer"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_ends_equal_dense_ones(name):
    packed_model = with_packed_ends(tiny(num_layers=1, **VARIANTS[name]))
    dense_model = with_dense_ends(packed_model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)))
    wanted = np.asarray(forward(dense_model, tokens))
    found = forward(packed_model, tokens)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"])
def test_generation_and_perplexity_of_packed_ends(tied):
    packed_model = with_packed_ends(tiny(num_layers=1, tied_head=tied))
    dense_model, generator = with_dense_ends(packed_model), Generator(packed_model)
    assert isinstance(
        jax.tree.unflatten(generator._structure.tree, generator._leaves)[0].embed.get_value(), Prepared
    )
    prompts = [[5, 9, 2, 11], [4]]
    assert generator.generate(prompts, max_tokens=4) == [oracle(dense_model, p, 4) for p in prompts]
    text = np.random.default_rng(1).integers(0, 61, 64)
    found, same = (perplexity(m, text, 32).perplexity for m in (packed_model, dense_model))
    assert found == pytest.approx(same, rel=1e-5)


def test_the_scale_of_embeddings_is_rounded_as_in_a_bfloat16_table():
    model = with_packed_ends(tiny(embed_scale=640**0.5))
    tokens = jnp.asarray([[1, 2]])
    plain = model.embed.get_value().columns(tokens)
    np.testing.assert_array_equal(model.embed_tokens(tokens, jnp.asarray([[0, 1]])), plain * 25.25)


def test_training_passes_packed_ends_by():
    model = with_packed_ends(tiny(num_layers=1))
    losses = train(model, next_token_loss)
    assert np.all(np.diff(losses) < 0), losses


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"]
)
def model(request) -> Decoder:
    return Decoder(dataclasses.replace(SMALL, tied_head=request.param), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def quantized(model):
    return pipeline.quantize(model, TOKENS, ENDS)


def test_the_tables_are_close_and_the_report_says_how(model, quantized):
    decoder, report = quantized
    outer, _ = split_params(decoder)
    dense, _ = split_params(model)
    assert [one.name for one in report.embeddings] == (["embed"] if model.head is None else ["embed", "head"])
    for one in report.embeddings:
        name = "embed" if one.name == "embed" else "head.weight"
        wanted = np.asarray(dense[name].T if one.name == "embed" else dense[name])
        assert outer[name].shape == one.shape == (64, 64)
        off = np.abs(dequantize(outer[name]) - wanted)
        assert np.max(off) < 0.2 * np.max(np.abs(wanted))
        assert one.bits == {"4": 2}
        assert 0 < one.error < 0.02
    values = [v for part in (outer, *split_params(decoder)[1]) for v in part.values()]
    assert report.stored_bytes == sum(value.nbytes for value in values)
    assert report.parameters == sum(np.prod(value.shape) for value in values)


def test_chunks_change_nothing(model, quantized, monkeypatch):
    monkeypatch.setattr(layer, "CHUNK", 30)
    outer, _ = split_params(pipeline.quantize(model, TOKENS, ENDS)[0])
    for name, value in split_params(quantized[0])[0].items():
        jax.tree.map(np.testing.assert_array_equal, outer[name], value)


def test_a_head_is_rounded_for_its_inputs():
    """GPTQ with the inputs' Hessian beats rounding to nearest, on outputs of correlated inputs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 64)) @ rng.normal(size=(64, 64))
    seen = Observation(jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(x[:8], jnp.float32), 500)
    weight = rng.normal(size=(64, 67)).astype(np.float32)
    errors = {}
    for method in ("rtn", "gptq"):
        config = SlimConfig(method=method, embedding_bits=3, embedding_group_size=32).resolved()
        tensor, report = embeddings.quantize_table("head.weight", weight, seen, config)
        off = x @ (np.asarray(dequantize(tensor), np.float64) - weight)
        errors[method] = np.sum(off**2) / np.sum((x @ weight) ** 2)
        assert report.error == pytest.approx(errors[method], rel=0.01)
    assert errors["gptq"] < 0.7 * errors["rtn"]


def test_a_head_is_solved_once():
    """`refine` adds coordinate-descent passes to the blocks' layers, not to embedding and LM head."""
    seen = Observation(jnp.eye(64), jnp.ones((8, 64)), 500)
    weight = np.random.default_rng(0).normal(size=(64, 67)).astype(np.float32)
    settings = [dataclasses.replace(ENDS, refine=n).resolved() for n in (0, 2)]
    tables = [embeddings.quantize_table("head.weight", weight, seen, own)[0] for own in settings]
    jax.tree.map(np.testing.assert_array_equal, *tables)


def test_a_checkpoint_holds_them(model, quantized, tmp_path):
    decoder, report = quantized
    checkpoint.save(decoder, tmp_path / "q", report)
    loaded = checkpoint.load(tmp_path / "q")
    assert type(loaded.embed) is Packed
    tokens = jnp.asarray(TOKENS[:1])
    np.testing.assert_array_equal(forward(loaded, tokens), forward(decoder, tokens))
    found = checkpoint.inspect(tmp_path / "q")
    assert [row["name"] for row in found["embeddings"]] == [one.name for one in report.embeddings]
    assert [row["error"] for row in found["embeddings"]] == [one.error for one in report.embeddings]
    assert found["bytes"] == report.stored_bytes
    assert found["parameters"] == report.parameters
    assert found["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    assert all(row["name"].startswith("blocks.0.") for row in found["layers"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "q"
    source = DecoderSource(Decoder(SMALL, rngs=nnx.Rngs(0)))
    return source, path, pipeline.quantize_to_checkpoint(source, TOKENS, ENDS, path)


@pytest.mark.parametrize("moment", ["before", "while", "after"])
def test_killed_at_the_ends_and_resumed(whole, tmp_path, monkeypatch, moment):
    source, path, report = whole

    class Killed(Exception):
        pass

    def kill(*_):
        raise Killed

    def save_blocks_alone(folder, arrays, save=entries.ocp.save):
        return kill() if folder.name == "outer" else save(folder, arrays)

    with monkeypatch.context() as patch:
        if moment == "before":
            patch.setattr(quantizer, "quantize_embeddings", kill)
        elif moment == "while":
            patch.setattr(entries.ocp, "save", save_blocks_alone)
        else:
            patch.setattr(CheckpointSink, "finish", kill)
        with pytest.raises(Killed):
            pipeline.quantize_to_checkpoint(source, TOKENS, ENDS, tmp_path / "parts")
    for _ in range(2):  # resumes, then finds it complete
        again = pipeline.quantize_to_checkpoint(source, TOKENS, ENDS, tmp_path / "parts", resume=True)
        assert (again.embeddings, again.stored_bytes) == (report.embeddings, report.stored_bytes)
    assert_same_checkpoint(path, tmp_path / "parts")


@pytest.mark.parametrize("vocab", [64, 67], ids=["cut", "whole"])
def test_four_devices_pack_a_table_alike(vocab):
    rng, mesh = np.random.default_rng(0), jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    x = jnp.asarray(rng.normal(size=(200, 64)), jnp.float32)
    seen, weight = Observation(x.T @ x, x[:8], 200), rng.normal(size=(64, vocab)).astype(np.float32)
    one, four = (
        embeddings.quantize_table("head.weight", weight, seen, ENDS.resolved(), Placement(over))[0]
        for over in (None, mesh)
    )
    assert len({shard.index for shard in four.words.addressable_shards}) == (4 if vocab == 64 else 1)
    jax.tree.map(np.testing.assert_array_equal, one, four)


@pytest.mark.slow
def test_a_model_with_packed_ends_over_two_devices(whole):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    one, two = checkpoint.load(whole[1]), checkpoint.load(whole[1], mesh=mesh)
    assert len({shard.index for shard in two.embed.get_value().words.addressable_shards}) == 2
    some = jnp.asarray(TOKENS[:2])
    np.testing.assert_allclose(forward(two, some), forward(one, some), rtol=1e-4, atol=1e-5)


def test_export_writes_tables_as_files_have_them(quantized, tmp_path):
    decoder, _ = quantized
    source = load_hf(export_hf(DecoderSource(decoder), tmp_path / "hf"))
    for name, value in split_params(decoder)[0].items():
        if isinstance(value, MixedTensor):
            dense = dequantize(value)
            np.testing.assert_array_equal(source.outer()[name], dense.T if name == "embed" else dense)


def test_a_plan_counts_them(quantized):
    decoder, report = quantized
    gptq = dataclasses.replace(ENDS, method="gptq")
    found = plan.make_plan(decoder.config, gptq, "v5e")
    assert found.embedding_bytes == sum(one.bits_per_weight / 8 * 64 * 64 for one in report.embeddings)
    apart = plan.make_plan(decoder.config, dataclasses.replace(gptq, embedding_bits=16), "v5e")
    assert apart.embedding_bytes == 0
    assert (
        apart.packed_bytes - found.packed_bytes
        == len(report.embeddings) * 64 * 64 * 2 - found.embedding_bytes
    )
    json.dumps(dataclasses.asdict(found))


def test_sixteen_bits_leave_them():
    model = Decoder(SMALL, rngs=nnx.Rngs(0))
    decoder, report = pipeline.quantize(model, TOKENS, dataclasses.replace(ENDS, embedding_bits=16))
    assert report.embeddings == []
    np.testing.assert_array_equal(decoder.embed[...], model.embed[...].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"embedding_bits": 1}, "embedding_bits is 1, expected 2 to 8, or 16"),
        ({"embedding_bits": 9}, "embedding_bits is 9"),
        ({"embedding_group_size": 48}, "embedding_group_size is 48, expected a positive multiple of 32"),
    ],
)
def test_bad_settings(changes, says):
    with pytest.raises(ValueError, match=says):
        SlimConfig(**changes)
