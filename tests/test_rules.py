"""Rules: which layers they match, what they change, and that all other layers are unaffected."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import QUANTIZE, refused, said, same_weights, write_model, write_text
from flax import nnx
from test_pipeline import CONFIG, TOKENS, Killed, assert_same_checkpoint, dense, kill_after, logits

from pallas_kernels import MixedTensor
from slim_jax import SlimConfig, generate, plan
from slim_jax.calibrate import pipeline
from slim_jax.eval.perplexity import perplexity
from slim_jax.infer.generate import Generator
from slim_jax.model.block import linear_names
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import make_decoder, split_params
from slim_jax.rules import Rule, check_rules
from slim_jax.store import checkpoint, manifest
from slim_jax.store.source import DecoderSource

SQUARE = dataclasses.replace(CONFIG, num_layers=2, intermediate_size=64, num_kv_heads=4)  # little to compile
SLIM = SlimConfig(bits=2, group_size=32, sqc="minmax", embedding_bits=16, tune=False)
RULES = [
    ("blocks.1.attn.k", "skip"),
    ("blocks.1.mlp.gate", {"group_size": 64}),
    ("re:blocks\\.1\\.attn\\.[qo]", {"bits": 3.5}),
    ("blocks.1.attn.*", {"method": "gptq", "bits": 6, "damping": 0.02}),
]
TEXT = np.random.default_rng(1).integers(0, 64, 200)
NAMES = linear_names(SQUARE)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(SQUARE, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    """A checkpoint quantized with rules for some blocks, and its report."""
    path = tmp_path_factory.mktemp("rules") / "q"
    settings = dataclasses.replace(SLIM, rules=RULES)
    return path, pipeline.quantize_to_checkpoint(DecoderSource(model), TOKENS, settings, path)


def test_the_first_that_matches_holds_alone():
    config = dataclasses.replace(SLIM, rules=[("*.k", {"bits": 3}), ("blocks.0.*", {"group_size": 64})])
    found = {name: config.resolved().of_layer(f"blocks.0.{name}") for name in ("attn.k", "attn.q")}
    assert (found["attn.k"].bits, found["attn.k"].group_size) == (3, 32)
    assert (found["attn.q"].bits, found["attn.q"].group_size) == (2, 64)
    assert config.resolved().of_layer("blocks.1.attn.q") == config.resolved()
    assert dataclasses.replace(SLIM, rules=[("*", "skip")]).resolved().of_layer("any") is None


def test_settings_with_rules_go_through_json():
    config = dataclasses.replace(SLIM, rules=RULES)
    again = SlimConfig(**json.loads(json.dumps(config.to_json())))
    assert again.to_json() == config.to_json()
    assert again.resolved() == config.resolved()
    assert hash(config.resolved()) != hash(SLIM.resolved())
    assert str(Rule.of(RULES[3])) == "blocks.1.attn.*: bits=6, method=gptq, damping=0.02"
    assert Rule.of(("a", {"bits": 3.0})) == Rule.of(("a", {"bits": 3}))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (("a", {"bit": 3}), "rule 'a': there is no option 'bit', expected one such as bits"),
        (("a", {}), "it says nothing, expected skip alone, or options such as bits=3"),
        (("a", {"skip": True, "bits": 3}), "it says skip and bits"),
        (("a", {"skip": 1}), "skip is 1"),
        (("a", {"bits": "3"}), "bits is '3', expected a number"),
        (("a", {"bits": 9}), "rule 'a': bits is 9, expected 1 to 7 for method slim"),
        (("a", {"bits": 2.5, "method": "gptq"}), "rule 'a': bits is 2.5, expected a whole number"),
        (("a", {"group_size": 48}), "rule 'a': group_size is 48"),
        (("a", {"group_size": 64.0}), "expected a whole number"),
        (("a", {"method": "slim-plus"}), "method is 'slim-plus', expected one of slim, gptq, rtn"),
        (("a", {"sqc": "best"}), "rule 'a': sqc is 'best'"),
        (("a", {"damping": 2}), "rule 'a': damping is 2"),
        (("re:(", "skip"), "not a regular expression"),
        ("a: skip", "expected \\(pattern, options\\)"),
        (("a", "leave"), "expected \\(pattern, options\\)"),
    ],
)
def test_rules_that_say_nothing_sensible(rule, says):
    with pytest.raises(ValueError, match=says):
        SlimConfig(rules=[rule])


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (
            ["*.mlp.dwn"],
            r"'\*.mlp.dwn': it matches none of the 14 layers, near names: .*blocks\.\*\.mlp\.down",
        ),
        (["blocks.2.attn.q"], r"near names: blocks\.\*\.attn\.q, .*the last blocks\.1\.mlp\.down"),
        (["re:attn"], "matches none"),
        (["*.attn.*", "*.attn.q"], r"'\*.attn.q': rules before it match blocks\.0\.attn\.q"),
        (["*"], "rules skip all 14 layers"),
    ],
)
def test_rules_for_no_layer(model, patterns, says):
    config = SlimConfig(rules=[(pattern, "skip") for pattern in patterns])
    with pytest.raises(ValueError, match=says):
        check_rules(config.resolved().rules, NAMES)
    with pytest.raises(ValueError, match=says):
        pipeline.quantize(model, TOKENS, config)
    with pytest.raises(ValueError, match=says):
        plan.make_plan(SQUARE, config, "v5e")


def test_what_the_rules_changed(model, quantized):
    path, report = quantized
    loaded = checkpoint.load(path)
    blocks, full = (split_params(m)[1] for m in (loaded, model))
    skipped = blocks[1]["attn.k.weight"]
    assert skipped.dtype == jnp.bfloat16
    np.testing.assert_array_equal(skipped, full[1]["attn.k.weight"].astype(jnp.bfloat16))
    layers = {layer.name: layer for layer in report.layers}
    assert layers.keys() == set(NAMES) - {"blocks.1.attn.k"} == report.allocation.keys()
    assert {n for n, layer in layers.items() if layer.group_size == 64} == {"blocks.1.mlp.gate"}
    for name in ("q", "o"):
        assert np.mean(report.allocation[f"blocks.1.attn.{name}"]) == 3.5
        assert layers[f"blocks.1.attn.{name}"].rise > 0
    layer = layers["blocks.1.attn.v"]
    assert (layer.bits, layer.damping, layer.rise) == ({"6": 2}, 0.02, None)
    own = {f"blocks.1.attn.{name}" for name in "qkvo"}
    sizes = {name: layers[name].group_size * layers[name].shape[1] for name in layers if name not in own}
    spent = sum(size * sum(report.allocation[name]) for name, size in sizes.items())
    whole = sum(size * len(report.allocation[name]) for name, size in sizes.items())
    assert 1.9 < spent / whole <= 2
    found = checkpoint.inspect(path)
    assert found["skipped"] == ["blocks.1.attn.k"]
    assert found["quantization"]["rules"][0] == ["blocks.1.attn.k", {"skip": True}]


def test_layers_that_no_rule_is_for_are_solved_as_ever(model):
    """Compares the first block: its inputs are equal, and so are its bits, allocated per layer."""
    plain = dataclasses.replace(SLIM, criterion="kl")
    rules = [("blocks.0.attn.k", {"group_size": 64}), ("blocks.0.mlp.*", "skip"), ("blocks.1.*", "skip")]
    models = [
        pipeline.quantize(model, TOKENS, s)[0] for s in (plain, dataclasses.replace(plain, rules=rules))
    ]
    one, other = (split_params(m)[1][0] for m in models)
    for name in ("attn.q.weight", "attn.v.weight"):
        for leaf in manifest.LEAVES:
            np.testing.assert_array_equal(getattr(one[name], leaf), getattr(other[name], leaf))
    assert not any(isinstance(w, MixedTensor) for w in split_params(models[1])[1][1].values())


def test_a_rules_layer_is_solved_as_in_a_model_of_its_settings(model):
    """GPTQ within a "rtn" run uses GPTQ's own defaults; "slim" within it spends a bit budget."""
    plain = SlimConfig(method="rtn", group_size=32, embedding_bits=16)
    change = {"method": "gptq"}
    rules = [("blocks.0.attn.[qk]", change), ("blocks.1.attn.q", {"method": "slim", "bits": 2.5})]
    some, report = pipeline.quantize(model, TOKENS, dataclasses.replace(plain, rules=rules))
    whole, _ = pipeline.quantize(model, TOKENS, dataclasses.replace(plain, **change))
    mine, theirs = (split_params(m)[1][0] for m in (some, whole))
    for name, leaf in itertools.product(("attn.q.weight", "attn.k.weight"), manifest.LEAVES):
        np.testing.assert_array_equal(getattr(mine[name], leaf), getattr(theirs[name], leaf))
    layer = next(layer for layer in report.layers if layer.name == "blocks.1.attn.q")
    assert np.mean(report.allocation[layer.name]) == 2.5
    assert layer.rise > 0
    assert layer.damping == SlimConfig().resolved().damping


