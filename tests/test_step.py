"""The compiled decode step: how many programs a layer takes on a CPU, and what of the cache is written."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import pack
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder, linear_groups
from slim_jax.model.generate import Generator
from slim_jax.model.params import make_decoder, split_params
from slim_jax.model.step import forward

SLOTS, G = 48, 32
CONFIG = DecoderConfig(
    *("llama", 96, 64, 128),  # family, vocabulary, hidden and intermediate size
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=64,
)


@pytest.fixture(scope="module")
def step() -> str:
    """The HLO of one token through packed blocks of several widths."""
    rng = np.random.default_rng(0)
    outer, blocks = split_params(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    names = [f"{name}.weight" for group in linear_groups(CONFIG).values() for name in group]

    def packed(shape: tuple[int, int]):
        groups = shape[0] // G
        codes = rng.integers(0, 2, shape)
        scale, zero = np.ones((groups, shape[1])), np.zeros((groups, shape[1]), np.uint8)
        return pack(codes, scale, zero, np.full(groups, 2), group_size=G, widths=(1, 2, 3))

    blocks = [{**block, **{name: packed(block[name].shape) for name in names}} for block in blocks]
    generator = Generator(make_decoder(CONFIG, outer, blocks))

    state, treedef = jax.tree.flatten(generator._empty(1, SLOTS))

    def run(leaves, state, tokens, positions):
        outer, blocks = jax.tree.unflatten(generator._treedef, leaves)
        return forward(outer, blocks, jax.tree.unflatten(treedef, state), tokens, positions)

    token = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(run, donate_argnums=1).lower(generator._leaves, state, token, token).compile().as_text()


def test_a_layer_takes_few_programs(step):
    bodies = re.split(r"\n(?=%?[\w.\-]+ \(|ENTRY)", step)
    counts = [len(re.findall(r"= \S+ (?:fusion|copy)\(", body)) for body in bodies if "ENTRY" not in body[:6]]
    assert 30 < max(counts) <= 90  # it was 211


def test_the_cache_is_written_where_it_lies(step):
    """Nothing of the whole cache's size is copied, nor is a layer's packed words."""
    copies = re.findall(r"= (\S+?)\{\S* copy\(", step)
    assert f"f32[3,1,2,{SLOTS},16]" not in copies
    words = re.findall(r"= u32\[(\d+),(\d+)\]\S* fusion\(", step)
    assert not [shape for shape in words if int(shape[0]) * int(shape[1]) >= 64 * 32 * 2 // 32]
    assert "f32[3,1,2,48,16]" in step
