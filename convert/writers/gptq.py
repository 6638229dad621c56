"""Writer of uniformly quantized models in the packed format of AutoGPTQ and GPTQModel.

docs/sharing.md lists the programs that read it.

A linear layer ``[K, N]`` with ``b`` bits and groups of ``g`` input channels is stored as:

    qweight  int32[K * b / 32, N]             codes, a stream of bits down the input channels, low bits first
    qzeros   int32[ceil(K / g), N * b / 32]   zero points, a stream of bits along the output channels
    scales   float16[ceil(K / g), N]
    g_idx    int32[K]                         the group of each input channel

    W[k, n] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])

Zero points are integers. The first version of the format, "gptq", stores them minus one and so cannot store
0; "gptq_v2", which fewer programs read, stores them unchanged.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConvertError
from convert.families import by_name
from convert.families.family import HFFormat
from convert.readers.source import parse_dtype
from convert.writers.export import cast_tensor, held_tensors, write_companions
from convert.writers.folder import SHARD_BYTES, new_folder, write_json, write_tensors
from pallas_kernels import MixedTensor
from slim_jax.store.source import Source

BITS = (2, 3, 4, 8)
DTYPES = ("float16", "bfloat16")
OTHERWISE = "; --format safetensors and hf take it"


@dataclasses.dataclass
class Layout:
    """Properties that all packed layers share, and the quantization config that states them.

    Attributes:
      bits: width of every code.
      group_size: input channels that share scale and zero point.
      lowest: smallest zero point of any layer; the first version of the format stores none below 1.
      symmetric: True if every zero point is ``2**(bits - 1)``.
      dense: the format's names of linear layers that are not packed, except the LM head.
    """

    bits: int
    group_size: int
    lowest: int
    symmetric: bool
    dense: list[str]

    @property
    def first_version(self) -> bool:
        """True if the first version of the format can store the zero points."""
        return self.lowest >= 1

    def to_json(self) -> dict[str, Any]:
        """Contents of quantize_config.json."""
        form = "gptq" if self.first_version else "gptq_v2"
        skipped: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in self.dense}
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": False,
            "sym": self.symmetric,
            "lm_head": False,
            "checkpoint_format": form,
            "format": form,
            "pack_dtype": "int32",
            **({"dynamic": skipped} if skipped else {}),
            "meta": {"quantizer": [f"slim-jax:{version('slim-jax')}"]},
        }


def export_gptq(
    source: Source,
    out_dir: str | Path,
    dtype: Any = None,
    *,
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes the blocks' layers packed, and embedding and LM head dequantized, as the format requires.

    The source is read twice: the config states properties of all zero points, so they must be known first.

    Args:
      source: a quantized model.
      out_dir: must not exist, or must be empty.
      dtype: type of the scales and of all that is not packed: float16, the format's default, or bfloat16.
      tokenizer: the model's tokenizer; None takes ``source.tokenizer`` if there is one.
      shard_bytes: largest size of a shard, unless one tensor alone is larger.

    Returns:
      The directory.

    Raises:
      CheckpointError: the directory is not empty, or another process writes to it.
      ConvertError: the format cannot store this model, the directory cannot be written, or no class of
        transformers has this config.
    """
    out, cast = Path(out_dir), parse_dtype(dtype or "float16", DTYPES)
    assert cast is not None
    form = by_name(source.config.family).hf
    config = form.write_config(source.config)
    with new_folder(out) as folder:
        layout = find_layout(source, form, cast)
        write_tensors(_tensors(source, form, layout, cast), folder, shard_bytes)
        config |= {"dtype": cast.name, "quantization_config": layout.to_json()}
        write_json(folder / "quantize_config.json", layout.to_json())
        write_companions(folder, config, source, tokenizer)
    return out


def find_layout(source: Source, form: HFFormat, dtype: np.dtype) -> Layout:
    """Reads all layers of the blocks and returns their common layout.

    Raises:
      ConvertError: the format cannot store one of them, or they differ.
    """
    layout: Layout | None = None
    dense = []
    for name, held, place in held_tensors(source, form):
        tensors = _block_layers(name, held)
        if tensors and (place.experts or place.groups > 1 or place.transposed):
            raise ConvertError(f"{name} holds {', '.join(tensors)} in an order that gptq has not{OTHERWISE}")
        if not tensors:
            if name.endswith(".weight") and _linear(held):
                dense.append(name.removesuffix(".weight"))
            continue
        for ours, tensor in tensors.items():
            found = _layout_of(f"{name} ({ours})", tensor, dtype)
            layout = found if layout is None else _joined(f"{name} ({ours})", layout, found)
    if layout is None:
        raise ConvertError("the model has no packed layers, expected a quantized one for gptq")
    return dataclasses.replace(layout, dense=dense)


