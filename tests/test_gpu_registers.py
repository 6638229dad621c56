"""Register operations of the GPU kernel, executed for every thread of a warpgroup in NumPy.

Interpret mode replaces the functions of ``pallas_kernels.gpu.registers`` that rename registers, and the
tensor-core instruction, by functions of arrays. Here the real functions emit their instructions,
``tests/warpgroup.py`` executes them on registers filled by Mosaic's layouts, and the results must equal those
of interpret mode. Only a device can test Mosaic's loads and stores, ptxas, and timing.
"""

import itertools
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu.mma import mma
from warpgroup import elements, warpgroup

from pallas_kernels.gpu import registers
from pallas_kernels.gpu.kernel import MAGIC
from pallas_kernels.gpu.operands import DEPTH, OFFSET, ROW_TILE, WORD_ROWS, fields, places
from pallas_kernels.gpu.registers import Warps
from pallas_kernels.planes import pack_group, pieces

SPLITS = [(split, n) for split in (1, 2, 4) for n in (32, 64, 128, 256)]  # as Config allows


@pytest.fixture
def group(monkeypatch):
    """A warpgroup; the emitting functions emit when they are called, not when JAX lowers them."""

    def inline_mgpu(*, arg_types=(), return_type=None):
        return lambda function: lambda *arrays: function(None, *arrays)

    def broadcast_in_dim(array, shape, dims):
        if isinstance(array, jax.Array):
            return jax.lax.broadcast_in_dim(array, shape, dims)
        layout = Warps(shape[0] // ROW_TILE, False).accumulator
        return array.broadcast_in_dim(shape, tuple(dims), layout.to_mgpu())

    emitting = {
        "plgpu": {"inline_mgpu": inline_mgpu, "mma": mma},
        "lax": {"broadcast_in_dim": broadcast_in_dim},
    }
    for module, functions in emitting.items():
        everything = vars(getattr(registers, module)) | functions
        monkeypatch.setattr(registers, module, SimpleNamespace(**everything))
    with warpgroup() as found:
        yield found


def share_of_thread(group, split):
    """Index of the K-slice that each thread works on, by ``Warps.share``."""
    if split == 1:
        return np.zeros(128, int)
    return group.value(Warps(split, False).share().registers.item()).astype(int)


def test_layouts_mean_what_mosaic_takes_them_for(group):
    """Checks `elements`, on which all other tests rely, against Mosaic's own indices per thread."""
    for split, n in SPLITS[::2] + SPLITS[1::4]:
        warps = Warps(split, False)
        shapes = {warps.accumulator: (warps.rows, n), warps.left: (warps.rows, 16), warps.right: (16, n)}
        shapes |= {warps.results(n): (warps.rows, n), warps.results(n).reduce(0): (n,)}
        shapes |= {warps.stored(n): (warps.rows, n)}
        shapes |= {warps.words(n, rows): (rows, n) for rows in (1, 2, 4, 8)}
        for layout, shape in shapes.items():
            layout = layout.to_mgpu()
            emitted = np.array(list(layout.thread_idxs(shape)), object)  # [registers, rank]
            indices = np.array([group.value(i) for i in emitted.flat], int).reshape(*emitted.shape, -1)
            first = np.ravel_multi_index(tuple(np.moveaxis(indices, 1, 0)), shape)
            np.testing.assert_array_equal(elements(layout, shape)[..., 0], first.T)


@pytest.mark.parametrize(("split", "n"), SPLITS)
def test_what_is_stored_fits_a_tile_of_the_swizzle(split, n):
    """A longer vector is stored where nothing reads it: on an H200, all split-K results were wrong."""
    vector = Warps(split, False).stored(n).to_mgpu().vector_length
    assert 4 * vector <= registers.VECTOR_BYTES


@pytest.mark.parametrize("split", [1, 2, 4])
def test_shares_are_the_warps_that_the_accumulator_gives_their_rows(group, split):
    warps = Warps(split, False)
    rows = elements(warps.accumulator.to_mgpu(), (warps.rows, 32)) // 32
    expected = np.broadcast_to(share_of_thread(group, split)[:, None, None], rows.shape)
    np.testing.assert_array_equal(rows // ROW_TILE, expected)


@pytest.mark.parametrize(("split", "n"), [(split, n) for split, n in SPLITS if n in (32, 128)])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_words_of_few_rows_become_full_tiles(group, split, n, rows):
    words = np.random.default_rng(rows).integers(0, 2**32, (rows, n), np.uint32)
    warps, bits = Warps(split, False), 4 if rows == 4 else 2 if rows == 2 else 1
    (found,) = warps.full_tiles([group.load(words, warps.words(n, rows))], bits)
    (expected,) = Warps(split, True).full_tiles([jnp.asarray(words)], bits)
    np.testing.assert_array_equal(group.store(found), expected)


@pytest.mark.parametrize(("split", "n"), SPLITS)
def test_a_product_of_words_is_that_of_interpret_mode(group, split, n):
    """Tests `as_operand`, `mma`, `as_accumulator`, `from_accumulator`, with operands per K-slice."""
    draw = np.random.default_rng(n).integers
    warps, interpreted, share = Warps(split, False), Warps(split, True), share_of_thread(group, split)
    operand = draw(-8, 8, (split, 8, n, 2)).astype(jnp.bfloat16)
    words, scale = operand.view(np.uint32)[..., 0], draw(1, 200, (split, n)).astype(jnp.bfloat16)
    x, start = draw(-8, 8, (warps.rows, 16)).astype(jnp.bfloat16), draw(-8, 8, warps.rows).astype(np.float32)

    acc = group.load(start, warps.accumulator.reduce(1))
    acc = acc.broadcast_in_dim((warps.rows, n), (0,), warps.accumulator.to_mgpu())
    acc = warps.mma(
        acc, group.load(x, warps.left), warps.as_operand(group.load(words, warps.words(n), share))
    )
    worth = warps.as_accumulator(group.load(scale, warps.results(n).reduce(0), share))
    found = group.store(warps.from_accumulator(group.map(np.multiply, acc, worth)))

    left = x.reshape(split, ROW_TILE, 16).astype(np.float32)
    right = operand.astype(np.float32).swapaxes(2, 3).reshape(split, 16, n)  # row 2 j: a word's low half
    by_hand = (left @ right + start.reshape(split, ROW_TILE, 1)) * scale.astype(np.float32)[:, None]
    np.testing.assert_array_equal(found, by_hand.reshape(found.shape))
    if n == 32:  # once per split: compiling takes longer than the rest
        expected = jnp.broadcast_to(jnp.asarray(start)[:, None], (warps.rows, n))
        expected = interpreted.mma(expected, jnp.asarray(x), interpreted.as_operand(jnp.asarray(words)))
        np.testing.assert_array_equal(found, expected * interpreted.as_accumulator(jnp.asarray(scale)))


def groups_and_products():
    """Yields groups and shapes of products: half of all pairs are quick, with each group and each shape."""
    groups = [*((128, b) for b in range(1, 9)), *((g, b) for g in (32, 64) for b in (1, 2, 3, 4))]
    for (i, product), group in itertools.product(enumerate([(1, 32), (1, 128), (2, 32), (4, 32)]), groups):
        mark = pytest.mark.slow if (i + group[0] // 32 + group[1]) % 2 else ()
        yield pytest.param(*group, *product, marks=mark)


@pytest.mark.parametrize(("group_size", "bits", "split", "n"), list(groups_and_products()))
def test_groups_of_every_width_are_multiplied(group, group_size, bits, split, n):
    """One group per K-slice, from packed words to stored results; exact, because all values are integers."""
    draw = np.random.default_rng(bits).integers
    codes = draw(0, 1 << bits, (split, group_size, n))
    scale = draw(1, 16, (split, n)).astype(jnp.bfloat16)
    x = draw(-8, 9, (split, ROW_TILE, group_size)).astype(np.float32)
    # Rows 2 i and 2 i + 1 of a right operand are the halves of word i: channels of the halves of a group.
    channel = np.arange(group_size).reshape(2, -1, WORD_ROWS).transpose(1, 2, 0).reshape(-1)
    place = places((1, 2, 3, 4) if bits <= 4 else (bits,), group_size)
    ordered = (x[..., channel] / np.repeat(2.0**place, DEPTH)).reshape(-1, group_size).astype(jnp.bfloat16)
    start = -OFFSET * ordered.astype(np.float32).sum(-1)

    warps, share = Warps(split, False), share_of_thread(group, split)
    left = [group.load(tile, warps.left) for tile in np.split(ordered, len(place), axis=1)]
    worth = warps.as_accumulator(group.load(scale, warps.results(n).reduce(0), share))
    words, row, total = np.stack([pack_group(own, bits) for own in codes]), 0, 0.0
    for i, piece in enumerate(pieces(bits)):
        planes = []
        for width, _ in piece:
            end = row + group_size * width // 32
            tiles = [words[:, r : min(r + WORD_ROWS, end)] for r in range(row, end, WORD_ROWS)]
            layout = warps.words(n, tiles[0].shape[1])
            planes.append(warps.full_tiles([group.load(tile, layout, share) for tile in tiles], width))
            row = end
        acc = group.load(start, warps.accumulator.reduce(1))
        acc = acc.broadcast_in_dim((warps.rows, n), (0,), warps.accumulator.to_mgpu())
        found = [fields(width, shift, group_size, place) for width, shift in piece]
        for x_t, *fields_t in zip(left, *found, strict=True):
            tiles = [plane[field.tile] for plane, field in zip(planes, fields_t)]
            code = group.map(partial(joined, fields_t), *tiles)
            acc = warps.mma(acc, x_t, warps.as_operand(code))
        part = group.map(lambda a, scale, i=i: a * scale * np.float32(16.0**i), acc, worth)
        total = total + group.store(warps.from_accumulator(part))
    expected = x @ codes.astype(np.float32) * scale.astype(np.float32)[:, None]
    np.testing.assert_array_equal(total, expected.reshape(total.shape))


def joined(fields_t, *words):
    """Builds a right operand of the kernel: the planes' codes, masked and joined, on top of 128."""
    code = np.full_like(words[0], MAGIC)
    for field, word in zip(fields_t, words):
        shifted = word >> np.uint32(field.by) if field.by >= 0 else word << np.uint32(-field.by)
        code |= shifted & np.uint32(field.mask)
    return code
