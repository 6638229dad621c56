"""Packs embedding and LM head after all blocks: one weight ``[d, vocab]`` each, or one for both if tied.

The LM head reads the output of the last norm for the calibration tokens, so GPTQ rounds it by their Hessian
like any layer, but without coordinate-descent passes (`SlimConfig.refine`), which only layers of blocks get.
An untied embedding is rounded to nearest: it is only looked up in, so its channels all count the same and
their errors are never summed. The vocabulary is long, so it is solved some thousand tokens at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import MixedTensor
from slim_jax.calibrate.activations import Activations, Inputs, observe
from slim_jax.calibrate.offload import Batches
from slim_jax.config import Settings, SlimConfig
from slim_jax.method.hessian import Observation
from slim_jax.method.layer import LayerSolver
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.linear import COMPUTE_DTYPE
from slim_jax.model.params import Params, as_stored, without_tables
from slim_jax.placement import ONE_DEVICE, Placement
from slim_jax.report import LayerReport
from slim_jax.store.source import Source


def quantize_embeddings(
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
    reports = []
    if config.packs_embeddings:
        packed = [name for name, value in outer.items() if isinstance(value, MixedTensor)]
        if packed:
            raise ValueError(f"{packed[0]} is already quantized, expected a dense model")
        upstream = None if source.config.tied_head else reference
        seen = observe_head(source.config, outer, activations, upstream, stride, placement)
        for name in ("embed", "head.weight"):
            if name in outer:
                read = seen if name == "head.weight" or source.config.tied_head else None
                outer[name], report = quantize_table(name, outer[name], read, config, placement)
                reports.append(report)
    return {
        name: value if isinstance(value, MixedTensor) else placement.channels(as_stored(name, value))
        for name, value in outer.items()
    }, reports


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
    other = None if reference is None else Inputs(head_inputs(config, params, reference))
    return observe(Inputs(head_inputs(config, params, activations), reference=other), stride, placement)


def quantize_table(
    name: str, table: Any, seen: Observation | None, settings: Settings, placement: Placement = ONE_DEVICE
) -> tuple[MixedTensor, LayerReport]:
    """Packs the embedding ``[vocab, d]`` or the LM head's weight ``[d, vocab]`` at ``embedding_bits``.

    Args:
      name: "embed" or "head.weight".
      table: its values.
      seen: observation of the LM head's inputs; None for an embedding that is not tied to the LM head.
      settings: the quantization's settings.
      placement: the chips that split the vocabulary.

    Raises:
      ValueError: the LM head's inputs or the error are not finite.
    """
    own = SlimConfig(
        method="rtn" if settings.method == "rtn" or seen is None else "gptq",
        unit=settings.unit,
        sqc="search",
        bits=settings.embedding_bits,
        group_size=settings.embedding_group_size,
        damping=settings.damping,
        asymmetric=settings.asymmetric,
        refine=0,
    )
    vocab, d = table.shape if name == "embed" else table.shape[::-1]
    if seen is None:
        seen = Observation(jnp.eye(d), jnp.zeros((1, d)), 2)  # its Hessian is the identity

    def columns(chunk: slice) -> Any:
        return table[chunk].T if name == "embed" else table[:, chunk]

    solver = LayerSolver(own.resolved(), None, placement)
    return solver.solve_wide(name.removesuffix(".weight"), columns, vocab, seen)
