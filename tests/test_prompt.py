"""Prompts read in chunks: the logits equal those of one pass, and memory is at most linear in the length."""

import importlib
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import VARIANTS, packed, tiny
from test_parts import WIDER, mesh_of

from pallas_kernels import attention, chips
from pallas_kernels.xla import attention as module
from slim_jax.infer import decode_loop
from slim_jax.infer.forward import forward
from slim_jax.infer.generate import PROMPT_CHUNK, Generator
from slim_jax.infer.sampling import Choice, Sampling
from slim_jax.model.decoder import Decoder

generation = importlib.import_module("slim_jax.infer.generate")
MOE = {"num_experts": 4, "experts_per_token": 2}
LENGTH = 8192


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@decode_loop._on_each_device(False, True, False)
def logits_and_state(tree, leaves, state, tokens, positions, choice):
    """Replacement of `slim_jax.infer.decode_loop.read`, which returns only the likeliest token."""
    outer, runs = jax.tree.unflatten(tree, leaves)
    return *forward(outer, runs, state, tokens, positions), choice.reads(tokens, positions)


def after(model: Decoder, chunk: int, **how) -> tuple[jax.Array, Choice]:
    """Logits after prompts of 14 and 9 tokens in a batch padded to 16, and the tokens that rows have seen."""
    generator = Generator(model, prompt_chunk=chunk, **how)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 16)).astype(np.int32)
    positions = np.maximum(np.arange(16)[None] - np.array([[2], [7]]), -1).astype(np.int32)
    choice = Sampling(repetition_penalty=2.0).start(0, 2, model.config.vocab_size)
    logits, _, choice = generator._read(generator._empty(2, 32), tokens, positions, choice)
    return logits[0], choice


@pytest.mark.parametrize(
    ("changes", "pack_it", "how"),
    [
        (VARIANTS["local_global"], False, {}),
        ({"num_layers": 1}, False, {"cache_dtype": "int8"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (VARIANTS["rotary"], False, {}),
                (VARIANTS["window"], True, {"cache_dtype": "int8"}),
                (VARIANTS["learned"], False, {}),
                (VARIANTS["untied"], False, {}),
                (MOE, False, {}),
                (MOE, True, {}),
                (WIDER, False, {"mesh": mesh_of(2)}),
                ({**WIDER, **VARIANTS["window"]}, True, {"mesh": mesh_of(2), "cache_dtype": "int8"}),
            ]
        ),
    ],
)
def test_chunks_give_the_logits_of_one_pass(changes, pack_it, how, monkeypatch):
    """Chunks of 6: the first has the 4 remaining tokens, and is all padding in one row."""
    monkeypatch.setattr(generation, "read", logits_and_state)
    model = tiny(**changes)
    model = packed(model) if pack_it else model
    (found, saw), (wanted, should_see) = (after(model, chunk, **how) for chunk in (6, 16))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
    np.testing.assert_array_equal(saw.seen, should_see.seen)


class Read(Exception):
    """Ends a generation once its prompt has been read."""


def reads_of(generator: Generator, monkeypatch, length: int) -> list[tuple]:
    """Arguments of the calls that read a prompt of this length, as shapes; nothing is run."""
    seen: list[tuple] = []

    def record(structure, leaves, *rest):
        seen.append((structure, *jax.tree.map(jax.typeof, (leaves, *rest))))
        return jnp.zeros(1, jnp.int32), *rest[::3]

    def end(*_):
        raise Read

    monkeypatch.setattr(generation, "read", record)
    monkeypatch.setattr(generation, "write", end)
    with pytest.raises(Read):
        generator.generate([[0] * length], max_tokens=100)
    return seen


@pytest.fixture(scope="module")
def long() -> Generator:
    return Generator(tiny(max_positions=40_000, num_layers=1))


