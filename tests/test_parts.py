"""Tensor parallelism, in which devices share the work of every token: eight virtual CPUs, see conftest."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_generate import PROMPTS, packed, tiny

from pallas_kernels import MixedTensor, pack
from slim_jax.infer.decode_loop import next_logits
from slim_jax.infer.generate import Generator, generate
from slim_jax.infer.tensor_parallel import Cuts, cut
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import Packed

BIASED = {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "gated": False, "norm": "layer"}
WIDER = {"vocab_size": 64, "intermediate_size": 128}
EXPERTS = {"num_experts": 4, "experts_per_token": 2}


def mesh_of(count: int) -> jax.sharding.Mesh:
    return jax.make_mesh((count,), ("devices",), devices=jax.devices()[:count])


def logits(generator: Generator) -> np.ndarray:
    """Logits after a prompt of one token, from the program that chooses first tokens."""
    state = generator._empty(1, 16)
    return np.asarray(next_logits(generator._structure, generator._leaves, state, np.array([[5]], np.int32)))


CASES = [
    (WIDER, 2, (True, True, True)),
    ({}, 2, (True, False, False)),  # 61 tokens, and down has three groups of 32
    ({**WIDER, "num_kv_heads": 1}, 2, (False, True, True)),
    (WIDER, 4, (False, True, True)),  # two heads of keys
    ({**WIDER, **BIASED}, 2, (True, True, True)),
    ({**WIDER, "tied_head": False}, 2, (True, True, True)),
    ({**WIDER, **EXPERTS}, 2, (True, True, True)),
    ({**WIDER, **EXPERTS, "mlp_bias": True}, 2, (True, False, True)),
]


@pytest.mark.parametrize(("changes", "count", "expected"), CASES)
def test_what_divides_is_cut(changes, count, expected):
    cuts = Cuts.of(packed(tiny(**changes)), count)
    assert (cuts.heads, cuts.channels, cuts.vocabulary) == expected


@pytest.mark.slow
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize(("changes", "count"), [case[:2] for case in CASES])
def test_parts_say_what_the_whole_says(changes, count, is_packed):
    model = tiny(**changes)
    model = packed(model) if is_packed else model
    for name, bias in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if name[-1] == "bias":
            bias.set_value(jax.random.normal(jax.random.key(len(name)), bias.shape))
    whole, parts = Generator(model), Generator(model, mesh=mesh_of(count))
    np.testing.assert_allclose(logits(parts), logits(whole), rtol=1e-4, atol=1e-3)


def test_parts_of_a_dense_model_write_the_same():
    model = tiny(**WIDER)
    how = {"max_tokens": 4, "stop": []}
    assert generate(model, PROMPTS, **how, mesh=mesh_of(2)) == generate(model, PROMPTS, **how)


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_they_write_the_same(cache_dtype):
    model = packed(tiny(**WIDER))
    whole, parts = (
        Generator(model, mesh=mesh, cache_dtype=cache_dtype)
        for mesh in (None, jax.make_mesh((2, 1), ("a", "b"), devices=jax.devices()[:2]))
    )
    how = {"max_tokens": 9, "stop": []}
    assert parts.generate(PROMPTS, **how) == whole.generate(PROMPTS, **how)
    drawn = {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2, "seed": 3}
    assert parts.generate(PROMPTS, **how, **drawn) == whole.generate(PROMPTS, **how, **drawn)
    texts = [one.sample_text(samples=2, length=20, seed=1) for one in (parts, whole)]
    np.testing.assert_array_equal(*texts)


@pytest.mark.parametrize("is_packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_that_is_given_up_is_cut_alike(is_packed):
    kept, gone = (packed(tiny(**WIDER)) if is_packed else tiny(**WIDER) for _ in range(2))
    wanted = Generator(kept, mesh=mesh_of(2))
    found = Generator(gone, mesh=mesh_of(2), consume=True)
    jax.tree.map(np.testing.assert_array_equal, found._leaves, wanted._leaves)
    weights = [part.blocks[0].attn.q.weight.get_value() for part in (kept, gone)]
    arrays = [w.words if isinstance(w, MixedTensor) else w for w in weights]
    assert [array.is_deleted() for array in arrays] == [False, True]


@pytest.mark.slow
def test_each_has_its_share():
    model = packed(tiny(**WIDER))
    model.embed = Packed(_table(model))
    parts = cut(model, 2)
    assert [part.config.num_kv_heads for part in parts] == [1, 1]
    for name, shape in {
        "attn.q": (64, 32),
        "attn.o": (32, 64),
        "mlp.up": (64, 64),
        "mlp.down": (64, 64),
    }.items():
        outer, inner = name.split(".")
        weights = [getattr(getattr(part.blocks[0], outer), inner).weight.get_value() for part in parts]
        assert [w.shape for w in weights] == [shape, shape]
        own = getattr(getattr(model.blocks[0], outer), inner).weight.get_value().dequantize()
        joined = np.concatenate([w.dequantize() for w in weights], axis=0 if inner in ("o", "down") else 1)
        np.testing.assert_array_equal(joined, own)
    assert [part.embed.get_value().shape for part in parts] == [(64, 32), (64, 32)]


@pytest.mark.slow
def test_rows_of_a_packed_table_that_is_cut():
    model = packed(tiny(**WIDER))
    model.embed = Packed(_table(model))
    whole, parts = Generator(model), Generator(model, mesh=mesh_of(2))
    np.testing.assert_allclose(logits(parts), logits(whole), rtol=1e-4, atol=1e-3)


def _table(model: Decoder) -> MixedTensor:
    """The model's embedding, packed in 4 bits."""
    values = np.asarray(model.embed[...]).T
    scale = np.abs(values).reshape(2, 32, -1).max(1) / 7 + 1e-3
    codes = np.round(values.reshape(2, 32, -1) / scale[:, None] + 8).clip(0, 15).astype(np.uint8)
    zero = np.full(scale.shape, 8, np.uint8)
    return pack(codes.reshape(values.shape), scale, zero, np.full(2, 4), group_size=32, widths=(4,))


def test_a_model_over_a_mesh_is_refused():
    model, over = tiny(), NamedSharding(mesh_of(2), P())
    model.embed.set_value(jax.device_put(model.embed[...], over))
    with pytest.raises(ValueError, match="the model lies over a mesh already"):
        Generator(model, mesh=mesh_of(2))


def test_kinds_of_blocks_are_cut_alike():
    config = dataclasses.replace(
        tiny(**WIDER).config, kinds=((("intermediate_size", 64),), ()), block_kinds=(0, 1)
    )
    parts = cut(Decoder(config, rngs=nnx.Rngs(0)), 2)
    assert [kind.intermediate_size for kind in parts[0].config.blocks()] == [32, 64]
