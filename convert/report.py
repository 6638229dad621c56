"""The page ``report.html``: sizes, bits and errors of a checkpoint, in one file without scripts or links.

The manifest may come from a stranger, so everything that the page takes from it is escaped.
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.display import layer_kinds
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

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #666; --paper: #fff; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #999; --paper: #16181c; --line: #3a3d44; }
}
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
h2 { margin: 2rem 0 .4rem; font-size: 1.15rem; }
p.note { margin: 0 0 .8rem; color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
td.bar { width: 25%; }
.bar div, .whole { display: flex; height: .9rem; }
.whole { height: 1.8rem; border-radius: 3px; overflow: hidden; }
.entry { white-space: nowrap; margin-right: 1rem; }
.key { display: inline-block; width: .9rem; height: .9rem; margin-right: .3rem; vertical-align: middle; }
.tiles, .maps { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
.tiles b { display: block; font-size: 1.4rem; }
.tiles span { color: var(--soft); }
figure { margin: 0; max-width: 100%; }
figcaption { color: var(--soft); }
svg { display: block; max-width: 100%; background: var(--line); }
svg.chart { background: none; width: 100%; height: 9rem; border-bottom: 1px solid var(--line); }
"""


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
      title: of the page, such as the checkpoint's name.
      manifest: the contents of `slim.json`.
    """
    found, title = summary(manifest), _text(title)
    sections = [_tiles(found, manifest), _where(manifest)]
    if found["layers"]:
        sections += [_heat_map(found, manifest), _errors(manifest), _losses(manifest), _table(found)]
    body = "\n".join(section for section in sections if section)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"/><meta name="viewport" content="width=device-width"/>
<title>{title}</title><style>{STYLE}</style></head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def _tiles(found: dict[str, Any], manifest: Manifest) -> str:
    """Tiles with the main figures: size, bits per weight, parameters and method."""
    smaller = 2 * found["parameters"] / found["bytes"]
    tiles = [
        (f"{found['bytes'] / 1e6:,.1f} MB", f"in all, {smaller:.2f} times smaller than in bfloat16"),
        (f"{found['parameters']:,}", "parameters"),
    ]
    if found["layers"]:
        told = "bits per weight in the blocks, scales, zeros and order included"
        tiles.insert(1, (f"{found['bits_per_weight']:.3f}", told))
    if (settings := manifest.told) is not None:
        tiles.append((settings.method, f"{settings.bits:g} bits, groups of {settings.group_size}"))
    cells = "".join(f"<div><b>{_text(b)}</b><span>{_text(s)}</span></div>" for b, s in tiles)
    return f'<div class="tiles">{cells}</div>'


def _key(colors: dict[str, str]) -> str:
    return "".join(
        f'<span class="entry"><span class="key" style="background:{color}"></span>{_text(name)}</span> '
        for name, color in colors.items()
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


def _where(manifest: Manifest) -> str:
    """Bar that shows which share of the bytes each category takes."""
    parts = {name: size for name, size in byte_parts(manifest).items() if size}
    total = sum(parts.values())
    told = {f"{name} {size / 1e6:,.2f} MB ({size / total:.1%})": PARTS[name] for name, size in parts.items()}
    bar = "".join(
        f'<span style="flex:{size};background:{PARTS[name]}" title="{name}: {size:,} bytes"></span>'
        for name, size in parts.items()
    )
    return f'<h2>Where the bytes went</h2>\n<div class="whole">{bar}</div>\n<p>{_key(told)}</p>'


def _heat_map(found: dict[str, Any], manifest: Manifest) -> str:
    """Maps of every group's bits, one panel for each kind of layer, uniform layers included."""
    given: dict[str, list[int]] = {}
    for block in manifest.blocks:
        given |= {} if block.report is None else block.report.allocation
    for layer in found["layers"]:
        if layer["name"] not in given and len(layer["bits"] or {}) == 1:
            ((bits, count),) = layer["bits"].items()
            if count <= MOST_GROUPS:
                given[layer["name"]] = [int(bits)] * count
    panels = []
    for kind, layers in layer_kinds(found["layers"]).items():
        if all(layer["name"] in given for layer in layers):
            panels.append(_panel(kind, layers, [given[layer["name"]] for layer in layers]))
    if not panels:
        return ""
    widths = sorted({bits for groups in given.values() for bits in groups})
    return (
        f'<h2>Bits</h2>\n<p class="note">Down: layers, first to last. Across: groups of input channels.</p>\n'
        f"<p>{_key({_bits(bits): COLORS[bits] for bits in widths})}</p>\n"
        f'<div class="maps">{"".join(panels)}</div>'
    )


