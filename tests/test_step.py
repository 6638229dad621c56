"""The compiled decode step: the number of programs per layer on a CPU, and the writes to the cache."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import chips, pack, scales
from pallas_kernels.gpu.joined import Joined
from slim_jax.infer.decode_loop import Tokens, write
from slim_jax.infer.fuse import ready
from slim_jax.infer.generate import Generator
from slim_jax.infer.sampling import Sampling
from slim_jax.model.block import linear_groups
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.norm import Scaled
from slim_jax.model.params import make_decoder, split_params

SLOTS, G = 48, 32
CONFIG = DecoderConfig(
    *("llama", 96, 64, 128),  # family, vocabulary, hidden and intermediate size
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=64,
)


def packed_model(layers: int = CONFIG.num_layers, widths: tuple[int, ...] = (1, 2, 3)) -> Decoder:
    rng, config = np.random.default_rng(0), dataclasses.replace(CONFIG, num_layers=layers)
    outer, blocks = split_params(Decoder(config, rngs=nnx.Rngs(0)))
    names = [f"{name}.weight" for group in linear_groups(CONFIG) for name in group]

    def packed(shape: tuple[int, int]):
        groups = shape[0] // G
        codes = rng.integers(0, 2, shape)
        scale, zero = scales.encoded(np.ones((groups, shape[1]))), np.zeros((groups, shape[1]), np.uint8)
        return pack(codes, scale, zero, np.full(groups, 2), group_size=G, widths=widths)

    blocks = [{**block, **{name: packed(block[name].shape) for name in names}} for block in blocks]
    return make_decoder(config, outer, blocks)


@pytest.fixture(scope="module")
def step() -> str:
    """HLO of the loop over tokens, for packed blocks of several widths."""
    generator = Generator(packed_model())
    at = Tokens(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros(1, bool))
    choice = Sampling().start(0, 1, CONFIG.vocab_size)
    state, stops = generator._empty(1, SLOTS), np.full(16, -1, np.int32)
    lowered = write.lower(generator._structure, generator._leaves, state, at, choice, stops, np.int32(4))
    return lowered.compile().as_text()


def layer_body(step: str) -> str:
    """The computation that the scan over layers runs: the one with the most calls of products."""
    bodies = re.split(r"\n(?=%?[\w.\-]+ \(|ENTRY)", step)
    return max(bodies, key=lambda body: len(re.findall(r"= .* call\(", body)))


def test_a_layer_takes_few_programs(step):
    body = layer_body(step)
    launched = len(re.findall(r"= \S+ (?:fusion|copy)\(", body))
    assert 20 < launched <= 45  # it was 211, then 103
    # Four products (q, k, v together; o; gate, up together; down), each with two loops at a time.
    assert len(re.findall(r"= .* call\(", body)) == 8
    assert " sort(" not in body


@pytest.mark.slow
def test_a_layer_whose_scales_bytes_cannot_hold_is_scanned_over_like_the_rest():
    model, other = packed_model(), packed_model()
    weight = other.blocks[1].attn.o.weight
    w = weight.get_value()
    assert w.scale.dtype == jnp.uint8
    weight.set_value(dataclasses.replace(w, scale=w.scales().astype(jnp.bfloat16)))
    found, wanted = Generator(other), Generator(model)
    assert found.stacked == wanted.stacked == [True]
    assert found.generate([[3, 4, 5]], max_tokens=6) == wanted.generate([[3, 4, 5]], max_tokens=6)


def test_the_cache_is_written_where_it_lies(step):
    """Neither the whole cache nor a layer's packed words are copied."""
    copies = re.findall(r"= (\S+?)\{\S* copy\(", step)
    assert f"f32[3,1,2,{SLOTS},16]" not in copies
    words = re.findall(r"= u32\[(\d+),(\d+)\]\S* (?:fusion|copy)\(", step)
    assert not [shape for shape in words if int(shape[0]) * int(shape[1]) >= 64 * 32 * 2 // 32]
    assert "f32[3,1,2,48,16]" in step


def on_an_nvidia_gpu(model: Decoder) -> Generator:
    with chips.target("h100"):
        return Generator(model)


def test_an_nvidia_gpu_scans_over_no_packed_blocks():
    """XLA would copy a layer's words before the kernel reads them."""
    model = packed_model()
    assert (on_an_nvidia_gpu(model).stacked, Generator(model).stacked) == ([False], [True])


def test_an_nvidia_gpu_multiplies_what_reads_one_input_in_one_launch():
    with chips.target("h100"):
        _, (blocks,), _ = ready(packed_model())
    for fused in blocks:
        block, merged = fused.block, fused.weights
        own = [layer.weight.get_value() for layer in (block.attn.o, block.mlp.down)]
        found = [merged["attn.q"], own[0], merged["mlp.gate"], own[1]]
        assert all(isinstance(w, Joined) for w in found)
        assert [len(w.sizes) for w in found] == [3, 1, 2, 1]
        assert [layer.weight.get_value() for layer in (block.attn.k, block.mlp.up)] == [None, None]
        assert [w.norm is not None for w in found] == [True, False, True, False]
        norms = (block.attn_norm, block.mlp_norm)
        assert all(isinstance(norm, Scaled) and norm.factor == 1 for norm in norms)


@pytest.mark.slow
def test_unrolled_blocks_write_the_same_tokens():
    model = packed_model()
    found = on_an_nvidia_gpu(model).generate([[1, 2, 3]], max_tokens=4)
    assert found == Generator(model).generate([[1, 2, 3]], max_tokens=4)
