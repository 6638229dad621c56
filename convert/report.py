"""The page ``report.html``: sizes, bits and errors of a checkpoint, in one file without scripts or links.

The page is a template, `templates/report.html`. The manifest may come from a stranger, so the template
escapes everything that it inserts.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from convert.display import layer_kinds, origin_notes
from slim_jax.store.hub import find
from slim_jax.store.manifest import LEAVES, Manifest, array_bytes, layer_reports, read_manifest, summary

COLORS = {
    1: "#5e4fa2", 2: "#3288bd", 3: "#66c2a5", 4: "#fdae61",
    5: "#f46d43", 6: "#d53e4f", 7: "#9e0142", 8: "#6b0030",
}  # fmt: skip
MOST_GROUPS = 1 << 16
"""Uniform layers with more groups than this are not drawn."""
PARTS = {
    "codes": "#3288bd",
    "scales": "#66c2a5",
    "zero points": "#fdae61",
    "order": "#b58900",
    "embedding and head": "#8a63b8",
    "not packed": "#8c8c8c",
}
LEAF_PARTS = dict(zip(LEAVES, ("codes", "scales", "zero points", "order", "order")))


@dataclasses.dataclass(frozen=True)
class Panel:
    """Map of the bits of one kind of layer: a row per layer, a column per group.

    Attributes:
      kind: name of the kind.
      layers: rows of the summary.
      across: number of columns.
      paths: SVG path of the groups of each width.
    """

    kind: str
    layers: Sequence[dict[str, Any]]
    across: int
    paths: Mapping[int, str]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Bar chart from zero: one or more bars for each block.

    Attributes:
      title: its heading.
      note: one or two sentences about the values.
      colors: color of each of a block's bars, by its name.
      blocks: heights of each block's bars.
    """

    title: str
    note: str
    colors: Mapping[str, str]
    blocks: Sequence[Sequence[float]]

    @property
    def highest(self) -> float:
        """Height of the highest bar, 1 if all are zero."""
        return max(itertools.chain(*self.blocks)) or 1.0


def write_report(checkpoint: str | Path, file: Path) -> None:
    """Writes the report page of a checkpoint, local or on the hub.

    Raises:
      CheckpointError: the checkpoint is missing or unfinished.
      OSError: the file cannot be written.
    """
    manifest = read_manifest(find(checkpoint, weights=False))
    file.write_text(report_page(Path(checkpoint).resolve().name, manifest), encoding="utf-8")


def report_page(title: str, manifest: Manifest) -> str:
    """Returns the report page of a checkpoint as HTML.

    Args:
      title: title of the page, such as the checkpoint's name.
      manifest: the contents of `slim.json`.
    """
    pages = Environment(
        loader=PackageLoader("convert"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["zip"] = zip
    found = summary(manifest)
    given = _bits(found, manifest)
    return pages.get_template("report.html").render(
        title=title,
        found=found,
        settings=manifest.told,
        notes=origin_notes(manifest.origin),
        parts={name: size for name, size in byte_parts(manifest).items() if size},
        part_colors=PARTS,
        colors=COLORS,
        panels=list(_panels(found, given)),
        widths=sorted({bits for groups in given.values() for bits in groups}),
        charts=[*_errors(manifest), *_losses(manifest)] if found["layers"] else [],
    )


def byte_parts(manifest: Manifest) -> dict[str, int]:
    """Bytes of all arrays by category, in the order of :data:`PARTS`."""
    parts = dict.fromkeys(PARTS, 0)
    for block, entry in manifest.entries:
        for name, (shape, kind) in entry.arrays.items():
            owner, _, leaf = name.rpartition(".")
            if owner in entry.packed and leaf in LEAVES:
                part = LEAF_PARTS[leaf] if block else "embedding and head"
            else:
                part = "embedding and head" if name in ("embed", "head.weight") else "not packed"
            parts[part] += array_bytes(shape, kind)
    return parts


def _bits(found: dict[str, Any], manifest: Manifest) -> dict[str, list[int]]:
    """Bits of every group of each layer where they are known, uniform layers included."""
    given: dict[str, list[int]] = {}
    for block in manifest.blocks:
        given |= {} if block.report is None else block.report.allocation
    for layer in found["layers"]:
        if layer["name"] not in given and len(layer["bits"] or {}) == 1:
            ((bits, count),) = layer["bits"].items()
            if count <= MOST_GROUPS:
                given[layer["name"]] = [int(bits)] * count
    return given


def _panels(found: dict[str, Any], given: Mapping[str, Sequence[int]]) -> Iterator[Panel]:
    """Yields a panel for each kind of layer whose bits are all known."""
    for kind, layers in layer_kinds(found["layers"]).items():
        if all(layer["name"] in given for layer in layers):
            rows = [given[layer["name"]] for layer in layers]
            yield Panel(kind, layers, max(map(len, rows)), _paths(rows))


def _paths(rows: Sequence[Sequence[int]]) -> dict[int, str]:
    """SVG path of the cells of each width; equal neighbours in a row form one rectangle."""
    paths: dict[int, list[str]] = {}
    for y, groups in enumerate(rows):
        x = 0
        for bits, equal in itertools.groupby(groups):
            width = len(list(equal))
            paths.setdefault(bits, []).append(f"M{x} {y}h{width}v1h{-width}z")
            x += width
    return {bits: "".join(cells) for bits, cells in sorted(paths.items())}


def _errors(manifest: Manifest) -> Iterator[Chart]:
    """Yields the chart of each block's mean layer output error, if errors are known."""
    means = []
    for block in manifest.blocks:
        errors = [layer.error for layer in layer_reports(block)]
        means.append([sum(errors) / len(errors) if errors else 0.0])  # rules may skip a whole block
    note = "Squared error of a layer's outputs over the squared outputs, mean of a block's layers."
    if any(mean for (mean,) in means):
        yield Chart("Error of each block", note, {"error": "#3288bd"}, means)


def _losses(manifest: Manifest) -> Iterator[Chart]:
    """Yields the chart of each block's loss before and after learning, if blocks were learned."""
    learned = [None if block.report is None else block.report.learning for block in manifest.blocks]
    losses = [(r.losses[0], r.losses[r.kept_epoch]) if r and r.losses else (0.0, 0.0) for r in learned]
    if any(found and found.losses for found in learned):
        colors = {"before": "#8c8c8c", "after": "#66c2a5"}
        title = "Loss of each block, before and after learning"
        yield Chart(title, "On samples that learning did not use.", colors, losses)
