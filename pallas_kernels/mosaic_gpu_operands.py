"""How the GPU kernel sees a plane, and x brought into the order that follows from it.

Plain arrays in, plain arrays out: nothing here knows Pallas. :mod:`pallas_kernels.mosaic_gpu` says why.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.layout import WORD_BITS, MixedTensor, plane_widths, zero_step

OFFSET = 128.0  # what is added to every code
MANTISSA_BITS = 7  # of a bfloat16
WORD_ROWS = 8  # of words, the halves of which are the 16 rows of a right operand
DEPTH = 16  # rows of a tensor-core instruction's right operand: channels per instruction
CHUNK = 16  # groups per instruction in the product with the zero points


@dataclasses.dataclass(frozen=True)
class Plane:
    """A plane of a code: its bits, how many planes of as many bits come before it, its place in the code."""

    bits: int
    copy: int
    shift: int

    @property
    def key(self) -> tuple[int, int]:
        """Which array of x it is multiplied by: planes of one width agree on the order of channels."""
        return self.bits, self.copy


def planes_of(width: int) -> tuple[Plane, ...]:
    """The planes of a ``width``-bit code, in the order in which they are stored."""
    planes: list[Plane] = []
    shift = 0
    for n in plane_widths(width):
        planes.append(Plane(n, sum(p.bits == n for p in planes), shift))
        shift += n
    return tuple(planes)


def slot_pairs(bits: int, group_size: int) -> list[tuple[int, int]]:
    """``(shift, bit)`` for each pair of slots of a word: how to bring it below the mask, and where that is.

    A plane with fewer than 8 rows of words is read several times over to fill the 8 rows of a tile; each
    time yields only its share of the pairs.
    """
    rows = group_size * bits // WORD_BITS
    pairs = WORD_BITS // (2 * bits) * min(rows, WORD_ROWS) // WORD_ROWS
    together = MANTISSA_BITS // bits
    return [(bits * (t - t % together), bits * (t % together)) for t in range(pairs)]


def channel_order(bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which channel of its group each row of the right operands is, and at which bit its code stands.

    Operands follow each other by tile of 8 word rows, then by pair of slots; row ``2 i + h`` of one comes
    from half ``h`` of word ``i`` of the tile.

    Returns:
      ``int32[group_size]``, a permutation, and ``int32[group_size]``.
    """
    rows, half_slots = group_size * bits // WORD_BITS, WORD_BITS // (2 * bits)
    pairs = slot_pairs(bits, group_size)
    channel, place = [], []
    for tile in range(max(1, rows // WORD_ROWS)):
        for t, (_, bit) in enumerate(pairs):
            for i in range(WORD_ROWS):
                repeat, row = (0, WORD_ROWS * tile + i) if rows >= WORD_ROWS else divmod(i, rows)
                for half in range(2):
                    slot = t + repeat * len(pairs) + half * half_slots
                    channel.append(slot * rows + row)
                    place.append(bit)
    return np.asarray(channel, np.int32), np.asarray(place, np.int32)


def activations(
    x: jax.Array, w: MixedTensor, keys: list[tuple[int, int]], rows: int
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """x as the kernel wants it: ``bfloat16[rows, G * g]`` per key, ``constant[G, rows]``, :func:`chunked`."""
    (m, k), groups, g = x.shape, w.groups, w.group_size
    x = jnp.pad(x.astype(jnp.bfloat16), ((0, rows - m), (0, groups * g - k)))

    def by_group(table: list[float]) -> jax.Array:  # a number per width -> float32[G] in storage order
        return jnp.repeat(jnp.asarray(table, jnp.float32), w.segments, total_repeat_length=groups)

    xs, constant = [], jnp.zeros((rows, groups), jnp.float32)
    for key in keys:
        channel, bit = channel_order(key[0], g)
        worth = by_group([sum(2.0**p.shift for p in planes_of(b) if p.key == key) for b in w.widths])
        factor = worth[:, None] * jnp.asarray(2.0**-bit, jnp.float32)[None]  # [G, g]
        index = w.order[:, None] * g + jnp.asarray(channel)[None]
        x_MxGxg = x.at[:, index].get(mode="promise_in_bounds") * factor.astype(jnp.bfloat16)[None]
        constant -= OFFSET * x_MxGxg.astype(jnp.float32).sum(-1)
        xs.append(x_MxGxg.reshape(rows, groups * g))

    total = x.astype(jnp.float32).reshape(rows, groups, g).sum(-1)
    total = total.at[:, w.order].get(mode="promise_in_bounds")
    steps = by_group([zero_step(b, w.widths) for b in w.widths])
    return xs, constant.T, chunked(-total * steps[None])


def chunked(sums: jax.Array) -> jax.Array:
    """``float32[M, G]`` as left operands ``bfloat16[chunks, 3, M, 16]``: 3 parts that add up to it exactly.

    The last chunk starts 16 groups before the end; groups that it shares with the one before are zero in it.
    """
    sums = jnp.pad(sums, ((0, 0), (0, max(0, CHUNK - sums.shape[1]))))
    groups = sums.shape[1]
    regular = np.arange(0, groups, CHUNK)[:, None]
    # As with words, rows 2 i and 2 i + 1 of the right operand are the halves of word i: groups i and i + 8.
    halves = np.arange(CHUNK).reshape(2, CHUNK // 2).T.reshape(1, -1)
    position = np.minimum(regular, groups - CHUNK) + halves
    rest = jnp.where(jnp.asarray(position >= regular)[None], sums[:, position], 0).transpose(1, 0, 2)
    parts = []
    for _ in range(3):
        parts.append(rest.astype(jnp.bfloat16))
        rest = rest - parts[-1].astype(jnp.float32)
    return jnp.stack(parts, 1)