def test_memory_grows_with_a_prompt_s_length_at_most(long, monkeypatch):
    temporary = {}
    for length in (LENGTH, 4 * LENGTH - 100):
        seen = reads_of(long, monkeypatch, length)
        assert max(tokens.shape[1] for _, _, _, tokens, *_ in seen) == PROMPT_CHUNK
        read = decode_loop.read.lower(*seen[-1]).compile()
        temporary[length] = read.memory_analysis().temp_size_in_bytes
    least, most = temporary.values()
    assert 0 < most < 4.5 * least
    assert (
        most < 4 * 4 * (4 * LENGTH) ** 2 / 50
    )  # less than a fiftieth of the scores of four heads, which are in float32


def test_few_programs_read_prompts_of_any_length(long, monkeypatch):
    def programs(length: int) -> set:
        return {
            (tokens.shape, state.positions.shape)
            for _, _, state, tokens, *_ in reads_of(long, monkeypatch, length)
        }

    assert [len(programs(length)) for length in (500, 700, 5000, 39_000)] == [1, 2, 1, 1]
    assert len(set.union(*map(programs, range(17_000, 32_000, 1000)))) <= 10


def sizes(text: str) -> list[list[int]]:
    """Shapes of all tensors of a lowered program."""
    return [[int(n) for n in found.split("x")[:-1]] for found in re.findall(r"tensor<((?:\d+x)+\w+)>", text)]


@pytest.mark.parametrize("target", ["cpu", "h100", "mi300x", "v6e"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_no_device_has_all_scores_at_once(target, softcap, monkeypatch):
    """Whole windows, with and without a gradient, and a chunk of 512 against a long cache."""
    device = chips.BY_SHORT_NAME.get(target)
    platform = "cpu" if device is None else device.platform

    def lowered(queries: int, keys: int, gradient: bool) -> list[list[int]]:
        shapes = [(1, queries, 8, 64), *[(1, 2, keys, 64)] * 2]
        x = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        at = [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (queries, keys)]

        def run(*arguments):
            return attention(*arguments, scale=0.1, softcap=softcap, window=4096).sum()

        traced = jax.jit(jax.grad(run, (0, 1, 2)) if gradient else run).trace(*x, *at)
        return sizes(traced.lower(lowering_platforms=(platform,)).as_text())

    monkeypatch.setattr(module, "SCORES", 2**24)
    long = LENGTH // 4
    with chips.target(target if device else chips.of_target()):
        for case in [(long, long, False), (long, long, True), (PROMPT_CHUNK, LENGTH, False)]:
            found = lowered(*case)
            assert len(found) > 50
            assert all(sum(n >= long for n in shape) <= 1 for shape in found)
            assert max(map(math.prod, found)) <= module.SCORES


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_queries_in_turns_find_what_all_at_once_find(softcap, monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(2, 7, 4, 8), *[(2, 2, 9, 8)] * 2])
    positions, places = (jnp.asarray(np.stack([np.arange(n) - i for i in (0, 3)])) for n in (7, 9))

    def value(q, k, v):
        y = attention(q, k, v, positions, places, scale=0.5, window=4, softcap=softcap)
        y = jnp.where(positions[:, :, None] >= 0, y, 0)
        return jnp.sum(jnp.sin(y)), y

    def found() -> list[jax.Array]:
        # A new function each time, because jit does not see changes of SCORES.
        run = jax.jit(lambda *qkv: jax.value_and_grad(value, (0, 1, 2), has_aux=True)(*qkv))
        (_, y), gradients = run(q, k, v)
        return [y, *gradients]

    at_once = found()
    with chips.target("h100"):
        results = [found()]
        monkeypatch.setattr(module, "SCORES", 2 * 4 * 9 * 3)  # three queries: chunks of 3, 3 and 1
        results.append(found())
    for result in results:
        for one, other in zip(result, at_once):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_chunks_have_tokens():
    with pytest.raises(ValueError, match="prompt_chunk is 0, expected at least 1"):
        Generator(tiny(), prompt_chunk=0)