def _block_layers(name: str, held: dict[str, Any]) -> dict[str, MixedTensor]:
    """Packed layers of a block in one of the format's tensors; none for embedding and LM head."""
    tensors = {ours: value for ours, value in held.items() if isinstance(value, MixedTensor)}
    if "embed" in tensors or "head.weight" in tensors:
        return {}
    if tensors and len(tensors) != len(held):
        raise ConvertError(f"{name} is packed in part, expected all of it or nothing for gptq{OTHERWISE}")
    return tensors


def _linear(held: dict[str, Any]) -> bool:
    """True if a tensor that is not packed is the weight of a linear layer other than the LM head."""
    return all(ours.endswith(".weight") and value.ndim == 2 for ours, value in held.items()) and (
        "head.weight" not in held
    )


def _layout_of(name: str, tensor: MixedTensor, dtype: np.dtype) -> Layout:
    widths = sorted(set(tensor.bits().tolist()))
    if len(widths) > 1:
        mixed = " and ".join(map(str, widths))
        raise ConvertError(
            f"{name} mixes groups of {mixed} bits, expected one width for gptq: "
            f"quantize with --set method=gptq{OTHERWISE}"
        )
    bits = widths[0]
    if bits not in BITS:
        raise ConvertError(f"{name} has {bits} bits, expected one of 2, 3, 4, 8 for gptq{OTHERWISE}")
    unit = _values_per_period(bits)
    if tensor.shape[0] % unit or tensor.shape[1] % unit:
        shape = " x ".join(map(str, tensor.shape))
        raise ConvertError(
            f"{name} is {shape}, expected multiples of {unit} for gptq at {bits} bits{OTHERWISE}"
        )
    _, zero, scale = stored_parts(tensor)
    if np.any(zero != np.rint(zero)):
        raise ConvertError(
            f"{name} has zero points that are not whole, which gptq cannot store: "
            f"quantize with --set method=gptq{OTHERWISE}"
        )
    if np.any(scale.astype(dtype).astype(np.float32) != scale):
        raise ConvertError(f"{name} has scales that {dtype} cannot hold: export with --dtype bfloat16")
    lowest = int(zero.min())
    return Layout(bits, tensor.group_size, lowest, bool(np.all(zero == 1 << (bits - 1))), [])


def _joined(name: str, one: Layout, other: Layout) -> Layout:
    for field in ("bits", "group_size"):
        before, now = getattr(one, field), getattr(other, field)
        if before != now:
            raise ConvertError(
                f"{name} has {field.replace('_', ' ')} {now}, other layers {before}, "
                f"expected one for gptq{OTHERWISE}"
            )
    lowest, symmetric = min(one.lowest, other.lowest), one.symmetric and other.symmetric
    return Layout(one.bits, one.group_size, lowest, symmetric, [])


def stored_parts(tensor: MixedTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes ``uint32[K, N]``, zero points and scales ``float32[G, N]``, groups in their original order."""
    back = np.argsort(np.asarray(tensor.order))
    scale = np.asarray(tensor.scales())[back]
    return np.asarray(tensor.codes()).astype(np.uint32), np.asarray(tensor.zero_points())[back], scale


def _tensors(
    source: Source, form: HFFormat, layout: Layout, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    for name, held, place in held_tensors(source, form):
        if tensors := _block_layers(name, held):
            yield from _packed(name.removesuffix("weight"), list(tensors.values()), layout, dtype)
            continue
        yield name, cast_tensor(name, held, place, dtype)


def _packed(
    prefix: str, tensors: list[MixedTensor], layout: Layout, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the four tensors of one layer of the format, which holds several of ours along its outputs."""
    codes, zeros, scales = (np.concatenate(part, axis=1) for part in zip(*map(stored_parts, tensors)))
    stored = zeros.astype(np.uint32) - np.uint32(layout.first_version)
    yield prefix + "qweight", pack_rows(codes, layout.bits).view(np.int32)
    yield prefix + "qzeros", np.ascontiguousarray(pack_rows(stored.T, layout.bits).T).view(np.int32)
    yield prefix + "scales", scales.astype(dtype)
    yield prefix + "g_idx", (np.arange(len(codes)) // layout.group_size).astype(np.int32)


def _values_per_period(bits: int) -> int:
    """Number of values after which a value ends at a word boundary: 32 of 3 bits, 8 of 4."""
    return 32 // math.gcd(32, bits)


def pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs ``uint32[R, C]`` down the rows: each column is a stream of bits, low bits first.

    Returns:
      ``uint32[R * bits / 32, C]``.
    """
    lanes = _values_per_period(bits)
    periods = values.reshape(-1, lanes, values.shape[1])
    words = np.zeros((len(periods), lanes * bits // 32, values.shape[1]), np.uint32)
    for lane in range(lanes):
        word, shift = divmod(lane * bits, 32)
        words[:, word] |= periods[:, lane] << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1] |= periods[:, lane] >> np.uint32(32 - shift)
    return words.reshape(-1, values.shape[1])
