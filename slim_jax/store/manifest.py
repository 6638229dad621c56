"""Manifest of a checkpoint, `slim.json`: gives sizes and bits without reading any array.

It is validated once, when it is read; code that has a :class:`Manifest` need not check again.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp

from pallas_kernels import MixedTensor
from pallas_kernels.chips import product_dtype
from slim_jax.model.block import linear_names
from slim_jax.model.config import DecoderConfig
from slim_jax.model.params import Params, block_buffers
from slim_jax.report import BlockReport, LayerReport, TuningReport
from slim_jax.rules import Rule
from slim_jax.store.files import CheckpointError as CheckpointError
from slim_jax.store.records import from_json

FORMAT = "slim-jax"
VERSION = 2
"""Format version that is written; version 1, which can also be read, has only bfloat16 scales."""

MANIFEST = "slim.json"
LEAVES = ("words", "scale", "zero", "order", "segments")


def is_checkpoint(path: str | Path) -> bool:
    """True if a folder has a manifest."""
    return (Path(path) / MANIFEST).is_file()


MOST_GROUPS = 1 << 24
"""Largest number of groups in a layer."""

Stored = tuple[tuple[int, ...], str]
"""Shape and dtype of an array."""


@dataclasses.dataclass(frozen=True)
class PackedLayer:
    """Static fields of a packed layer, all but its arrays; see `pallas_kernels.MixedTensor`."""

    shape: tuple[int, int]
    group_size: int
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or self.group_size < 1 or self.groups > MOST_GROUPS:
            raise ValueError(f"a layer is {list(self.shape)} in groups of {self.group_size}")
        _check_widths(self.widths)

    @property
    def groups(self) -> int:
        """The number of groups."""
        return -(-self.shape[0] // self.group_size)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Entry of the manifest: one block, or all parameters outside the blocks.

    Attributes:
      arrays: shape and dtype of every stored array.
      packed: the packed layers, each made up of several of these arrays: ``NAME.words``, ``NAME.scale`` ….
      files: SHA-256 by the file's name in the entry's folder; empty if the arrays are in the checkpoint's
        shards.
      folder: the folder of a draft; None for the entry's usual folder.
    """

    arrays: dict[str, Stored]
    packed: dict[str, PackedLayer]
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    folder: str | None = None

    def __post_init__(self) -> None:
        for name, (shape, dtype) in self.arrays.items():
            if min(shape, default=0) < 0 or math.prod(shape) >= 1 << 63 or not _is_stored(dtype):
                raise ValueError(f"{name} is {dtype[:80]}{list(shape)}, expected an array")
        for name in self.packed:
            if missing := [leaf for leaf in LEAVES if f"{name}.{leaf}" not in self.arrays]:
                raise ValueError(f"{name} is packed, expected {name}.{missing[0]} among the arrays")
        for path in map(PurePosixPath, (*self.files, *filter(None, [self.folder]))):
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{path} is not in the checkpoint")


@dataclasses.dataclass(frozen=True)
class OuterReport:
    """Reports of embedding and LM head."""

    layers: list[LayerReport]


@dataclasses.dataclass(frozen=True)
class Outer(Entry):
    """Entry of the parameters outside the blocks."""

    report: OuterReport | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers(layer_reports(self))


@dataclasses.dataclass(frozen=True)
class Block(Entry):
    """Entry of a block."""

    report: BlockReport | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers(layer_reports(self))
        for widths in () if self.report is None else self.report.allocation.values():
            _check_widths(widths)
        learning = None if self.report is None else self.report.learning
        if learning is not None and not 0 <= learning.kept_epoch < max(len(learning.losses), 1):
            raise ValueError(f"kept_epoch is {learning.kept_epoch}, of {len(learning.losses)} losses")


def _check_layers(layers: Sequence[LayerReport]) -> None:
    for layer in layers:
        widths, counts = layer.bits.keys(), layer.bits.values()
        if not widths <= set("12345678") or not all(0 <= count <= MOST_GROUPS for count in counts):
            raise ValueError(f"{layer.name} has the bits {layer.bits}, expected groups of 1 to 8")


def _check_widths(widths: Sequence[int]) -> None:
    if not widths or not all(1 <= width <= 8 for width in widths):
        raise ValueError(f"widths are {list(widths)[:8]}, expected some from 1 to 8")


