"""Packs embedding and LM head after all blocks: one weight ``[d, vocab]`` each, or one for both if tied.

The LM head reads the output of the last norm for the calibration tokens, so GPTQ rounds it by their Hessian
like any layer, but without coordinate-descent passes (`SlimConfig.refine`), which only layers of blocks get.
An untied embedding is rounded to nearest: it is only looked up in, so its channels all count the same and
their errors are never summed. The vocabulary is long, so it is solved some thousand tokens at a time.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import MixedTensor, pack, side_by_side
from pallas_kernels.chips import product_dtype
from pallas_kernels.layout import zero_bits
from slim_jax.calibrate.activations import Activations, Inputs, observe
from slim_jax.calibrate.offload import Batches
from slim_jax.config import Settings, SlimConfig
from slim_jax.method.gptq import Solution, solve
from slim_jax.method.hessian import Observation, Statistics
from slim_jax.method.layer import LayerSolver, relative_error, squares
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import COMPUTE_DTYPE
from slim_jax.model.params import Params, as_stored, block_params, outer_params, without_tables
from slim_jax.placement import PANEL, Placement
from slim_jax.report import LayerReport
from slim_jax.store.source import Source

CHUNK = 64 * PANEL
"""Tokens of the vocabulary that are solved at once."""


def quantize_ends(
    source: Source,
    config: Settings,
    activations: Activations,
    reference: Activations | None,
    stride: int,
    placement: Placement,
) -> tuple[dict[str, Any], list[LayerReport]]:
    """Packs embedding and LM head if ``config`` asks for it.

    Args:
      source: the dense model.
      config: how to quantize.
      activations: the activations after the last block.
      reference: those of the reference (full-precision) pass; an LM head that is not tied to the embedding
        compensates a share of the upstream error, as layers do.
      stride: see `slim_jax.calibrate.activations.observe`.
      placement: the chips that split the work.

    Returns:
      All parameters outside the blocks, and a report for each weight that was packed.

    Raises:
      ValueError: embedding or LM head is packed already, or the LM head's Hessian is not positive definite.
    """
    outer = dict(source.outer())
    if not config.packs_ends:
        return {name: placement.channels(as_stored(name, value)) for name, value in outer.items()}, []
    packed = [name for name, value in outer.items() if isinstance(value, MixedTensor)]
    if packed:
        raise ValueError(f"{packed[0]} is already quantized, expected a dense model")
    solver = TableSolver(config, placement)
    beside = None if source.config.tied_head else reference
    seen = observe_head(source.config, outer, activations, beside, stride, placement)
    reports = []
    for name in ("embed", "head.weight"):
        if name in outer:
            read = seen if name == "head.weight" or source.config.tied_head else None
            outer[name], report = solver.solve(name, outer[name], read)
            reports.append(report)
    return {
        name: value if isinstance(value, MixedTensor) else placement.channels(as_stored(name, value))
        for name, value in outer.items()
    }, reports


def sizes(config: DecoderConfig, outer: Params, blocks: Sequence[Params]) -> tuple[int, int]:
    """Number of parameters of a model, and the bytes that hold them."""
    shapes = [outer_params(config), *map(block_params, config.blocks())]
    buffers = len(blocks) if config.global_layers else 0
    count = sum(math.prod(shape.shape) for part in shapes for shape in part.values()) - buffers
    return count, sum(value.nbytes for part in (outer, *blocks) for value in part.values())


@jax.jit
def _head_input(outer: Decoder, h: jax.Array) -> jax.Array:
    return outer.head_input(h).astype(COMPUTE_DTYPE)


def head_inputs(config: DecoderConfig, params: Params, activations: Activations) -> Batches:
    """Returns the LM head's inputs, given the activations after the last block."""
    outer = activations.placement.tree(without_tables(config, params)[0])
    return activations.keep(_head_input(outer, h) for h in activations.batches)


def observe_head(
    config: DecoderConfig,
    params: Params,
    activations: Activations,
    reference: Activations | None,
    stride: int,
    placement: Placement,
) -> Observation:
    """Observes the LM head's inputs; see :func:`head_inputs`."""
    beside = None if reference is None else Inputs(head_inputs(config, params, reference))
    return observe(Inputs(head_inputs(config, params, activations), reference=beside), stride, placement)


class TableSolver:
    """Quantizes embedding and LM head at the one width that ``config`` gives for both."""

    def __init__(self, config: Settings, placement: Placement) -> None:
        self.config = SlimConfig(
            method="rtn" if config.method == "rtn" else "gptq",
            sqc="search",
            bits=config.embedding_bits,
            group_size=config.embedding_group_size,
            damping=config.damping,
            asymmetric=config.asymmetric,
        ).resolved()
        self.placement = placement
        self.zero_bits = zero_bits(self.config.widths)

    def solve(self, name: str, table: Any, seen: Observation | None) -> tuple[MixedTensor, LayerReport]:
        """Packs the embedding ``[vocab, d]`` or the LM head's weight ``[d, vocab]``.

        Args:
          name: "embed" or "head.weight".
          table: its values.
          seen: observation of the LM head's inputs; None for an embedding that is not tied to the LM head.

        Raises:
          ValueError: the LM head's inputs or the error are not finite.
        """
        vocab, d = table.shape if name == "embed" else table.shape[::-1]
        label = name.removesuffix(".weight")
        feedback = seen is not None and self.config.method != "rtn"
        seen = seen or Observation(jnp.eye(d), jnp.zeros((1, d)), 2)  # its Hessian is the identity
        layers = LayerSolver(self.config, None, self.placement)
        found, damping = layers.statistics(seen, [label])
        parts, sums = [], []
        for start in range(0, vocab, CHUNK):
            chunk = slice(start, start + CHUNK)
            w = self.placement.channels(table[chunk].T if name == "embed" else table[:, chunk])
            w = jnp.pad(w.astype(jnp.float32), ((0, found.alive.shape[0] - d), (0, 0)))
            if feedback:
                (w,) = layers.corrected([w * found.alive[:, None]], found, seen)
            solution = self._solve(w, found, feedback, layers.scale_dtype(w, self.config.bits))
            sums.append([float(value) for value in squares(w, _weight(solution), found.h)])
            parts.append(self._pack(solution, d))
        tensor = self.placement.tensor(side_by_side(parts))
        error, total, worst = zip(*sums)
        errors = relative_error(label, sum(error), sum(total)), max(worst)
        return tensor, LayerReport.of(label, tensor, errors, None, damping)

    def _solve(self, w: jax.Array, found: Statistics, feedback: bool, scale_dtype: jnp.dtype) -> Solution:
        config = self.config
        widths = np.full((w.shape[0] // config.group_size, w.shape[1]), config.bits, np.float32)
        return solve(
            w,
            found.u,
            found.importance,
            self.placement.channels(widths),
            group_size=config.group_size,
            zero_bits=self.zero_bits,
            sqc="search",
            feedback=feedback,
            scale_dtype=scale_dtype,
            placement=self.placement,
        )

    def _pack(self, solution: Solution, d: int) -> MixedTensor:
        code, scale, zero = map(self.placement.fetch, solution)
        unit = 2.0 ** (self.config.bits - self.zero_bits)
        return pack(
            code[:d],
            scale,
            np.rint(zero / unit).astype(np.uint8),
            np.full(len(scale), self.config.bits),
            group_size=self.config.group_size,
            dtype=product_dtype(),
        )


_weight = jax.jit(Solution.weight)
