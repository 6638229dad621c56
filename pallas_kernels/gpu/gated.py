"""An MLP of few rows in three launches on NVIDIA GPUs: preparing x, then gate and up, then down.

A block of gate and up computes the same columns of both, one after the other, and writes what down reads:
``act(gate) * up``, rounded, in the order of down's words, and the sums of its part of a group. For that, gate
and up are stored in that order (`Joined.feeds`); the position of a group in down's order is data.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import chips
from pallas_kernels.gpu import kernel
from pallas_kernels.gpu.config import Config, shared_bytes
from pallas_kernels.gpu.joined import DEPTH, Joined
from pallas_kernels.gpu.operands import OFFSET, ROW_TILE, Operands, activations, padded_groups, powers
from pallas_kernels.gpu.registers import tiled
from pallas_kernels.gpu.tile import References, Tile
from pallas_kernels.layout import result_type

COLUMNS = 32
"""Columns of gate, and of up, in a block."""


def _silu(a: jax.Array) -> jax.Array:
    return a / (1 + jnp.exp(-a))


def _gelu_tanh(a: jax.Array) -> jax.Array:
    return 0.5 * a * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (a + 0.044715 * a * a * a)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": _silu, "gelu_tanh": _gelu_tanh}
"""Activations that the kernel has, by name."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Configurations of an MLP's launches: ``entry`` for gate and up, ``exit`` for down."""

    entry: Config
    exit: Config


def plan(m: int, dtype: jnp.dtype, w: Joined, down: Joined, activation: str) -> Plan:
    """Plan of ``down(act(gate(x)) * up(x))`` for ``m`` rows of x.

    Args:
      m: rows of x.
      dtype: dtype of x.
      w: gate and up.
      down: the other product, alone.
      activation: name of the activation.

    Raises:
      NotImplementedError: the kernel does not support the target, the rows, the weights or the activation.
    """
    refused = NotImplementedError(f"mosaic_gpu has no kernel for {m} rows of this MLP with {activation}")
    groups = down.groups
    fits = len(w.sizes) == 2 and w.sizes[0] == w.sizes[1] == groups * w.feeds and w.feeds == down.group_size
    if not fits or not 0 < m <= ROW_TILE or activation not in ACTIVATIONS:
        raise refused
    entry, exit_ = (kernel.configured(m, dtype, one, None) for one in (w, down))
    if entry.block_m != ROW_TILE or exit_.block_m != ROW_TILE:
        raise refused
    entry = dataclasses.replace(entry, block_n=COLUMNS)
    kept = 2 * math.prod(_shares(entry)) * 4  # in addition to what a product needs
    limit = chips.of_target().scratch_bytes
    if limit is not None and shared_bytes(entry, w.group_size) + kept > limit:
        raise refused
    return Plan(entry, exit_)


def _shares(config: Config) -> tuple[int, int]:
    """Rows and columns of the sums of all warps."""
    return ROW_TILE * config.split_k, COLUMNS


@partial(jax.jit, static_argnames=("activation", "plan", "interpret"))
def mlp(
    x: jax.Array,
    w: Joined,
    down: Joined,
    residual: jax.Array | None,
    *,
    activation: str,
    plan: Plan,
    interpret: bool = False,
) -> jax.Array:
    """``down(act(gate(x)) * up(x)) (+ residual)``, both inputs rounded to bfloat16, accumulated in float32.

    Args:
      x: bfloat16 or float32 ``[M, K]``.
      w: gate and up, which may apply a norm to x first.
      down: ``[I, N]``.
      residual: ``[M, N]``.
      activation: a name in :data:`ACTIVATIONS`.
      plan: the result of :func:`plan`.
      interpret: run by the Pallas interpreter, on any platform.

    Returns:
      float32 ``[M, N]``.
    """
    m = len(x)
    hidden = _hidden(x, w, down, activation, plan, interpret)
    inside = residual is not None and kernel.takes_residual(m, plan.exit)
    bias = residual[0] if residual is not None and inside else None
    y = kernel.multiply(hidden, m, down, bias, plan.exit, interpret)[:m]
    return y if residual is None or inside else residual + y


