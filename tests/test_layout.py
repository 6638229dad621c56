"""The packed layout, compared with an oracle that reads the words bit by bit as the docstring says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import MixedTensor, layout, pack
from pallas_kernels.planes import plane_widths

dequantize = jax.jit(lambda w: w.dequantize(jnp.float32))
as_on_a_gpu = jax.jit(lambda w: layout._dequantize_elements(w, jnp.dtype(jnp.float32)))


def random_parts(k, n, group_size, bits, seed=0, widths=None):
    """Random codes, scales and zero codes that fit ``bits``; ``widths`` are those that groups may have."""
    rng = np.random.default_rng(seed)
    bits = np.asarray(bits)
    limit = np.repeat(1 << bits, group_size)[:k, None]
    scale = np.asarray(jnp.asarray(rng.uniform(0.01, 0.1, (len(bits), n)), jnp.bfloat16))
    zero_code = rng.integers(0, 16 if max(widths or bits) <= 4 else 256, (len(bits), n))
    return {"codes": rng.integers(0, limit, (k, n)), "scale": scale, "zero_code": zero_code, "bits": bits}


def oracle_weight(codes, scale, zero_code, bits, group_size, widths=None):
    """Computes ``scale * (code - zero)`` in float32, from the definition."""
    group = np.arange(codes.shape[0]) // group_size
    z = 4 if max(widths or bits) <= 4 else 8
    zero = (zero_code * 2.0 ** (np.asarray(bits)[:, None] - z)).astype(np.float32)
    return scale.astype(np.float32)[group] * (codes.astype(np.float32) - zero[group])


def oracle_codes(w: MixedTensor):
    """Codes ``[G * g, N]``, read from the words one bit field at a time."""
    g, words = w.group_size, np.asarray(w.words).astype(object)
    codes = np.zeros((w.groups * g, w.shape[1]), object)
    row = 0
    for position, group in enumerate(np.asarray(w.order)):
        b = np.repeat(w.widths, np.asarray(w.segments))[position]
        shift = 0
        for width in {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [4, 4]}[b]:
            rows = g * width // 32
            for channel in range(g):
                slot, j = divmod(channel, rows)
                field = (words[row + j] >> (slot * width)) % 2**width
                codes[group * g + channel] += field * 2**shift
            row, shift = row + rows, shift + width
    assert row == words.shape[0]
    return codes.astype(np.int64)


@st.composite
def layouts(draw):
    group_size = draw(st.sampled_from([32, 64, 128]))
    groups = draw(st.integers(1, 5))
    k = group_size * groups - draw(st.integers(0, group_size - 1))
    bits = draw(st.lists(st.integers(1, 8), min_size=groups, max_size=groups))
    return k, draw(st.integers(1, 5)), group_size, bits


@given(layouts(), st.integers(0, 2**16))
def test_words_hold_the_codes_where_the_docstring_says(drawn, seed):
    k, n, group_size, bits = drawn
    parts = random_parts(k, n, group_size, bits, seed)
    w = pack(**parts, group_size=group_size)
    codes = oracle_codes(w)
    np.testing.assert_array_equal(codes[:k], parts["codes"])
    assert not codes[k:].any()
    np.testing.assert_array_equal(w.bits(), bits)
    np.testing.assert_array_equal(np.asarray(w.zero_codes()), parts["zero_code"][np.asarray(w.order)])
    assert w.words.shape[0] == sum(bits) * group_size // 32
    assert w.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(w))


@settings(max_examples=10)  # each compiles
@given(layouts(), st.integers(0, 2**16))
def test_dequantize_is_the_definition_bit_for_bit(drawn, seed):
    k, n, group_size, bits = drawn
    parts = random_parts(k, n, group_size, bits, seed)
    w, expected = pack(**parts, group_size=group_size), oracle_weight(**parts, group_size=group_size)
    np.testing.assert_array_equal(np.asarray(dequantize(w)), expected)
    np.testing.assert_array_equal(np.asarray(as_on_a_gpu(w)), expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_beside_another(bits):
    parts = random_parts(100, 7, 32, [bits, bits, bits, 1], seed=bits)
    w = pack(**parts, group_size=32, dtype=jnp.bfloat16)
    expected = oracle_weight(**parts, group_size=32)
    np.testing.assert_array_equal(np.asarray(dequantize(w)), expected)
    np.testing.assert_array_equal(np.asarray(as_on_a_gpu(w)), expected)
    assert jax.eval_shape(w.dequantize).dtype == jnp.bfloat16


def test_two_bits_cost_at_most_2_17():
    bits = np.array([1] * 8 + [2] * 16 + [3] * 8)
    w = pack(**random_parts(4096, 4096, 128, bits), group_size=128)
    assert 2 < w.bits_per_weight <= 2.17


def test_stacked_leaves_scan():
    allocations = [2, 1, 3], [1, 2, 3], [2, 2, 2]
    parts = [random_parts(90, 4, 32, bits, seed) for seed, bits in enumerate(allocations)]
    layers = [pack(**part, group_size=32, widths=(1, 2, 3)) for part in parts]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    _, dense = jax.lax.scan(lambda carry, w: (carry, w.dequantize()), None, stacked)
    expected = np.stack([oracle_weight(**part, group_size=32) for part in parts])
    np.testing.assert_array_equal(np.asarray(dense), expected)
    assert stacked.bits_per_weight == layers[0].bits_per_weight


def test_a_stack_is_indexed_by_layers():
    layers = [pack(**random_parts(64, 4, 32, [2, 2], seed), group_size=32) for seed in range(3)]
    stacked = layout.stack(layers)
    assert (layers[0].ndim, stacked.ndim, len(stacked)) == (2, 3, 3)
    for one, layer in zip(stacked, layers, strict=True):
        np.testing.assert_array_equal(one.words, layer.words)
    np.testing.assert_array_equal(stacked[-1].scale, layers[2].scale)
    np.testing.assert_array_equal(jax.jit(lambda w, i: w[i].words)(stacked, 1), layers[1].words)
    with pytest.raises(IndexError, match="layer is 3, expected one of 3"):
        stacked[3]
    with pytest.raises(TypeError, match="no stack of layers"):
        layers[0][0]
    assert jax.eval_shape(layers[0].astype("bfloat16").dequantize).dtype == jnp.bfloat16


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_plane_widths_rejects(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        plane_widths(bits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 48}, "multiple of 32"),
        ({"group_size": 16}, "multiple of 32"),
        ({"bits": np.array([2, 9])}, "not all in widths"),
        ({"widths": (1, 3)}, "not all in widths"),
        ({"widths": (2, 9)}, "not all in widths"),
        ({"scale": np.ones((2, 4), np.float32)}, "scale has shape"),
        ({"zero_code": np.zeros((3, 3), int)}, "zero_code has shape"),
        ({"bits": np.array([2, 2, 2])}, "bits has shape"),
        ({"zero_code": np.full((2, 3), 16)}, "zero_code goes up to 16"),
        ({"codes": np.full((64, 3), 4)}, "does not fit"),
        ({"codes": np.full((64, 3), -1)}, "does not fit"),
    ],
)
def test_pack_rejects(change, message):
    arguments = {**random_parts(64, 3, 32, [2, 2]), "group_size": 32, **change}
    with pytest.raises(ValueError, match=message):
        pack(**arguments)
