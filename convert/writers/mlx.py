"""Writer of MLX's affine format, which mlx-lm loads. docs/sharing.md says what was run.

A linear layer ``[K, N]``, or an embedding of N tokens, with ``b`` bits and groups of ``g`` is stored as:

    weight  uint32[N, K * b / 32]   codes, a stream of bits along the input channels, low bits first
    scales  float16[N, K / g]
    biases  float16[N, K / g]

    W[k, n] = scales[n, k // g] * code[k, n] + biases[n, k // g]

With our zero points, ``bias = -scale * zero``. Groups that are narrower than ``b`` keep their weights: the
code is shifted left and the scale divided. Larger groups are written as several with equal scales.
"""

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConvertError
from convert.families import by_name
from convert.families.family import HFFormat, layer_types
from convert.families.tensors import Held
from convert.readers.source import parse_dtype
from convert.writers.export import cast_tensor, held_tensors, write_companions
from convert.writers.folder import SHARD_BYTES, new_folder, write_tensors
from convert.writers.gptq import pack_rows, stored_parts
from pallas_kernels import MixedTensor
from slim_jax.config import Settings
from slim_jax.model.block import linear_groups
from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import block_params, outer_params
from slim_jax.store.source import Source

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (128, 64, 32)
DTYPES = ("float16", "bfloat16", "float32")

WINDOWED = ("mistral", "gemma3_text", "smollm3")
"""Values of ``model_type`` whose attention windows mlx-lm keeps; Mistral's and SmolLM3's where not all blocks
have one. In all others it ignores them."""

MODEL_TYPES = (*WINDOWED, "llama", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "phi3")
"""Values of ``model_type`` that are written: mlx-lm knows them, by the same names of tensors."""