def _hidden(x, w: Joined, down: Joined, activation: str, plan: Plan, interpret: bool) -> Operands:  # type: ignore[no-untyped-def]
    """The input of down, prepared for its kernel."""
    operands = activations(x, w, ROW_TILE, ROW_TILE, plan.entry.split_k)
    groups, g, padded = down.groups, down.group_size, padded_groups(down, plan.exit.split_k)
    parts = g // COLUMNS
    like = (operands.x, w, down)
    narrow = jax.typeof(operands.x)
    body = partial(_body, w=w, padded=padded, config=plan.entry, activation=activation, interpret=interpret)
    x, constant, sums = plgpu.kernel(
        partial(body, groups=groups, g=g),
        out_type=[
            narrow.update(shape=(padded * ROW_TILE, g)),
            result_type((parts, padded * ROW_TILE), like),
            result_type((parts, padded * ROW_TILE // DEPTH, DEPTH), like),
        ],
        grid=(1, groups * parts),
        grid_names=("m", "n"),
        kernel_name="mixed_mlp",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(
        *kernel.references(operands, w),
        *(down.places, down.zero_steps, jnp.asarray(1 / powers(down))),
    )
    return Operands(x, constant, sums, None, parts)


def _body(  # type: ignore[no-untyped-def]
    *refs, w: Joined, groups: int, g: int, padded: int, config: Config, activation: str, interpret: bool
) -> None:
    """Computes one block's columns of gate and of up, over all groups, and writes down's input from them."""
    inputs, (places, zero_steps, factors, *out) = References.of(refs)
    block, blocks = lax.axis_index("n"), groups * g // COLUMNS
    group, part = lax.div(block, g // COLUMNS), lax.rem(block, g // COLUMNS)
    layout = _few_rows()

    def finish(shares):
        values = []
        for which in range(2):
            tile = Tile(inputs, w, config, w.shape[1], interpret, block=block + which * blocks)
            (acc,) = tile.subtract_zeros(tile.add_segments(tile.nothing()))
            plgpu.store(shares.at[which], tile.warps.from_accumulator(acc), optimized=False)
            rows = [shares.at[which, pl.ds(s * ROW_TILE, ROW_TILE)] for s in range(config.split_k)]
            y = sum(plgpu.load(row, layout=layout, optimized=False) for row in rows)
            if w.norm is not None:
                factor = tile.norm_factor(0, w.norm.eps, layout.reduce(1))
                y = y * lax.broadcast_in_dim(factor, y.shape, [0])
            values.append(y)
        gate, up = values
        write(places[0, group], (ACTIVATIONS[activation](gate) * up).astype(jnp.bfloat16))

    def write(place, values):
        """Writes a part of the group at a position of down's storage order, and its sums."""
        wide = values.astype(jnp.float32)
        factor = plgpu.load(
            factors.at[pl.ds(part * COLUMNS, COLUMNS)], layout=layout.reduce(0), optimized=False
        )
        divided = wide * lax.broadcast_in_dim(factor, wide.shape, [1])
        rows, chunk = pl.ds(place * ROW_TILE, ROW_TILE), lax.div(place, DEPTH) * ROW_TILE
        left = out[2].at[part, pl.ds(chunk, ROW_TILE), lax.rem(place, DEPTH)]
        step = zero_steps[0, lax.min(place, groups - 1)]
        for ref, value in (
            (out[0].at[rows, pl.ds(part * COLUMNS, COLUMNS)], divided.astype(jnp.bfloat16)),
            (out[1].at[part, rows], jnp.sum(divided, axis=1) * -OFFSET),
            (left, jnp.sum(wide, axis=1) * -step),
        ):
            plgpu.store(ref, value, optimized=False)

    pl.run_scoped(finish, plgpu.SMEM((2, *_shares(config)), jnp.float32))

    for beyond in range(groups, padded, groups):  # down reads these too: zeros contribute nothing

        @pl.when(beyond + group < padded)
        def _(beyond: int = beyond) -> None:
            write(beyond + group, plgpu.layout_cast(jnp.zeros((ROW_TILE, COLUMNS), jnp.bfloat16), layout))


def _few_rows() -> Any:
    """Layout of ``[16, 32]``, 4 rows per warp, 4 adjacent columns per thread."""
    return tiled(((ROW_TILE, COLUMNS), (4, COLUMNS), (1, 4)), (-6,), (-4, -3))
