"""Positions of codes in words, and x in the order that follows from them, for the GPU kernel.

Takes and returns plain arrays: nothing here depends on Pallas. :mod:`pallas_kernels.gpu.kernel` explains the
method.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu.joined import DEPTH, Joined, channels_of_slots
from pallas_kernels.planes import WORD_BITS

OFFSET = 128.0  # added to every code
MANTISSA_BITS = 7  # of a bfloat16
WORD_ROWS = 8  # rows of words; their halves are the 16 rows of a right operand
ROW_TILE = 16  # rows of x per instruction


@dataclasses.dataclass(frozen=True)
class Field:
    """Position of the codes of one right operand: shift a tile of words right by ``by``, then mask."""

    tile: int
    by: int
    mask: int


def places(widths: tuple[int, ...], group_size: int) -> np.ndarray:
    """Bit of their half word at which the codes of every right operand begin, ``int[g / 16]``.

    From one operand to the next, codes lie ``256 / g`` bits further up in all planes. As many operands as the
    mantissa has room for leave their codes in place and share one shift. The bits depend on the widest code
    that may occur and not on a group's own width: so x, which is divided by two to these powers, is the same
    for all groups.
    """
    apart = 2 * 128 // group_size
    together = (MANTISSA_BITS - min(4, max(widths))) // apart + 1
    return np.arange(group_size // DEPTH) % together * apart


def fields(n: int, shift: int, group_size: int, place: np.ndarray) -> list[Field]:
    """Positions of one plane in words, for every right operand of a group.

    The plane has ``n`` bits and is ``shift`` bits up in the code. In every plane, channel ``8 t + i`` of a
    half group is row ``i`` of operand ``t``: a plane with more than 8 rows of words uses its tiles of 8 in
    rotation; one with fewer repeats its rows, each copy shifted one slot further
    (:meth:`~pallas_kernels.gpu.registers.Warps.full_tiles`).
    """
    rows = group_size * n // WORD_BITS
    tiles, repeats = max(1, rows // WORD_ROWS), max(1, WORD_ROWS // rows)
    found = []
    for t, bit in enumerate(map(int, place)):
        up = bit + shift % 4
        found.append(Field(t % tiles, t // tiles * n * repeats - up, ((1 << n) - 1) * 0x10001 << up))
    return found


def padded_groups(w: Joined, split: int) -> int:
    """``P``, the number of groups of x for a weight.

    It counts all groups and those that K-slices read past the end, in whole chunks.
    """
    return -(-(w.groups + split - 1) // (DEPTH * split)) * DEPTH * split


def powers(w: Joined) -> np.ndarray:
    """Powers of two by which a group's channels are divided, in storage order, ``float32[g]``."""
    return np.repeat(2.0 ** places(w.widths, w.group_size), DEPTH).astype(np.float32)


class Operands(NamedTuple):
    """x prepared for the kernel, for ``B`` blocks of rows; sums may come in ``Q`` parts that are to be added.

    Attributes:
      x: ``bfloat16[B * W * P * block, g]``, divided by two to the :func:`places`.
      constant: ``float32[B * Q, W * P * block]``, minus :data:`OFFSET` times the sum of x: the offset
        correction.
      sums: ``float32[M / 16 * Q, C * 16, 16]``, minus the sums times the steps of zeros, as left operands,
        for the ``C`` chunks of 16 groups of all weights.
      squares: sums of squares of the norm's input, ``float32[B, W * P * block]``; None without a norm.
      parts: ``Q``.
    """

    x: jax.Array
    constant: jax.Array
    sums: jax.Array
    squares: jax.Array | None
    parts: int = 1


def activations(x: jax.Array, w: Joined, rows: int, block: int, split: int) -> Operands:
    """Prepares x and its sums for the kernel, for ``rows / block`` blocks of rows.

    A block's groups follow each other in the storage order of every weight (of which there are ``W``),
    ``block`` rows each, so that one copy loads several groups. After those of a weight come others, of any
    values: :func:`padded_groups` in all. If there is a norm before the product, only its scale is applied
    here: the kernel computes each row's divisor from its squares, because a sum over the row would be one
    more launch.
    """
    (m, k), groups, g = x.shape, w.groups, w.group_size
    padded = padded_groups(w, split)
    shape = (len(w.sizes), padded // DEPTH, DEPTH)  # in chunks from the start, so that no sum has to be moved

    def by_group(a: jax.Array) -> jax.Array:  # [rows, *shape, ...] -> [B, W * P * block, ...]
        a = jnp.moveaxis(a.reshape(-1, block, *a.shape[1:]), 1, 4)
        return a.reshape(a.shape[0], -1, *a.shape[5:])

    def of_groups(a: jax.Array) -> jax.Array:  # [W, G] -> [*shape, 1]
        return jnp.pad(a, ((0, 0), (0, padded - groups))).reshape(*shape, 1)

    channel = channels_of_slots(g).reshape(1, 1, 1, g)
    power = jnp.asarray(powers(w)).reshape(1, 1, 1, g)
    place = of_groups(w.orders) * g + channel

    def in_order(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, ((0, rows - m), (0, groups * g - k)))
        return a.at[:, place].get(mode="promise_in_bounds")

    norm, given = w.norm, x
    x = in_order((x if norm is None else x * norm.scale[None]).astype(jnp.bfloat16))
    x = x / power.astype(jnp.bfloat16)[None]
    # Factors are powers of two, so they may be applied before the sums; then a launch only computes sums.
    wide = x.astype(jnp.float32)
    sums = (wide * (-power * of_groups(w.zero_steps))[None]).sum(-1)
    sums = sums.reshape(-1, ROW_TILE, sums[0].size // DEPTH, DEPTH).swapaxes(1, 2)
    sums = sums.reshape(len(sums), -1, DEPTH)
    squares = None if norm is None else by_group(jnp.square(in_order(given.astype(jnp.float32))).sum(-1))
    return Operands(by_group(x).reshape(-1, g), by_group((wide * -OFFSET).sum(-1)), sums, squares)