def assert_same_model(packed: Decoder) -> None:
    """A model has the same perplexity and writes the same text, packed and fake-quantized."""
    fake = dense(packed)
    found, wanted = (perplexity(m, TEXT, 32).perplexity for m in (packed, fake))
    assert found == pytest.approx(wanted, rel=1e-5)
    texts = [generate(m, [[3, 5, 7], [9]], max_tokens=8, stop=()) for m in (packed, fake)]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_blocks_that_differ_run(quantized):
    loaded = checkpoint.load(quantized[0])
    assert len(Generator(loaded).stacked) == 2  # two scan segments of one block each
    assert_same_model(loaded)


@pytest.mark.slow
def test_blocks_that_differ_alike_are_scanned(model):
    """Layers that read one input differ: one is skipped, one has other groups, one has other widths."""
    rules = [("*.attn.k", "skip"), ("*.mlp.gate", {"group_size": 64}), ("*.attn.v", {"bits": 5})]
    settings = dataclasses.replace(SLIM, method="rtn", rules=rules)
    packed, _ = pipeline.quantize(model, TOKENS, settings)
    assert Generator(packed).stacked == [True]
    assert_same_model(packed)


@pytest.mark.parametrize("first", [0, 1])
def test_plan_counts_what_is_stored(quantized, first):
    path, report = quantized
    settings = dataclasses.replace(SLIM, rules=RULES)
    found = plan.make_plan(SQUARE, settings, "v5e", first + 1)
    assert found.packed_bytes == report.stored_bytes == checkpoint.inspect(path)["bytes"]
    assert found.bits_per_weight == pytest.approx(report.bits_per_weight, rel=0.01)
    weights = sum(np.prod(layer.shape) for layer in (*report.layers, *report.embeddings))
    assert found.quantized == weights


