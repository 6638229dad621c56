"""Where a model's weights come from, one block at a time."""

from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh

from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import Params, make_decoder, split_params


@runtime_checkable
class Source(Protocol):
    """A model that can be read block by block, so that it need not fit in memory.

    Attributes:
      config: the decoder that the parameters are for.
      origin: where they come from, as JSON values: kind, path, a fingerprint. Goes into the manifest.
    """

    config: DecoderConfig
    origin: dict[str, Any]

    def outer(self) -> Params:
        """Parameters outside the blocks, named as in :func:`slim_jax.model.params.outer_params`."""
        ...

    def block(self, index: int) -> Params:
        """Parameters of block ``index``, named as in :func:`slim_jax.model.params.block_params`."""
        ...


def read_decoder(source: Source, mesh: Mesh | None = None) -> Decoder:
    """The whole model in memory; ``mesh`` is over which packed weights lie, if they do."""
    blocks = [source.block(index) for index in range(source.config.num_layers)]
    return make_decoder(source.config, source.outer(), blocks, mesh)


class DecoderSource:
    """A :class:`Source` that reads a decoder in memory."""

    def __init__(self, decoder: Decoder) -> None:
        self.config: DecoderConfig = decoder.config
        self.origin: dict[str, Any] = {"kind": "memory"}
        self._outer, self._blocks = split_params(decoder)

    def outer(self) -> Params:
        """See :class:`Source`."""
        return self._outer

    def block(self, index: int) -> Params:
        """See :class:`Source`."""
        return self._blocks[index]
