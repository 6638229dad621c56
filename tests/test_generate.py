"""Generation on tiny random decoders, against a full forward pass without a cache."""

import dataclasses
import importlib
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_layout import dequantize

from pallas_kernels import pack
from slim_jax.infer import lengths
from slim_jax.infer.decode_loop import CHUNK
from slim_jax.infer.generate import Generator, generate, sample_text
from slim_jax.model.block import Block, linear_groups
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Linear, Packed

# `slim_jax.generate` is the function of that name.
generation = importlib.import_module("slim_jax.infer.generate")

PROMPTS = [[5, 9, 2, 11, 7, 3], [4], [8, 1, 30]]


def tiny(**changes) -> Decoder:
    fields = {
        "family": "tiny",
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_positions": 96,
    }
    decoder = Decoder(DecoderConfig(**{**fields, **changes}), rngs=nnx.Rngs(3))
    # Logits lie far apart, so that rounding never decides which is the largest.
    decoder.embed.set_value(decoder.embed[...] * 20)
    return decoder


def linears(block: Block, config: DecoderConfig) -> list[Linear]:
    names = [name for group in linear_groups(config) for name in group]
    return [operator.attrgetter(name)(block) for name in names]


def packed(decoder: Decoder, bits: tuple[int, ...] = (1, 2, 3), unlike: str = "") -> Decoder:
    """Returns the decoder with random codes of mixed widths, in an order that differs between layers.

    ``unlike`` changes the first block: all its groups have the last width, and it may declare all widths
    ("rows") or only that one ("widths").
    """
    rng = np.random.default_rng(0)
    for i, block in enumerate(decoder.blocks):
        for linear in linears(block, decoder.config):
            k, n = linear.weight.shape
            groups = k // 32
            widths = rng.permutation(np.resize(bits[1:] if groups == 2 else bits, groups))
            if unlike and i == 0:
                widths[:] = bits[-1]
            may_occur = bits[-1:] if unlike == "widths" and i == 0 else bits
            codes = rng.integers(0, 256, (k, n)) % np.repeat(1 << widths, 32)[:, None]
            zero = rng.integers(0, 16, (groups, n))
            scale = rng.random((groups, n)) * 0.2 + 0.05
            linear.weight = Packed(pack(codes, scale, zero, widths, group_size=32, widths=may_occur))
    return decoder


def dequantized(decoder: Decoder) -> Decoder:
    for block in decoder.blocks:
        for linear in linears(block, decoder.config):
            linear.weight = nnx.Param(dequantize(linear.weight.get_value()))
    return decoder


