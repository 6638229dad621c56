"""Model card (README.md) of an exported model: its origin, its sizes and its settings."""

import html
import math
from collections.abc import Sequence
from typing import Any

from convert.display import layer_kinds
from slim_jax.rules import Rule
from slim_jax.store.hub import is_hub_name
from slim_jax.store.manifest import Manifest, summary


def model_card(title: str, manifest: Manifest, size: int, perplexity: Sequence[tuple[str, float]]) -> str:
    """Returns a model card with the hub's header.

    Args:
      title: the model's name.
      manifest: the contents of `slim.json`.
      size: bytes of all files.
      perplexity: names of texts, and the perplexity on each.
    """
    found = summary(manifest)
    origin = manifest.origin.get("name") or manifest.origin.get("path") or "a model in memory"
    header = ["library_name: slim-jax", "pipeline_tag: text-generation", "tags:", "- slim-jax", "- quantized"]
    if is_hub_name(origin):
        header.append(f"base_model: {origin}")
    rows = [
        ("made from", origin),
        ("family", found["family"]),
        ("parameters", f"{found['parameters']:,}"),
        *_stored(found),
        ("all files", f"{size / 1e6:.1f} MB"),
        *_settings(manifest),
        *((f"perplexity on {text}", f"{value:g}") for text, value in perplexity),
    ]
    parts = [
        "---\n" + "\n".join(header) + "\n---",
        f"# {_text(title)}",
        "Packed by [SliM-LLM](https://arxiv.org/abs/2405.14917) in JAX; `slim-jax` runs it as it is stored."
        if found["layers"]
        else "A model that is not quantized, as `slim-jax` stores it.",
        '```\nslim-jax generate FOLDER --prompt "The capital of France is"\n```',
        '```python\nimport slim_jax\n\nmodel = slim_jax.load("FOLDER")  # or owner/model on the hub\n```',
        _table(("", ""), rows),
        _layers(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _stored(found: dict[str, Any]) -> list[tuple[str, str]]:
    if not found["layers"]:
        return []
    smaller = 2 * found["parameters"] / found["bytes"]
    return [
        ("stored bits per weight in the blocks, everything counted", f"{found['bits_per_weight']:.3f}"),
        ("arrays", f"{found['bytes'] / 1e6:.1f} MB, {smaller:.2f} times smaller than in bfloat16"),
    ]


def _settings(manifest: Manifest) -> list[tuple[str, str]]:
    """Rows with the settings of the quantization, if the manifest has them."""
    told, known = manifest.quantization, manifest.told
    if told is None or known is None:
        return []
    names = ("method", "bits", "group_size", "sqc", "criterion", "learn", "embedding_bits", "damping")
    rows = [(name.replace("_", " "), f"{told[name]}") for name in names if told.get(name) is not None]
    rows += [("rule", str(Rule.of(rule))) for rule in known.rules]
    if known.method != "slim-plus":
        rows = [row for row in rows if row[0] != "learn"]
    if (calibration := known.calibration) is not None:
        windows = f"{calibration.samples} windows of {calibration.length} tokens"
        rows.append(("calibration", f"{windows} (SHA-256 {calibration.sha256[:12]}…)"))
    if manifest.tuning is not None:
        rows.append(("tuned end to end on", f"{manifest.tuning.tokens:,} tokens"))
    return rows


def _layers(found: dict[str, Any]) -> str:
    """Table of the stored layers, by kind."""
    rows = []
    for kind, layers in layer_kinds([*found["embeddings"], *found["layers"]]).items():
        groups: dict[str, int] = {}
        for layer in layers:
            for bits, count in (layer["bits"] or {}).items():
                groups[bits] = groups.get(bits, 0) + count
        weights = sum(math.prod(layer["shape"]) for layer in layers)
        stored = sum(layer["bytes"] for layer in layers)
        errors = [layer["error"] for layer in layers if layer["error"] is not None]
        rows.append(
            (
                kind,
                f"{len(layers)}",
                " × ".join(map(str, layers[0]["shape"])),
                ", ".join(f"{bits}: {count}" for bits, count in sorted(groups.items()) if count),
                f"{8 * stored / weights:.3f}",
                f"{stored / 1e6:.2f}",
                f"{sum(errors) / len(errors):.4g}" if errors else "",
            )
        )
    columns = ("layer", "count", "shape", "groups by bits", "bits per weight", "MB", "error of outputs")
    return _table(columns, rows) if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines)


def _text(value: str) -> str:
    """Escapes foreign text, so that nothing in it is HTML, a link or the end of a cell."""
    plain = html.escape(" ".join(value.split()), quote=False)
    return plain.replace("|", "/").replace("[", "\\[")