def test_a_target_size_is_met_beside_rules():
    rules = [("blocks.0.attn.*", "skip"), ("blocks.0.mlp.*", {"bits": 3})]
    settings = dataclasses.replace(SLIM, rules=rules, embedding_bits=8)
    smallest, largest = (
        plan.make_plan(SQUARE, dataclasses.replace(settings, bits=b), "v5e").packed_bytes for b in (2, 3)
    )
    wanted = (smallest + largest) // 2
    found = plan.for_size(SQUARE, settings, wanted)
    assert found.bits == pytest.approx(2.5, abs=0.1)
    assert plan.make_plan(SQUARE, found, "v5e").packed_bytes <= wanted
    with pytest.raises(ValueError, match="rules give bits to all layers"):
        plan.for_size(SQUARE, dataclasses.replace(SLIM, rules=[("*", {"bits": 2})]), wanted)


def test_a_run_is_resumed_with_its_rules_only(model, quantized, tmp_path):
    source, settings = DecoderSource(model), dataclasses.replace(SLIM, rules=RULES)
    with pytest.raises(Killed):
        pipeline.quantize_to_checkpoint(source, TOKENS, settings, tmp_path / "q", on_event=kill_after(0))
    before = (tmp_path / "q/slim.json").read_bytes()
    for rules in ([], RULES[:-1], [RULES[1], RULES[0], *RULES[2:]]):
        other = dataclasses.replace(SLIM, rules=rules)
        with pytest.raises(ValueError, match="cannot be resumed with other settings: rules was"):
            pipeline.quantize_to_checkpoint(source, TOKENS, other, tmp_path / "q", resume=True)
    assert (tmp_path / "q/slim.json").read_bytes() == before
    pipeline.quantize_to_checkpoint(source, TOKENS, settings, tmp_path / "q", resume=True)
    assert_same_checkpoint(tmp_path / "q", quantized[0])


