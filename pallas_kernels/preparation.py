"""Prepares packed weights for repeated multiplication: work that depends on the weight alone is done once."""

from collections.abc import Sequence

import jax.numpy as jnp

from pallas_kernels import chips
from pallas_kernels.backends import importing, names_for
from pallas_kernels.layout import MixedTensor, stack
from pallas_kernels.prepared import Prepared, stack_consumed
from pallas_kernels.xla.prepared import joinable, prepare_stack


def prepare(
    w: MixedTensor | Sequence[MixedTensor],
    *,
    implementation: str | Sequence[str] | None = None,
    consume: bool = False,
) -> MixedTensor | Prepared:
    """Prepares a packed weight for repeated multiplication; returns ``w`` if the back end gains nothing.

    Work that depends on ``w`` alone is done once, not at every product. The result is for running, not for
    storing.

    Args:
      w: the packed weight; or those of several layers, which differ only in values of their leaves and rows
        of words. Layers come back stacked: on a leading axis of the leaves if the back end gains nothing,
        else as a :class:`Prepared`, whose ``at(layer)`` chooses one without slicing.
      implementation: as for :func:`mixed_matmul`.
      consume: if True, words, scales and zero codes of ``w`` are deleted as they are copied, so that memory
        never holds all layers twice; not for traced code.
    """
    name, alone = names_for(implementation)[0], isinstance(w, MixedTensor)
    layers: Sequence[MixedTensor] = [w] if isinstance(w, MixedTensor) else w
    if name == "xla" and _on_cpu():
        return prepare_stack([[one] for one in layers], consume=consume)
    if name == "mosaic_tpu":
        found = _layers_on_tpu([[one] for one in layers], not alone, consume)
        if found is not None:
            return found
    if name == "mosaic_gpu" and alone and (joined := _joined_on_gpu(layers)) is not None:
        return joined
    if isinstance(w, MixedTensor):
        return w
    return stack_consumed(layers) if consume else stack(layers)


def prepare_joined(
    layers: Sequence[Sequence[MixedTensor]],
    *,
    feeds: int = 0,
    implementation: str | Sequence[str] | None = None,
    consume: bool = False,
) -> Prepared | None:
    """Joins the weights of each layer that read the same input into one product, with results side by side.

    Args:
      layers: the weights of each layer; layers differ only as in :func:`prepare`.
      feeds: group size of the one product that reads all the results, such as an MLP's last, if it divides
        every ``N``: a back end may then fuse the two products (`pallas_kernels.mlp`). 0 for none.
      implementation: as for :func:`mixed_matmul`.
      consume: as for :func:`prepare`.

    Returns:
      Prepared weights as from :func:`prepare`, or None if the back end gains nothing or the weights do not
      fit together.
    """
    name = names_for(implementation)[0]
    if name == "mosaic_gpu" and len(layers) == 1:
        return _joined_on_gpu(layers[0], feeds)
    if name == "mosaic_tpu":
        return _layers_on_tpu(layers, len(layers) > 1, consume)
    if name != "xla" or not _on_cpu() or not joinable(layers[0]):
        return None
    return prepare_stack(layers, consume=consume)


def _on_cpu() -> bool:
    """True if the target multiplies packed words in loops; elsewhere XLA dequantizes."""
    return chips.of_target().platform == "cpu"


def _layers_on_tpu(layers: Sequence[Sequence[MixedTensor]], stacked: bool, consume: bool) -> Prepared | None:
    try:
        with importing("mosaic_tpu"):
            from pallas_kernels.tpu import config
            from pallas_kernels.tpu.layers import joinable, prepare
    except NotImplementedError:
        return None
    supported = layers[0][0].group_size in config.GROUP_SIZES and joinable(layers[0])
    return prepare(layers, stacked=stacked, consume=consume) if supported else None


def _joined_on_gpu(weights: Sequence[MixedTensor], feeds: int = 0) -> Prepared | None:
    try:
        with importing("mosaic_gpu"):
            import pallas_kernels.gpu.kernel  # noqa: F401
            from pallas_kernels.gpu import config, joined
        config.check_supported(chips.of_target(), jnp.dtype(jnp.bfloat16), 1, weights[0].group_size, None)
    except NotImplementedError:
        return None
    return joined.join(weights, feeds=feeds) if joined.joinable(weights) else None