def _is_stored(dtype: str) -> bool:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        return False
    return str(found) == dtype and found.kind in "biufV" and found.itemsize > 0


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Description of the windows that a run was calibrated on."""

    samples: int
    length: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Told:
    """Settings of a run that code other than the quantizer reads."""

    method: str
    bits: float
    group_size: int
    rules: list[Any] = dataclasses.field(default_factory=list)
    calibration: Calibration | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Manifest of a checkpoint.

    Attributes:
      decoder: the model's config.
      origin: the source's origin, see `slim_jax.store.source.Source`.
      quantization: settings that a resumed run must share, as JSON values; None for dense weights.
      complete: False for a run that can be resumed.
      version: format version.
      outer: entry of the parameters outside the blocks.
      blocks: entries of the blocks, in order.
      tuned: entries of fine-tuned blocks; once there is one for each block, they replace ``blocks``.
      tuning: report of the fine-tuning, if there was one.
      files: SHA-256 of the safetensors files that hold all arrays; None if each entry has a folder.

    Raises:
      ValueError: the fields contradict one another.
    """

    decoder: DecoderConfig
    origin: dict[str, Any]
    quantization: dict[str, Any] | None
    complete: bool = False
    version: int = VERSION
    outer: Outer | None = None
    blocks: tuple[Block, ...] = ()
    tuned: tuple[Block, ...] = ()
    tuning: TuningReport | None = None
    files: dict[str, str] | None = None

    def __post_init__(self) -> None:
        layers, done = self.decoder.num_layers, len(self.blocks)
        if done > layers or len(self.tuned) > done or (self.complete and (done < layers or not self.outer)):
            missing = "" if self.outer else ", and nothing outside of them"
            raise ValueError(f"it lists {done} blocks of {layers}{missing}")
        for prefix, entry in self.entries:
            values = sum(math.prod(shape) for shape, _ in entry.arrays.values())
            if not values or len(entry.arrays) <= (self.decoder.num_experts if prefix else 0):
                raise ValueError(f"{prefix or 'outer.'} lists {len(entry.arrays)} arrays, expected more")
        for key in {"kind", "path", "name", "fingerprint"} & self.origin.keys():
            from_json(str, self.origin[key], f"origin.{key}")
        for rule in [] if self.told is None else self.told.rules:
            Rule.of(rule)

    @property
    def entries(self) -> list[tuple[str, Entry]]:
        """Entries written so far, :attr:`outer` first, each with a prefix such as ``"blocks.0."``."""
        outer = [] if self.outer is None else [("", self.outer)]
        return [*outer, *((f"blocks.{index}.", block) for index, block in enumerate(self.blocks))]

    @property
    def told(self) -> Told | None:
        """Fields of :attr:`quantization` that other code reads."""
        return from_json(Told | None, self.quantization, "quantization")

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as JSON values."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        for entry in (*filter(None, [fields["outer"]]), *fields["blocks"], *fields["tuned"]):
            if entry["folder"] is None:
                del entry["folder"]
        return {
            key: value for key, value in fields.items() if value or key not in ("tuned", "tuning", "files")
        }


def read_manifest(path: str | Path, *, complete: bool = True) -> Manifest:
    """Reads and validates the manifest of a checkpoint.

    Raises:
      CheckpointError: the manifest is missing, damaged or of a newer format, or, if ``complete``, it is that
        of an unfinished run.
    """
    file = Path(path) / MANIFEST
    try:
        found = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError:
        raise CheckpointError(f"{path} is no slim-jax checkpoint: it has no {MANIFEST}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not a slim-jax manifest")
    try:
        version = from_json(int, found.get("version"), "version")
        if version > VERSION:
            raise ValueError(f"format version is {version}, expected at most {VERSION}: upgrade slim-jax")
        json.dumps(found, ensure_ascii=False).encode()  # raises for half of a surrogate pair
        manifest = from_json(Manifest, found, "")
        for kind in manifest.decoder.kinds:  # from_json cannot check these: they have no annotations
            one = dataclasses.replace(manifest.decoder, kinds=(), block_kinds=(), **dict(kind))
            from_json(DecoderConfig, json.loads(json.dumps(one.to_json())), "decoder.kinds")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    if complete and not manifest.complete:
        done, total = len(manifest.blocks), manifest.decoder.num_layers
        how = "convert it again" if manifest.quantization is None else "quantize with --resume"
        raise CheckpointError(f"{path} is unfinished, {done} of {total} blocks are done: {how}")
    return manifest


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def stored_arrays(params: Params) -> tuple[dict[str, Any], dict[str, PackedLayer]]:
    """Splits parameters into the stored arrays, by name, and an entry's ``packed`` fields."""
    arrays: dict[str, Any] = {}
    packed: dict[str, PackedLayer] = {}
    for name, value in params.items():
        if isinstance(value, MixedTensor):
            packed[name] = PackedLayer(value.shape, value.group_size, value.widths)
            arrays |= {f"{name}.{leaf}": getattr(value, leaf) for leaf in LEAVES}
        else:
            arrays[name] = value
    return arrays, packed