def _panel(kind: str, layers: Sequence[dict[str, Any]], rows: Sequence[Sequence[int]]) -> str:
    """Map of one kind of layer: a row per layer, a cell per group; equal neighbours form one shape."""
    paths: dict[int, list[str]] = {}
    for y, groups in enumerate(rows):
        start = 0
        for x in range(1, len(groups) + 1):
            if x == len(groups) or groups[x] != groups[start]:
                run = f"M{start} {y}h{x - start}v1h{start - x}z"
                paths.setdefault(groups[start], []).append(run)
                start = x
    cells = "".join(f'<path fill="{COLORS[b]}" d="{"".join(runs)}"/>' for b, runs in sorted(paths.items()))
    across, down = max(map(len, rows)), len(rows)
    hover = "".join(
        f'<rect x="0" y="{y}" width="{across}" height="1" fill="transparent"><title>'
        f"{_text(layer['name'])}: {layer['bits_per_weight']:.3f} bits per weight</title></rect>"
        for y, layer in enumerate(layers)
    )
    size = f'width="{max(120, min(8 * across, 480))}" height="{max(40, min(8 * down, 320))}"'
    return (
        f"<figure><figcaption>{_text(kind)}: {down} × {across}</figcaption>"
        f'<svg {size} viewBox="0 0 {across} {down}" preserveAspectRatio="none" shape-rendering="crispEdges">'
        f"{cells}{hover}</svg></figure>"
    )


def _errors(manifest: Manifest) -> str:
    """Chart of each block's mean layer output error."""
    means = []
    for block in manifest.blocks:
        errors = [layer.error for layer in layer_reports(block)]
        means.append(sum(errors) / len(errors) if errors else 0.0)  # rules may skip a whole block
    if not any(means):
        return ""
    told = [f"block {i}: {mean:.4g}" for i, mean in enumerate(means)]
    note = "Growth of the layers' squared output error over the squared output, mean of a block's layers."
    return _chart("Error of each block", f"{note} Highest: {max(means):.4g}.", [means], told, ["#3288bd"])


def _losses(manifest: Manifest) -> str:
    """Chart of each learned block's loss before and after learning."""
    reports = [None if block.report is None else block.report.learning for block in manifest.blocks]
    if not any(found and found.losses for found in reports):
        return ""
    before = [found.losses[0] if found and found.losses else 0.0 for found in reports]
    after = [found.losses[found.kept_epoch] if found and found.losses else 0.0 for found in reports]
    told = [f"block {i}: {a:.4g} to {b:.4g}" for i, (a, b) in enumerate(zip(before, after))]
    colors = {"before": "#8c8c8c", "after": "#66c2a5"}
    note = f"On samples that learning did not see. Highest: {max(before + after):.4g}. {_key(colors)}"
    return _chart(
        "Loss of each block, before and after learning", note, [before, after], told, [*colors.values()]
    )


def _chart(
    title: str, note: str, series: Sequence[Sequence[float]], told: Sequence[str], colors: Sequence[str]
) -> str:
    """Bar chart from zero; the bars of one block stand next to each other."""
    highest = max(map(max, series)) or 1.0
    count, width = len(told), 0.8 / len(series)
    bars = []
    for i, text in enumerate(told):
        inside = "".join(
            f'<rect x="{i + 0.1 + j * width:.3f}" y="{100 - 100 * values[i] / highest:.2f}" '
            f'width="{width:.3f}" height="{100 * values[i] / highest:.2f}" fill="{color}"/>'
            for j, (values, color) in enumerate(zip(series, colors))
        )
        bars.append(f"<g>{inside}<title>{_text(text)}</title></g>")
    return (
        f'<h2>{title}</h2>\n<p class="note">{note}</p>\n'
        f'<svg class="chart" viewBox="0 0 {count} 100" preserveAspectRatio="none">{"".join(bars)}</svg>'
    )


def _table(found: dict[str, Any]) -> str:
    head = ("layer", "shape", "group size", "groups", "bits per weight", "error", "expected rise, nats")
    rows = "\n".join(_row(layer) for layer in [*found["embeddings"], *found["layers"]])
    heads = "".join(f"<th>{name}</th>" for name in head)
    skipped = f"\n<p>In full precision: {_text(', '.join(found['skipped']))}</p>" if found["skipped"] else ""
    return f"<h2>Layers</h2>\n<table>\n<tr>{heads}</tr>\n{rows}\n</table>{skipped}"


def _text(value: Any) -> str:
    """Escapes a value of the manifest for HTML."""
    return html.escape(str(value))


def _bits(bits: int) -> str:
    return f"{bits} bit" if bits == 1 else f"{bits} bits"


def _row(layer: dict[str, Any]) -> str:
    counts = {int(bits): count for bits, count in (layer["bits"] or {}).items() if count}
    bar = "".join(
        f'<span style="flex:{_text(count)};background:{COLORS[bits]}" '
        f'title="{_text(count)} groups of {_bits(bits)}"></span>'
        for bits, count in sorted(counts.items())
    )
    error = "" if layer.get("error") is None else f"{layer['error']:.4g}"
    rise = "" if layer.get("rise") is None else f"{layer['rise']:.5f}"
    cells = (layer["name"], " × ".join(map(str, layer["shape"])), layer["group_size"])
    return (
        "<tr>"
        + "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        + f'<td class="bar"><div>{bar}</div></td><td>{layer["bits_per_weight"]:.3f}</td>'
        + f"<td>{error}</td><td>{rise}</td></tr>"
    )
