"""The matmul on NVIDIA GPUs: one Pallas Mosaic GPU kernel for sm_80, sm_90a and sm_100a, decode and prefill.

A *block* of 128 threads (four warps) computes a tile of ``y``: ``block_m`` rows by ``block_n`` columns, over
all groups. It processes the groups of one width after another. The number of groups of a width is data, so
each width has a loop of its own whose trip count is read from memory, and no branch depends on the width of a
group. The warps divide the columns among them or, with ``split_k``, the groups of each width (K-slices):
there are then more and narrower blocks, while the work and the cost of a warp stay the same. The K-slices are
added through shared memory, so ``y`` is written once and partial sums never.

*Codes are never converted one by one.* A bfloat16 in [128, 256) has 7 bits of mantissa with values 64 ... 1,
so

    (word >> shift) & (mask * 0x00010001 << bit) | 0x43004300

is two bfloat16 numbers, ``128 + 2**bit * code`` of slot ``s`` (low half) and of slot ``s + slots / 2`` (high
half), which the tensor cores take as they are. Several slots share one shift. The planes of a code of up to 4
bits hold the same channels, each plane at its own bits of the mantissa (the 1-bit plane of 3 bits two bits
further up), and are joined: one product. Wider codes are two products, the second multiplied by 16. What
these numbers contain besides the code is corrected elsewhere, at little cost, or none per weight:

* ``2**bit`` is divided out of x, exactly. x is also brought into the order in which words yield channels,
  which is the same for all widths (:func:`~pallas_kernels.gpu.operands.fields`). XLA does both before the
  kernel, in one copy of x.
* the 128: a group's sum starts at ``-128 * sum(x')`` and not at 0 (``constant``).
* scales multiply a group's finished sum, ``[block_m, block_n]``.
* zero points: ``y -= (sum of x per group) @ (scale * zero)``, a product with one column per *group*, computed
  by the same tensor cores after the loops, with both sides split into bfloat16 parts so that nothing is lost.

*Memory.* A word is used by one thread only (but for all ``block_m`` rows), so words and scales are loaded
directly from memory into registers, one step ahead of their use; x is pipelined through shared memory. Every
block reads all of its rows of x, from the L2 cache: with a ``split_k`` of 4 that is four times as much as
with 1. In decode nearly all that is read from memory is words; in prefill a masked word serves
``block_m / 16`` tensor-core instructions.

x is rounded to bfloat16; products are exact and summed in float32. Because a sum runs over ``128 + code``,
its rounding error is that of float32 sums some 2**6 times larger than the result: about 1e-5 of
``sum |x| |w|``, far below the error of rounding x.

:mod:`pallas_kernels.gpu.registers` says what interpret mode does not test.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import chips
from pallas_kernels.gpu.config import NAME as NAME
from pallas_kernels.gpu.config import Config as Config
from pallas_kernels.gpu.config import check_supported, fitted
from pallas_kernels.gpu.config import heuristic as heuristic
from pallas_kernels.gpu.joined import Joined, alone
from pallas_kernels.gpu.operands import ROW_TILE, Operands, activations
from pallas_kernels.gpu.tile import References, Tile
from pallas_kernels.layout import MixedTensor, result_type

MAGIC = 0x43004300  # two bfloat16 of 128


def mixed_matmul(
    x: jax.Array,
    w: MixedTensor | Joined,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """``x @ w (+ bias) (+ residual)``, x rounded to bfloat16, accumulated in float32.

    A prepared weight may apply a norm to x first.

    Args:
      x: bfloat16 or float32 ``[M, K]``.
      w: the packed weight ``[K, N]``, which is prepared here on every call, or several side by side.
      bias: ``[N]``, added in float32.
      residual: ``[M, N]``, added in float32; by the kernel if M is 1.
      config: if None, the :func:`heuristic` for the target, reduced to fit the target's shared memory.
      interpret: run by the Pallas interpreter, on any platform.

    Returns:
      float32 ``[M, N]``.

    Raises:
      NotImplementedError: this kernel does not support the product or the target; see
        :func:`~pallas_kernels.gpu.config.check_supported`.
    """
    (m, _), n = x.shape, w.shape[1]
    weight = alone(w) if isinstance(w, MixedTensor) else w
    config = configured(m, x.dtype, weight, config)
    if residual is not None and not takes_residual(m, config):
        return residual + mixed_matmul(x, w, bias=bias, config=config, interpret=interpret)
    if residual is not None:
        bias = residual[0] if bias is None else residual[0] + bias
    if bias is not None:
        bias = jnp.pad(bias, (0, weight.shape[1] - n))
    return weight.in_order(_product(x, weight, bias, config, interpret)[:m, :n])


def configured(m: int, dtype: jnp.dtype, w: Joined, config: Config | None) -> Config:
    """Configuration of a product of ``m`` rows of x; raises as :func:`mixed_matmul`."""
    device = chips.of_target()
    if config is None and m:
        config = fitted(heuristic(device.name, m, *w.shape), device, w.group_size)
    check_supported(device, dtype, m, w.group_size, config)
    assert config is not None
    # A block has columns of one tile.
    return dataclasses.replace(config, block_n=math.gcd(config.block_n, w.words.shape[1]))


def takes_residual(m: int, config: Config) -> bool:
    """True if the kernel itself adds a residual to the product, and writes one row if x has one."""
    return m == 1 and config.block_m == ROW_TILE


def _pairs(a: jax.Array) -> jax.Array:
    """``[G, n]`` as ``[G / 2, 2, n]``, in pairs of consecutive groups."""
    return a.reshape(-1, 2, a.shape[1])


@partial(jax.jit, static_argnames=("config", "interpret"))  # traced once for all layers of a shape
def _product(x: jax.Array, w: Joined, bias: jax.Array | None, config: Config, interpret: bool) -> jax.Array:
    """``float32[rows, N]``: whole tiles of rows, or one row."""
    rows = -(-x.shape[0] // config.block_m) * config.block_m
    operands = activations(x, w, rows, config.block_m, config.split_k)
    return multiply(operands, x.shape[0], w, bias, config, interpret)


def multiply(
    operands: Operands,
    m: int,
    w: Joined,
    bias: jax.Array | None,
    config: Config,
    interpret: bool,
) -> jax.Array:
    """:func:`_product` of ``m`` rows of x that are prepared."""
    n = w.shape[1]
    rows = -(-m // config.block_m) * config.block_m
    # For one row of x only one row is written: slicing it out would be a launch before the next kernel.
    out_rows = 1 if m == 1 and config.block_m == ROW_TILE else rows
    kernel = plgpu.kernel(
        partial(_body, w=w, config=config, n=n, sum_parts=operands.parts, interpret=interpret),
        out_type=result_type((out_rows, n), (operands.x, w)),
        grid=(rows // config.block_m, -(-n // config.block_n)),
        grid_names=("m", "n"),
        kernel_name="mixed_matmul",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    inside = [] if bias is None else [bias.astype(jnp.float32)]
    return kernel(*references(operands, w), *inside)


def references(operands: Operands, w: Joined) -> References:
    """The kernel's inputs."""
    # The magic number comes from memory because as a literal it would be loaded again before every mask.
    magic = jnp.full((1,), MAGIC, jnp.int32)
    return References(
        magic=magic,
        segments=w.segments,
        first_rows=w.first_rows[0],
        words=w.words,
        scale=w.scale,
        zero_pairs=_pairs(w.zero),
        scale_pairs=_pairs(w.scale),
        x=operands.x,
        constant=operands.constant,
        sums=operands.sums,
        squares=magic if operands.squares is None else operands.squares,  # not read without a norm
    )


def _body(  # type: ignore[no-untyped-def]
    *refs, w: Joined, config: Config, n: int, sum_parts: int, interpret: bool
) -> None:
    """Computes one block's tile of y, over all groups."""
    inputs, (*bias, out) = References.of(refs)
    tile = Tile(inputs, w, config, n, interpret, sum_parts)
    acc = tile.subtract_zeros(tile.add_segments(tile.nothing()))
    tile.store(acc, out, bias[0] if bias else None)
