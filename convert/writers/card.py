"""Model card (README.md) of an exported model: its origin, its sizes and its settings."""

import html
from collections.abc import Sequence
from importlib import resources
from typing import Any

from convert.display import kind_rows
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
    from huggingface_hub import ModelCard, ModelCardData

    found = summary(manifest)
    origin = manifest.origin.get("name") or manifest.origin.get("path") or "a model in memory"
    header = ModelCardData(
        library_name="slim-jax",
        pipeline_tag="text-generation",
        tags=["slim-jax", "quantized"],
        base_model=origin if is_hub_name(origin) else None,
    )
    rows = [
        ("made from", origin),
        ("family", found["family"]),
        ("parameters", f"{found['parameters']:,}"),
        *_stored(found),
        ("all files", f"{size / 1e6:.1f} MB"),
        *_settings(manifest),
        *((f"perplexity on {text}", f"{value:g}") for text, value in perplexity),
    ]
    layers = [
        (row.kind, row.layers, row.shape, row.groups, row.bits, f"{row.bytes / 1e6:.2f}", row.error)
        for row in kind_rows(found)
    ]
    template = (resources.files("convert") / "templates" / "card.md").read_text(encoding="utf-8")
    return str(
        ModelCard.from_template(
            header, template_str=template, title=_text(title), rows=_texts(rows), layers=_texts(layers)
        )
    )


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
        rows.append(("fine-tuned end to end on", f"{manifest.tuning.tokens:,} tokens"))
    return rows


def _texts(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    return [[_text(str(cell)) for cell in row] for row in rows]


def _text(value: str) -> str:
    """Escapes foreign text, so that nothing in it is HTML, a link or the end of a cell."""
    plain = html.escape(" ".join(value.split()), quote=False)
    return plain.replace("|", "/").replace("[", "\\[")