@pytest.mark.slow
def test_blocks_are_learned_and_tuned_beside_rules(model):
    """One block has layers with other groups and zero points; another is not packed at all."""
    rules = [
        ("blocks.0.attn.k", "skip"),
        ("blocks.0.mlp.*", {"bits": 5, "group_size": 64, "method": "rtn"}),
        ("blocks.0.attn.*", {"method": "rtn"}),
        ("blocks.1.*", "skip"),
    ]
    settings = dataclasses.replace(
        SLIM,
        method="slim-plus",
        criterion="kl",
        epochs=1,
        tune=True,
        tune_batch_size=4,
        rules=rules,
    )
    packed, report = pipeline.quantize(model, TOKENS, settings)
    assert [block.learning is None for block in report.blocks] == [False, True]
    assert report.blocks[1].error == 0
    assert report.tuning.losses[report.tuning.kept][1] <= report.tuning.losses[0][1]
    found, wanted = (perplexity(m, TEXT, 32).perplexity for m in (packed, dense(packed)))
    assert found == pytest.approx(wanted, rel=1e-5)
    own = {name: w for name, w in split_params(packed)[1][0].items() if isinstance(w, MixedTensor)}
    assert own["mlp.down.weight"].group_size == 64
    assert "attn.k.weight" not in own
    full = split_params(model)[1][1]
    for name, w in split_params(packed)[1][1].items():
        if w.ndim == 2:
            np.testing.assert_array_equal(w, full[name].astype(jnp.bfloat16), err_msg=name)


def test_a_model_with_rules_is_as_near_as_its_bits_say(model):
    """A model with one block at 8 bits and the rest skipped is almost exact."""
    rules = [("blocks.1.*", {"bits": 8, "method": "rtn"}), ("*", "skip")]
    packed, _ = pipeline.quantize(model, TOKENS, dataclasses.replace(SLIM, rules=rules))
    outer, blocks = split_params(model)
    rounded = [{n: w.astype(jnp.bfloat16) if w.ndim == 2 else w for n, w in b.items()} for b in blocks]
    near = make_decoder(SQUARE, outer, rounded)
    y, wanted = (logits(m, jnp.asarray(TOKENS[:2])) for m in (packed, near))
    np.testing.assert_allclose(y, wanted, atol=0.03 * float(jnp.abs(wanted).max()))


@pytest.mark.slow
def test_from_the_command_line_to_everything_that_reads_a_checkpoint(capsys, tmp_path):
    room = tmp_path / "room"
    write_model(room / "hf")
    write_text(room / "calib.txt", 300, 1)
    write_text(room / "test.txt", 200, 2)
    (tmp_path / "rules.toml").write_text('[[rule]]\npattern = "*.mlp.down"\nbits = 3\ngroup_size = 64\n')
    rules = ["--rule", "blocks.0.attn.k: skip", "--rules", tmp_path / "rules.toml"]
    calibration = ["--calibration", room / "calib.txt"]
    rules += ["--set", "method=rtn"]
    q = tmp_path / "q"
    said(capsys, "quantize", room / "hf", q, *calibration, *QUANTIZE, *rules, "--json")
    found = json.loads(said(capsys, "inspect", q, "--json"))
    assert found["skipped"] == ["blocks.0.attn.k"]
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert {layers[f"blocks.{i}.mlp.down"]["group_size"] for i in range(2)} == {64}
    assert "in full precision: blocks.0.attn.k" in " ".join(said(capsys, "inspect", q).split())
    assert "rules was" in refused(
        capsys, "quantize", room / "hf", q, *calibration, *QUANTIZE, "--resume", *rules[2:]
    )
    said(capsys, "quantize", room / "hf", q, *calibration, *QUANTIZE, *rules, "--resume")
    small = ["--bits", "2", "--group-size", "32", *rules]
    planned = json.loads(said(capsys, "plan", room / "hf", *small, "--json"))
    assert planned["bits_per_weight"] == pytest.approx(found["bits_per_weight"], rel=0.01)
    evaluated = ("--text", room / "test.txt", "--window", "32", "--json")
    packed = json.loads(said(capsys, "eval", q, *evaluated))
    said(capsys, "export", q, tmp_path / "hf", "--dtype", "float32")
    exported = json.loads(said(capsys, "eval", tmp_path / "hf", *evaluated))
    assert exported["perplexity"] == pytest.approx(packed["perplexity"], rel=1e-3)
    said(capsys, "export", q, tmp_path / "packed", "--format", "safetensors")
    assert same_weights(tmp_path / "packed", q)
    assert "| rule | *.mlp.down: bits=3, group_size=64 |" in (tmp_path / "packed/README.md").read_text()
    prompt = ("--prompt", "w5 w6 w7", "--max-tokens", "8")
    assert said(capsys, "generate", q, *prompt).startswith("w5 w6 w7")