@nnx.jit
def forward(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def oracle(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each from a full forward pass; tokens after a causal position have no effect."""
    tokens = np.zeros((1, 24), np.int32)
    tokens[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + count):
        tokens[0, i] = np.argmax(np.asarray(forward(model, tokens))[0, i - 1])
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


VARIANTS = {
    "rotary": {},
    "window": {"sliding_window": 4},
    "learned": {
        "positions": "learned",
        "position_offset": 2,
        "norm": "layer",
        "gated": False,
        "activation": "relu",
    },
    "local_global": {
        "sliding_window": 4,
        "global_layers": (1,),
        "local_rope_theta": 100.0,
        "attn_softcap": 3.0,
        "logit_softcap": 40.0,
        "qk_norm": True,
        "output_norms": True,
        "norm_offset": 1.0,
    },
    "untied": {"tied_head": False, "embed_size": 32, "qkv_bias": True},
}


@pytest.mark.parametrize(
    "name", [name if name == "learned" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_cached_batch_equals_full_forward_of_each_row(name):
    model = tiny(**VARIANTS[name])
    found = generate(model, PROMPTS, max_tokens=9)
    assert found == [oracle(model, prompt, 9) for prompt in PROMPTS]


def test_batch_equals_single_rows():
    generator = Generator(tiny())
    batch = generator.generate(PROMPTS, max_tokens=9)
    assert batch == [generator.generate([prompt], max_tokens=9)[0] for prompt in PROMPTS]


def test_prompt_may_fill_all_positions_but_one():
    model = tiny(positions="learned", max_positions=24)
    prompt = [int(i) for i in np.arange(23) * 7 % 61]
    assert generate(model, [prompt], max_tokens=1) == [oracle(model, prompt, 1)]


@pytest.mark.parametrize(
    ("unlike", "variant"),
    [
        pytest.param("", "rotary", marks=pytest.mark.slow),
        ("rows", "rotary"),
        pytest.param("widths", "rotary", marks=pytest.mark.slow),
        pytest.param("", "local_global", marks=pytest.mark.slow),
    ],
)
def test_packed_equals_dequantized(unlike, variant):
    model = packed(tiny(**VARIANTS[variant]), unlike=unlike)
    generator = Generator(model)
    assert generator.stacked == [True] * (2 if unlike == "widths" else 1)  # scan segments
    found = generator.generate([PROMPTS[0]], max_tokens=9)
    dense = Generator(dequantized(model))
    assert dense.stacked == [False]
    assert found == dense.generate([PROMPTS[0]], max_tokens=9)


@pytest.mark.slow
def test_the_cache_has_the_dtype_of_products():
    model = packed(tiny())
    assert Generator(model)._empty(1, 16).kv[0][0].dtype == jnp.float32
    for block in model.blocks:
        for linear in linears(block, model.config):
            weight = linear.weight.get_value()
            linear.weight.set_value(dataclasses.replace(weight, dtype=jnp.dtype(jnp.bfloat16)))
    generator = Generator(model)
    assert generator._empty(1, 16).kv[0][0].dtype == jnp.bfloat16
    assert len(generator.generate(PROMPTS, max_tokens=3)[0]) == 3


def test_sampling_repeats_with_its_seed_only():
    generator = Generator(tiny())

    def run(**changes):
        return generator.generate(PROMPTS, max_tokens=9, **{"temperature": 5.0, "seed": 1, **changes})

    assert run() == run()
    assert run() != run(seed=2)
    assert run(top_p=0.9) == run(top_p=0.9)
    greedy = generator.generate(PROMPTS, max_tokens=9)
    assert run(top_p=1e-6) == greedy
    assert run() != greedy


def test_on_token_may_end_its_row():
    full = generate(tiny(), PROMPTS, max_tokens=9)
    found = generate(tiny(), PROMPTS, max_tokens=9, on_token=lambda row, token: row == 1)
    assert found == [full[0], full[1][:1], full[2]]


def test_a_repetition_penalty_forbids_what_was_seen():
    """The penalty is so large that no token that the row has seen is likeliest again."""
    found = generate(tiny(), PROMPTS, max_tokens=9, repetition_penalty=1e9)
    for prompt, row in zip(PROMPTS, found):
        assert len({*prompt, *row}) == len(prompt) + 9
    assert found != generate(tiny(), PROMPTS, max_tokens=9)


def test_stop_token_ends_its_row_only_and_is_not_returned():
    model = tiny()
    full = generate(model, PROMPTS, max_tokens=9)
    stop = full[0][4]
    cut = [row[: row.index(stop)] if stop in row else row for row in full]
    seen: list[tuple[int, int]] = []
    found = generate(model, PROMPTS, max_tokens=9, stop=[stop], on_token=lambda *pair: seen.append(pair))
    assert found == cut
    assert [[t for row, t in seen if row == i] for i in range(3)] == cut
    assert generate(tiny(eos_token_ids=(stop,)), PROMPTS, max_tokens=9) == cut
    assert generate(tiny(eos_token_ids=(stop,)), PROMPTS, max_tokens=9, stop=[]) == full


def test_chunks_give_what_single_tokens_give(monkeypatch):
    """The draws do not depend on the tokens per dispatch; no token beyond the last is computed."""
    generator, sizes = Generator(tiny()), []
    several = generation.write

    def recorded(*arguments):
        sizes.append(int(arguments[-1]))
        return several(*arguments)

    monkeypatch.setattr(generation, "write", recorded)
    monkeypatch.setattr(generation, "CHUNK_SECONDS", 1e9)
    options = {"max_tokens": 40, "temperature": 5.0, "top_p": 0.9, "seed": 4}
    chunked = generator.generate(PROMPTS, **options)
    assert sizes == [1, 2, 4, 8, CHUNK, 8]
    monkeypatch.setattr(generation, "CHUNK_SECONDS", 0.0)
    sizes.clear()
    assert generator.generate(PROMPTS, **options) == chunked
    assert sizes == [1] * 39


def test_rows_that_have_all_ended_end_the_loop_on_the_device(monkeypatch):
    generator, seen, several = Generator(tiny()), [], generation.write
    monkeypatch.setattr(generation, "CHUNK_SECONDS", 1e9)
    monkeypatch.setattr(generation, "write", lambda *a: seen.append(several(*a)) or seen[-1])
    options = {"max_tokens": 40, "temperature": 5.0}
    full = generator.generate(PROMPTS[:1], **options)[0]
    end = next(i for i in range(17, 30) if full[i] not in full[:i])  # within the first whole chunk
    seen.clear()
    assert generator.generate(PROMPTS[:1], stop=[full[end]], **options)[0] == full[:end]
    assert [int(count) for _, count, *_ in seen] == [1, 2, 4, 8, end - 15]


def test_an_interrupt_among_tokens_leaves_the_generator_whole():
    generator, seen = Generator(tiny()), []

    def interrupt(row, token):
        seen.append(token)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate(PROMPTS[:1], max_tokens=20, on_token=interrupt)
    assert generator.generate(PROMPTS[:1], max_tokens=20)[0][:5] == seen


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1]], {"max_tokens": 0}, "max_tokens is 0"),
        ([[1]], {"temperature": -0.5}, "temperature is -0.5"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
        ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"min_p": 1.0}, "min_p is 1.0"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ([[1] * 90], {"max_tokens": 7}, "more than the model's 96 positions"),
        ([[1, 61]], {}, "token 61, outside the vocabulary of 61"),
        ([[-1]], {}, "token -1, outside the vocabulary"),
    ],
)
def test_errors(prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), prompts, **{"max_tokens": 4, **changes})


@pytest.mark.parametrize("pack_it", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_once_for_each_batch_and_cache_size(monkeypatch, pack_it):
    traces = []
    logits = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, h: traces.append(h.shape) or logits(self, h))
    model = tiny(vocab_size=67 + pack_it)  # shapes that no other test has compiled
    model = packed(model) if pack_it else model
    generate(model, [[1, 2, 3]], max_tokens=9)
    assert len(traces) == 2  # prefill, step
    generate(model, [[4, 5, 6, 7, 8]], max_tokens=16, temperature=0.7, top_p=0.8, seed=3)
    assert len(traces) == 2
    if pack_it:
        return
    generate(model, [[1], [2, 3]], max_tokens=9)
    assert len(traces) == 4


@pytest.mark.slow
@pytest.mark.parametrize("bos", [pytest.param(None, marks=pytest.mark.slow), 1])
def test_sample_text(bos, monkeypatch):
    monkeypatch.setattr(lengths, "LENGTH_STEP", 8)
    monkeypatch.setattr(generation, "SAMPLE_ROWS", 4)
    model = tiny(bos_token_id=bos, eos_token_ids=(2,))
    text = sample_text(model, samples=6, length=21, seed=0)
    assert text.shape == (6, 21)
    assert text.dtype == np.int32
    assert text.min() >= 0
    assert text.max() < 61
    assert np.array_equal(text, sample_text(model, samples=6, length=21, seed=0))
    assert not np.array_equal(text, sample_text(model, samples=6, length=21, seed=1))
    assert len(set(text[:, 0 if bos is None else 1].tolist())) == 6
    assert bos is None or (text[:, 0] == bos).all()


@pytest.mark.parametrize("bos", [None, 1])
def test_sample_text_follows_the_model(bos, monkeypatch):
    """Where the model is certain, its text is the greedy continuation."""
    monkeypatch.setattr(lengths, "LENGTH_STEP", 8)
    model = tiny(bos_token_id=bos)
    model.embed.set_value(model.embed[...] * 40)
    text = sample_text(model, samples=3, length=20, seed=0).tolist()
    head = 1 if bos is None else 2
    assert [row[head:] for row in text] == [oracle(model, row[:head], 20 - head) for row in text]


@pytest.mark.parametrize(("samples", "length"), [(0, 4), (2, 0), (2, 97)])
def test_sample_text_errors(samples, length):
    with pytest.raises(ValueError, match="cannot write"):
        sample_text(tiny(), samples=samples, length=length, seed=0)


@pytest.mark.parametrize("length", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_shortest_text(length):
    assert sample_text(tiny(bos_token_id=1), samples=2, length=length, seed=0).shape == (2, length)
    assert sample_text(tiny(), samples=2, length=length, seed=0).shape == (2, length)