_EXPERT = re.compile(r"(.*)\.experts\.\d+\.(\w+)\.weight")
_STACK = ".switch_mlp."
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def export_mlx(
    source: Source,
    out_dir: str | Path,
    dtype: Any = None,
    *,
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes every packed weight, embedding and LM head too, in codes that stand for exactly our weights.

    Args:
      source: a quantized model.
      out_dir: must not exist, or must be empty.
      dtype: type of scales and biases, and of all that is not packed: float16, bfloat16 or float32. mlx-lm
        computes in it. By default float16: bfloat16 holds few models' biases.
      tokenizer: the model's tokenizer; None takes ``source.tokenizer`` if there is one.
      shard_bytes: largest size of a shard, unless one tensor alone is larger.

    Returns:
      The directory.

    Raises:
      CheckpointError: the directory is not empty, or another process writes to it.
      ConvertError: the architecture is not exported, the format cannot store this model, or the
        directory cannot be written.
    """
    out, cast = Path(out_dir), parse_dtype(dtype or DTYPES[0], DTYPES)
    assert cast is not None
    form = by_name(source.config.family).hf
    config = engine_config(source.config, form)
    layers: dict[str, dict[str, int]] = {}
    with new_folder(out) as folder:
        write_tensors(_tensors(source, form, cast, layers), folder, shard_bytes)
        if not layers:
            raise ConvertError("the model has no packed layers, expected a quantized one for mlx")
        first = next(iter(layers.values()))
        config |= {"dtype": cast.name, "quantization": {**first, **layers}}
        write_companions(folder, config, source, tokenizer)
    return out


def engine_config(model: DecoderConfig, form: HFFormat) -> dict[str, Any]:
    """Returns config.json with the fields that mlx-lm asks for besides transformers'.

    Raises:
      ConvertError: the architecture is not exported, or mlx-lm cannot express its attention windows.
    """
    config = form.write_config(model)
    kind = config["model_type"]
    if kind not in MODEL_TYPES:
        raise ConvertError(f"{kind} is not exported for mlx-lm, expected one of {', '.join(MODEL_TYPES)}")
    if kind == "gemma3_text":
        globals_ = model.global_layers if model.sliding_window else tuple(range(model.num_layers))
        period = globals_[0] + 1 if globals_ else model.num_layers + 1
        if globals_ != tuple(range(period - 1, model.num_layers, period)):
            raise ConvertError(f"blocks {globals_} have no window, expected a regular pattern for mlx")
        config |= {"sliding_window_pattern": period, "sliding_window": model.sliding_window or 1}
    elif _keeps_windows(kind, model):
        config["layer_types"] = layer_types(model)
    else:
        config.pop("layer_types", None)  # mlx-lm asks for a block without a window
    return config


def _keeps_windows(kind: str, model: DecoderConfig) -> bool:
    return kind in WINDOWED and (kind == "gemma3_text" or bool(model.global_layers))


def forecast_bytes(model: DecoderConfig, settings: Settings) -> int:
    """Returns about how many bytes a model takes that is quantized with these settings and then exported.

    Raises:
      ConvertError: the architecture is not exported, or the format cannot store a layer of that shape.
    """
    engine_config(model, by_name(model.family).hf)
    total = 0.0
    for index, kind in enumerate(model.blocks()):
        layers = {f"{name}.weight" for name in itertools.chain(*linear_groups(kind))}
        for name, shape in block_params(kind).items():
            full = f"blocks.{index}.{name}"
            own = settings.of_layer(full.removesuffix(".weight")) if name in layers else None
            total += _bytes(full, shape.shape, None if own is None else (own.bits, own.group_size))
    ends = (settings.embedding_bits, settings.embedding_group_size) if settings.packs_embeddings else None
    for name, shape in outer_params(model).items():
        sizes = shape.shape[::-1] if name == "embed" else shape.shape
        total += _bytes(name, sizes, ends if name in ("embed", "head.weight") else None)
    return round(total)


def _bytes(name: str, shape: tuple[int, ...], packed: tuple[float, int] | None) -> float:
    """Bytes of a parameter in float16, or packed at a mean width in groups of a size."""
    if packed is None:
        return 2 * math.prod(shape)
    bits, group_size = packed
    return math.prod(shape) * (bits / 8 + 4 / _group_size(name, shape[0], group_size))


def window_note(model: DecoderConfig) -> str:
    """Says that mlx-lm ignores the model's attention window, if it does."""
    kind = by_name(model.family).hf.write_config(model)["model_type"]
    if model.sliding_window is None or _keeps_windows(kind, model):
        return ""
    return f"; mlx-lm ignores the attention window of {model.sliding_window} tokens"


def _tensors(
    source: Source, form: HFFormat, dtype: np.dtype, layers: dict[str, dict[str, int]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the format's tensors; experts' are stacked. Adds what is packed to ``layers``."""
    for name, same in itertools.groupby(held_tensors(source, form), lambda item: _stack(item[0])):
        found = [(held, place) for _, held, place in same]
        stack = np.stack if _STACK in name else (lambda arrays: arrays[0])
        packed = [isinstance(value, MixedTensor) for held, _ in found for value in held.values()]
        if not any(packed):
            yield name, stack([cast_tensor(name, held, place, dtype) for held, place in found])
            continue
        if not all(packed):
            raise ConvertError(f"{name} is packed in part, expected all of it or nothing for mlx")
        path = name.removesuffix(".weight")
        tensors = [value for held, _ in found for value in held.values()]
        bits, group = _shared(path, tensors)
        layers[path] = {"group_size": group, "bits": bits}
        experts = [_fitted(path, held, place, bits, group, dtype) for held, place in found]
        for leaf, arrays in zip(("weight", "scales", "biases"), zip(*experts)):
            yield f"{path}.{leaf}", stack(list(arrays))


def _stack(name: str) -> str:
    """Returns mlx-lm's name of the stack that an expert's weight is part of; other names as they are."""
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        return name
    return f"{expert[1]}{_STACK}{_MIXTRAL.get(expert[2], expert[2])}.weight"


def _shared(name: str, tensors: list[MixedTensor]) -> tuple[int, int]:
    """Returns the least width and the largest group that hold all of the tensors."""
    bits = min(width for width in BITS if width >= max(int(tensor.bits().max()) for tensor in tensors))
    return bits, _group_size(name, tensors[0].shape[0], *(tensor.group_size for tensor in tensors))


def _group_size(name: str, inputs: int, *group_sizes: int) -> int:
    """Returns the largest group that divides a layer's inputs and all of its groups, multiples of 32."""
    if inputs % GROUPS[-1]:
        raise ConvertError(f"{name} has {inputs} inputs, expected a multiple of {GROUPS[-1]} for mlx")
    return next(group for group in GROUPS if not any(size % group for size in (inputs, *group_sizes)))


def _fitted(
    name: str, held: dict[str, MixedTensor], place: Held, bits: int, group: int, dtype: np.dtype
) -> list[np.ndarray]:
    """Returns the three arrays of a layer that holds several of ours.

    Raises:
      ConvertError: ``dtype`` does not hold the scales or biases.
    """
    parts = [_affine(tensor, bits, group) for tensor in held.values()]
    for ours, (_, *values) in zip(held, parts):
        for what, value in zip(("scales", "biases"), values):
            with np.errstate(over="ignore"):
                stored = value.astype(dtype).astype(np.float32)
            if np.any(stored != value):
                raise ConvertError(
                    f"{name} ({ours}) has {what} that {dtype} cannot hold exactly: quantize with --for mlx, "
                    "or export with --dtype float32"
                )
    weight, scales, biases = (np.ascontiguousarray(place.join([v.T for v in leaf])) for leaf in zip(*parts))
    return [weight, scales.astype(dtype), biases.astype(dtype)]


def _affine(tensor: MixedTensor, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the same weights in codes of ``bits`` bits and groups of ``group``, exact in float32.

    Returns:
      The words ``uint32[K * bits / 32, N]``, and scales and biases ``float32[K / group, N]``.
    """
    codes, zeros, scales = stored_parts(tensor)
    shift = (bits - tensor.bits()).astype(np.uint32)
    inputs = np.arange(len(codes)) // tensor.group_size  # our group of each input channel
    words = pack_rows(codes << shift[inputs][:, None], bits)
    of = inputs[::group]  # and of each group of the format
    return words, (scales / np.exp2(shift.astype(np.float32))[:, None])[of], -(scales * zeros)[of]
