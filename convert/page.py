"""The page that ``slim-jax inspect --html`` writes: one file, no scripts, nothing fetched."""

import html
from typing import Any

COLORS = {1: "#c6dbef", 2: "#6baed6", 3: "#fdae6b", 4: "#e6550d"}

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td.bar { width: 30%; }
td.bar div { display: flex; height: .9rem; }
.key { display: inline-block; width: .9rem; height: .9rem; margin: 0 .3rem 0 1rem; vertical-align: middle; }
"""


def layers_page(title: str, found: dict[str, Any]) -> str:
    """What ``slim_jax.run.checkpoint.inspect`` found as an HTML page.

    Args:
      title: of the page, such as the checkpoint's path.
      found: ``parameters``, ``packed_bytes``, ``bits_per_weight``, ``bytes`` and a row per layer in
        ``layers`` and ``ends``.
    """
    title, layers = html.escape(title), [*found["ends"], *found["layers"]]
    widths = sorted({int(bits) for layer in layers for bits, n in (layer["bits"] or {}).items() if n})
    key = "".join(f'<span class="key" style="background:{_color(b)}"></span>{b} bits' for b in widths)
    rows = "\n".join(_row(layer) for layer in layers)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>
<body>
<h1>{title}</h1>
<p>{found["parameters"]:,} parameters; {found["packed_bytes"] / 1e6:.1f} MB packed at
{found["bits_per_weight"]:.3f} bits per weight in the blocks, scales, zeros and order included;
{found["bytes"] / 1e6:.1f} MB in all.</p>
<p>Share of the groups of a layer at each width:{key}</p>
<table>
<tr><th>layer</th><th>shape</th><th>group size</th><th>groups</th><th>bits per weight</th><th>error</th>
<th>expected rise of the loss, nats</th></tr>
{rows}
</table>
</body>
</html>
"""


def _color(bits: int) -> str:
    return COLORS.get(bits, "#a63603")


def _row(layer: dict[str, Any]) -> str:
    counts = {int(bits): count for bits, count in (layer["bits"] or {}).items() if count}
    bar = "".join(
        f'<span style="flex:{count};background:{_color(bits)}" title="{count} groups of {bits} bits"></span>'
        for bits, count in sorted(counts.items())
    )
    error = "" if layer.get("error") is None else f"{layer['error']:.4g}"
    rise = "" if layer.get("rise") is None else f"{layer['rise']:.5f}"
    cells = (
        html.escape(layer["name"]),
        " × ".join(map(str, layer["shape"])),
        str(layer["group_size"]),
    )
    return (
        "<tr>"
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + f'<td class="bar"><div>{bar}</div></td><td>{layer["bits_per_weight"]:.3f}</td>'
        + f"<td>{error}</td><td>{rise}</td></tr>"
    )