def stored_params(
    packed: Mapping[str, PackedLayer], arrays: Mapping[str, Any], dtype: jnp.dtype | None = None
) -> dict[str, Any]:
    """Rebuilds parameters from the result of :func:`stored_arrays`.

    ``dtype`` is that of dense parameters and of products with packed ones; if None, dense ones are as stored
    and products as `product_dtype` says.
    """
    arrays, params = dict(arrays), dict[str, Any]()
    for name, static in packed.items():
        leaves = {leaf: arrays.pop(f"{name}.{leaf}") for leaf in LEAVES}
        params[name] = MixedTensor(
            **leaves,
            shape=static.shape,
            group_size=static.group_size,
            widths=static.widths,
            dtype=product_dtype() if dtype is None else jnp.dtype(dtype),
        )
    return params | {name: value if dtype is None else value.astype(dtype) for name, value in arrays.items()}


def listed(arrays: dict[str, Any]) -> dict[str, Stored]:
    """Returns the shape and dtype of arrays, as an entry's ``arrays`` has them."""
    return {name: (tuple(value.shape), str(value.dtype)) for name, value in arrays.items()}


def summary(manifest: Manifest) -> dict[str, Any]:
    """Returns what `slim_jax.inspect` does, for a manifest that need not be complete."""
    buffers = block_buffers(manifest.decoder, 0)
    layers, embeddings = list[dict[str, Any]](), list[dict[str, Any]]()
    total_bytes = parameters = 0
    for prefix, entry in manifest.entries:
        sizes = {name: array_bytes(*array) for name, array in entry.arrays.items()}
        total_bytes += sum(sizes.values())
        reports = {layer.name: layer for layer in layer_reports(entry)}
        for name, static in entry.packed.items():
            stored = sum(sizes.pop(f"{name}.{leaf}") for leaf in LEAVES)
            full = prefix + name.removesuffix(".weight")
            (layers if prefix else embeddings).append(_row(full, static, stored, reports.get(full)))
            parameters += math.prod(static.shape)
        parameters += sum(math.prod(entry.arrays[name][0]) for name in sizes if name not in buffers)
    weights = sum(math.prod(row["shape"]) for row in layers)
    stored = sum(row["bytes"] for row in layers)
    return {
        "format_version": manifest.version,
        "family": manifest.decoder.family,
        "origin": manifest.origin,
        "quantization": manifest.quantization,
        "parameters": parameters,
        "bytes": total_bytes,
        "packed_bytes": stored,
        "bits_per_weight": 8 * stored / weights if weights else None,
        "layers": layers,
        "embeddings": embeddings,
        "skipped": _skipped(manifest) if layers else [],
    }


def _skipped(manifest: Manifest) -> list[str]:
    """Names of the blocks' linear layers that are not packed."""
    stored = {prefix + name for prefix, entry in manifest.entries for name in entry.arrays}
    return [name for name in linear_names(manifest.decoder) if f"{name}.weight" in stored]


def layer_reports(entry: Entry) -> Sequence[LayerReport]:
    """Returns the reports of the layers of an entry."""
    report = getattr(entry, "report", None)
    return () if report is None else report.layers


def _row(name: str, static: PackedLayer, stored: int, report: LayerReport | None) -> dict[str, Any]:
    """Row of a packed layer in `slim_jax.inspect`; without a report, ``bits`` is None for mixed widths."""
    k, n = static.shape
    one_width = {str(static.widths[0]): static.groups} if len(static.widths) == 1 else None
    return {
        "name": name,
        "shape": [k, n],
        "group_size": static.group_size,
        "bits": one_width if report is None else report.bits,
        "bytes": stored,
        "bits_per_weight": 8 * stored / (k * n),
        "error": None if report is None else report.error,
        "worst": None if report is None else report.worst,
        "mixed": None if report is None else report.mixed,
        "rise": None if report is None else report.rise,
    }


def array_bytes(shape: Sequence[int], dtype: str) -> int:
    """Number of bytes of an array that the manifest lists."""
    return math.prod(shape) * jnp.dtype(dtype).itemsize
