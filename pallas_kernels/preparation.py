"""Prepares packed weights for repeated multiplication: work that depends on the weight alone is done once."""

from collections.abc import Sequence

from pallas_kernels.backends import BACKENDS, names_for
from pallas_kernels.layout import MixedTensor, stack
from pallas_kernels.prepared import Prepared, stack_consumed


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
    alone = isinstance(w, MixedTensor)
    layers: Sequence[MixedTensor] = [w] if isinstance(w, MixedTensor) else w
    backend = BACKENDS[names_for(implementation)[0]]
    found = backend.prepare([[one] for one in layers], stacked=not alone, feeds=0, consume=consume)
    if found is not None:
        return found
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
        every ``N``: a back end may then fuse the two products (``mlp`` of `pallas_kernels.backend.Backend`).
        0 for none.
      implementation: as for :func:`mixed_matmul`.
      consume: as for :func:`prepare`.

    Returns:
      Prepared weights as from :func:`prepare`, or None if the back end gains nothing or the weights do not
      fit together.
    """
    backend = BACKENDS[names_for(implementation)[0]]
    return backend.prepare(layers, stacked=len(layers) > 1, feeds=feeds, consume=consume)
