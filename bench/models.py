"""Models and weights of random numbers, in the shapes of real ones."""

import dataclasses
from typing import Any

import numpy as np

from pallas_kernels import MixedTensor, pack, scales
from pallas_kernels.chips import product_dtype
from slim_jax.config import SlimConfig
from slim_jax.model.block import linear_groups
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import Params, block_params, make_decoder, outer_params
from slim_jax.store.source import Source

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "smollm2-135m": ((576, 576), (576, 192), (576, 1536), (1536, 576)),
    "llama-2-7b": ((4096, 4096), (4096, 11008), (11008, 4096)),
    "llama-2-13b": ((5120, 5120), (5120, 13824), (13824, 5120)),
    "llama-2-70b": ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192)),
    "llama-3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
}
"""The linear layers of well-known models, ``(K, N)``."""


def llama(
    layers: int, hidden: int, intermediate: int, heads: int, vocabulary: int, positions: int, **more: Any
) -> DecoderConfig:
    """Config of a llama whose heads divide the hidden size; ``more`` are other fields."""
    return DecoderConfig(
        **{"family": "llama", "num_kv_heads": heads, "head_dim": hidden // heads} | more,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        max_positions=positions,
    )


LLAMA_2_7B = llama(32, 4096, 11008, 32, 32000, 4096, tied_head=False)


class RandomSource:
    """A model with random weights; its blocks are made when they are read, so that none stays in memory.

    Attributes:
      config: the decoder's config.
      origin: marks the model as random.
    """

    def __init__(self, config: DecoderConfig, *, dtype: Any = np.float32, alike: bool = False) -> None:
        """``dtype`` is that of the parameters; if ``alike``, all blocks are one and the same."""
        self.config, self._dtype, self._alike = config, dtype, alike
        self.origin: dict[str, Any] = {"kind": "random", "layers": config.num_layers}
        self._block: dict[str, np.ndarray] | None = None

    def _random(self, shapes: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)

        def matrix(shape: tuple[int, ...]) -> np.ndarray:
            return rng.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)

        return {
            name: (np.ones(s.shape, np.float32) if len(s.shape) == 1 else matrix(s.shape)).astype(self._dtype)
            for name, s in shapes.items()
        }

    def outer(self) -> dict[str, np.ndarray]:
        """See `slim_jax.store.source.Source`."""
        return self._random(outer_params(self.config), 0)

    def block(self, index: int) -> dict[str, np.ndarray]:
        """See `slim_jax.store.source.Source`."""
        if not self._alike:
            return self._random(block_params(self.config), 1 + index)
        if self._block is None:
            self._block = self._random(block_params(self.config), 1)
        return self._block


def random_packed(
    shape: tuple[int, ...], bits: int, group_size: int, rng: np.random.Generator
) -> MixedTensor:
    """Random packed weight ``[K, N]``: a quarter of the groups each at ``bits ± 1``, half at ``bits``."""
    groups = -(-shape[0] // group_size)
    widths = np.full(groups, bits)
    order = rng.permutation(groups)
    widths[order[: groups // 4]] -= 1
    widths[order[groups // 4 : 2 * (groups // 4)]] += 1
    return random_codes(shape, widths, group_size, rng, widths=(bits - 1, bits, bits + 1))


def random_codes(
    shape: tuple[int, ...],
    bits: np.ndarray,
    group_size: int,
    rng: np.random.Generator,
    widths: tuple[int, ...],
) -> MixedTensor:
    """Random packed weight ``[K, N]`` whose groups have these ``bits``, out of ``widths``."""
    k, n = shape
    limit = np.repeat(1 << bits, group_size)[:k, None]
    codes = (rng.integers(0, 1 << max(widths), (k, n)) % limit).astype(np.uint8)
    scale = np.asarray(scales.encoded((rng.random((len(bits), n)) + 0.5) * 0.01))
    zero = rng.integers(0, 16, (len(bits), n), dtype=np.uint8)
    return pack(codes, scale, zero, bits, group_size=group_size, widths=widths)


def random_decoder(
    source: Source, bits: int, group_size: int, seed: int = 0, *, alike: bool = False
) -> Decoder:
    """Returns the source's model with random codes in every linear layer of its blocks.

    Embedding and LM head are packed at the width that belongs to ``bits``. If ``alike``, all blocks of one
    kind share one block's codes.
    """
    config, rng = source.config, np.random.default_rng(seed)
    blocks: list[Params] = []
    packed: dict[DecoderConfig, Params] = {}
    for i, kind in enumerate(config.blocks()):
        if not (kind in packed and alike):
            shapes = block_params(kind)
            names = [f"{name}.weight" for group in linear_groups(kind) for name in group]
            packed[kind] = {
                name: dataclasses.replace(
                    random_packed(shapes[name].shape, bits, group_size, rng), dtype=product_dtype()
                )
                for name in names
            }
        blocks.append({**source.block(i), **packed[kind]})
    outer = {name: _table(name, value, bits, rng) for name, value in source.outer().items()}
    return make_decoder(config, outer, blocks)


def _table(name: str, value: Any, bits: int, rng: np.random.Generator) -> Any:
    """Packs embedding and LM head at the width that belongs to ``bits``; keeps other parameters."""
    if name not in ("embed", "head.weight"):
        return value
    k, n = value.shape[::-1] if name == "embed" else value.shape
    settings = SlimConfig(bits=bits).resolved()
    width, group_size = settings.embedding_bits, settings.embedding_group_size
    bits_of_groups = np.full(-(-k // group_size), width)
    packed = random_codes((k, n), bits_of_groups, group_size, rng, widths=(width,))
    return dataclasses.replace(packed, dtype=product_dtype())
