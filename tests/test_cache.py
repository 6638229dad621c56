"""KV caches in fewer bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import CONFIG, packed_model

from pallas_kernels.tpu.cache_write import write_slot
from slim_jax.infer.decode_loop import next_logits, read
from slim_jax.infer.generate import Generator
from slim_jax.infer.sampling import Sampling
from slim_jax.model.cache import Int8Rows

TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 16)).astype(np.int32)


def test_rows_are_their_codes_under_a_scale():
    rows = jax.random.normal(jax.random.key(0), (3, 5, 16)).at[1, 2].set(0.0) * 7
    found = Int8Rows.of(rows)
    assert (found.codes.dtype, found.scale.shape) == (jnp.int8, (3, 5, 1))
    assert np.all(np.abs(found.decode() - rows) <= found.scale / 2 * 1.0001)
    np.testing.assert_allclose(np.abs(found.decode()).max(-1), np.abs(rows).max(-1), rtol=1e-6)
    assert not np.any(found.decode()[1, 2])


@pytest.mark.parametrize(("dtype", "start"), [("bfloat16", 37), ("float32", 16), ("float32", 7)])
def test_a_slot_is_written_by_a_kernel(dtype, start):
    rng = np.random.default_rng(0)
    keys, values = (jnp.asarray(rng.normal(size=(3, 2, 4, 40, 16)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, 4, 1, 16)), jnp.float32) for _ in range(2))
    found = write_slot(keys, values, k, v, jnp.int32(1), jnp.int32(start), interpret=True)
    for after, before, new in zip(found, (keys, values), (k, v)):
        np.testing.assert_array_equal(after, before.at[1, :, :, start].set(new[:, :, 0].astype(dtype)))


def after_reading(generator: Generator) -> tuple[jax.Array, int]:
    """Logits of one more token after :data:`TOKENS`, and the bytes of the cached keys and values."""
    state = generator._empty(len(TOKENS), 32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), TOKENS.shape)
    greedy = Sampling().start(0, len(TOKENS), CONFIG.vocab_size)
    _, state, _ = read(generator._structure, generator._leaves, state, TOKENS, positions, greedy)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.kv))
    state = state.grown(48)
    return next_logits(generator._structure, generator._leaves, state, jnp.full((2, 1), 16, jnp.int32)), size


@pytest.fixture(scope="module")
def plain() -> tuple[jax.Array, int]:
    return after_reading(Generator(packed_model()))


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 1 / 2), ("int8", 1 / 4 + 1 / 16)])
def test_fewer_bits_find_nearly_the_same_logits(plain, dtype, share):
    found, size = after_reading(Generator(packed_model(), cache_dtype=dtype))
    assert size == share * plain[1]  # a scale for 16 numbers is a quarter of their bytes; for 128 a 32nd
    apart = np.abs(found - plain[0]).max() / np.abs(plain[0] - plain[0].mean()).max()
    assert 0 < apart < 0.03


def test_what_a_cache_cannot_be_is_refused():
    with pytest.raises(ValueError, match="cache_dtype is int32, expected one of float32, bfloat16, int8"):
        Generator(packed_model(), cache_dtype=jnp.int32)
