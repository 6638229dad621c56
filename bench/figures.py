"""Published figures: draws the comparison of tools, fills the tables of the pages, asks `plan` for sizes.

    python -m bench figures                 # docs/comparison.svg and the tables of README.md and docs/
    python -m bench figures --fit           # first plans the models of "will it fit" anew
    python -m bench figures --add "AutoRound, 2 bits" --tool AutoRound peers.json eval.json   # another result

``docs/figures.json`` holds the figures; the picture, the tables and the numbers of README.md come from it. A
result of another tool consists of the ``peers.json`` of `bench.peers` and the JSON line of ``slim-jax eval``.
The picture needs matplotlib (``pip install .[docs]``).
"""

import argparse
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs/figures.json"
PICTURE = ROOT / "docs/comparison.svg"
PAGES = ("README.md", "docs/quality.md")
"""Pages with tables that are filled from the figures."""

BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)

HIGHEST = 1000.0
"""Largest perplexity that the picture shows; results above it are named at its upper edge."""

COLORS = ("#d53e4f", "#3288bd", "#5e9c4f", "#b58900", "#8a63b8", "#777777")

NAMES = {"block_bits": "stored_bits", "model_mb": "megabytes", "cpu_s": "cpu_seconds"}
"""Keys of ``peers.json`` and of ``slim-jax eval --json`` that are called otherwise in the figures."""
KEYS = ("bits", "stored_bits", "megabytes", "perplexity", "kl", "cpu_seconds")

MEMORIES = (4, 8, 16, 24, 80)
"""Sizes of a device's memory in the table "will it fit", in GiB."""
CONTEXT = 4096
"""Tokens for which the table leaves room in the cache."""


def models() -> dict[str, Any]:
    """Configs of well-known models, `slim_jax.model.config.DecoderConfig`, by name."""
    from slim_jax.model.config import DecoderConfig

    def model(layers: int, hidden: int, inner: int, heads: int, kv: int, vocab: int, **more: Any) -> Any:
        sizes = {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocab}
        fields = {"family": "llama", "head_dim": hidden // heads, "max_positions": 32768} | sizes | more
        return DecoderConfig(num_layers=layers, num_heads=heads, num_kv_heads=kv, **fields)

    return {
        "SmolLM2 135M": model(30, 576, 1536, 9, 3, 49152, max_positions=8192),
        "Llama 3.2 1B": model(16, 2048, 8192, 32, 8, 128256),
        "Qwen3 4B": model(36, 2560, 9728, 32, 8, 151936, head_dim=128, qk_norm=True),
        "Llama 3.1 8B": model(32, 4096, 14336, 32, 8, 128256, tied_head=False),
        "Llama 3.3 70B": model(80, 8192, 28672, 64, 8, 128256, tied_head=False),
    }


def fit() -> Iterator[Record]:
    """Plans every model: the bits that fit each memory, and memory and hours of quantizing here."""
    from convert.calibration import parts, written
    from slim_jax.config import LENGTH, SAMPLES, SlimConfig
    from slim_jax.duration import operations, rate
    from slim_jax.plan import make_plan

    own = written(parts(()), SAMPLES)
    for name, config in models().items():
        # `plan` times the machine once; a busy one then seems slow.
        speed = max(rate(config) for _ in range(3))
        record: Record = {"name": name}
        for preset, texts in (("fast", 0), ("good", own)):
            settings = SlimConfig.preset(preset, bits=2.125, group_size=64)
            plan = make_plan(config, settings, "h100", written=texts)
            record |= {
                f"{preset}_hours": operations(config, settings, SAMPLES, LENGTH, texts) / speed / 3600,
                f"{preset}_gib": plan.calibration_bytes / 2**30,
            }
        record |= {"bfloat16_gb": plan.bfloat16_bytes / 1e9, "packed_gb": plan.packed_bytes / 1e9}
        yield record | {"bits": {f"{gib} GiB": bits_that_fit(config, gib) for gib in MEMORIES}}


def bits_that_fit(config: Any, gib: int) -> float:
    """Largest mean bits, groups of 64, at which a memory holds a model and a cache of :data:`CONTEXT` tokens.

    Returns:
      A number of bits from 2 to 7, rounded down to a tenth; 16 if bfloat16 fits, 0 if 2 bits do not.
    """
    from slim_jax.config import SlimConfig
    from slim_jax.plan import USABLE, for_size, make_plan

    settings = SlimConfig.preset("fast", bits=2, group_size=64)
    plan = make_plan(config, settings, "h100", context=CONTEXT, samples=0)
    room = int(USABLE * gib * 2**30) - (plan.device_bytes - plan.packed_bytes)
    if plan.bfloat16_bytes <= room:
        return 16.0
    if plan.packed_bytes > room:
        return 0.0
    return int(10 * for_size(config, settings, room).bits + 0.011) / 10  # the largest is 6.999


def add(document: Record, name: str, tool: str, files: Sequence[Path]) -> None:
    """Adds a result to the comparison, or replaces the one of that name.

    Raises:
      ValueError: the files lack a figure.
    """
    found: Record = {}
    for file in files:
        record = json.loads(file.read_text("utf-8"))
        found |= {NAMES.get(key, key): value for key, value in record.items()}
    if missing := [key for key in KEYS if key not in found]:
        raise ValueError(f"{', '.join(map(str, files))} have no {', '.join(missing)}")
    rows = document["comparison"]["rows"]
    row = {"name": name, "tool": tool} | {key: found[key] for key in KEYS}
    same = [i for i, old in enumerate(rows) if old["name"] == name]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)


def number(value: Any, digits: int = 2) -> str:
    """Formats a figure for a table: thousands with commas, and without decimals where it is large."""
    if value is None:
        return ""
    return f"{value:,.{0 if value >= 10_000 else digits}f}"


def comparison_table(document: Record) -> list[list[str]]:
    """The tools side by side."""
    head = [
        "",
        "whole file, MB",
        "stored bits of the blocks",
        "perplexity",
        "KL, nats",
        "CPU seconds",
    ]
    rows = [
        [
            row["name"],
            number(row["megabytes"]),
            number(row["stored_bits"], 3) if row["bits"] < 16 else "16",
            number(row["perplexity"]),
            number(row.get("kl"), 3),
            number(row.get("cpu_seconds"), 0),
        ]
        for row in document["comparison"]["rows"]
    ]
    return [head, *rows]


def plain_table(document: Record) -> list[list[str]]:
    """Presets at several widths."""
    plain = document["plain"]
    head = ["bits", "groups", "stored bits", "whole file, MB", "`--preset fast`", "CPU seconds"]
    dense = ["16", "", "16", number(plain["full_precision_mb"]), number(plain["full_precision"]), "", "", ""]
    rows = [
        [
            f"{row['bits']:g}",
            str(row["group_size"]),
            number(row["stored_bits"], 3),
            number(row["megabytes"]),
            number(row["fast"]),
            number(row["fast_cpu_seconds"], 0),
            number(row["tuned"]),
            number(row["tuned_cpu_seconds"], 0),
        ]
        for row in plain["rows"]
    ]
    return [[*head, "fine-tuned, more windows", "CPU seconds"], dense, *rows]


def fit_table(document: Record) -> list[list[str]]:
    """Bits that fit each memory, and what quantizing takes."""

    def bits(value: float) -> str:
        return {0.0: "–", 16.0: "16"}.get(value, f"{value:.1f}")

    def hours(value: float) -> str:
        if value < 1.5:
            return f"{60 * value:.0f} min"
        return f"{value:.0f} h" if value < 48 else f"{value / 24:.0f} days"

    head = ["model", "bfloat16", "2.125 bits", *(f"{gib} GiB" for gib in MEMORIES), "`fast`", "`good`"]
    rows = [
        [
            row["name"],
            f"{row['bfloat16_gb']:.3g} GB",
            f"{row['packed_gb']:.3g} GB",
            *(bits(row["bits"][f"{gib} GiB"]) for gib in MEMORIES),
            f"{hours(row['fast_hours'])}, {row['fast_gib']:.0f} GiB",
            f"{hours(row['good_hours'])}, {row['good_gib']:.0f} GiB",
        ]
        for row in document["fit"]["rows"]
    ]
    return [head, *rows]


TABLES: Mapping[str, Callable[[Record], list[list[str]]]] = {
    "comparison": comparison_table,
    "plain": plain_table,
    "fit": fit_table,
}


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table of strings, the first row its head, as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:], ""])


def filled(page: str, document: Record) -> str:
    """Returns a page in which every marked table is that of the figures.

    Raises:
      ValueError: a page marks a table that does not exist.
    """

    def table(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"there is no table {found[2]!r}, expected one of {', '.join(TABLES)}")
        return found[1] + markdown(TABLES[found[2]](document)) + found[3]

    return BLOCK.sub(table, page)


def digest(document: Record) -> str:
    """Hash of the figures that the picture shows; the picture's description has it."""
    return hashlib.sha256(json.dumps(document["comparison"], sort_keys=True).encode()).hexdigest()[:16]


def draw(document: Record) -> str:
    """Plots perplexity over the size of the whole file, a point for each result, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "slim-jax", "font.size": 10})
    comparison = document["comparison"]
    dense, *rows = comparison["rows"]
    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    axes.set_yscale("log")
    axes.set_ylim(14, HIGHEST)
    axes.set_xlim(18, 125)
    axes.set_yticks(ticks := [15, 20, 30, 50, 100, 200, 500, 1000], [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.axhline(dense["perplexity"], color="#888", linestyle="--", linewidth=1)
    axes.annotate(
        f"full precision: {dense['perplexity']:g}, {dense['megabytes']:.0f} MB",
        (124, dense["perplexity"]),
        (0, 3),
        textcoords="offset points",
        ha="right",
        color="#555",
    )
    tools = list(dict.fromkeys(row["tool"] for row in rows))
    for tool in tools:
        ink = COLORS[tools.index(tool) % len(COLORS)]
        mine = sorted((row for row in rows if row["tool"] == tool), key=lambda row: row["megabytes"])
        shown = [(row["megabytes"], min(row["perplexity"], HIGHEST)) for row in mine]
        axes.plot(
            *zip(*shown), color=ink, marker="o", linewidth=1.5 if tool == "slim-jax" else 0, clip_on=False
        )
        for row, at in zip(mine, shown):
            side = row.get("label", "right")
            axes.annotate(
                f"{tool}, {row['bits']:g} bits: {number(row['perplexity'])}"
                + (" (off the scale)" if row["perplexity"] > HIGHEST else ""),
                at,
                (9 if side == "right" else -9, -4),
                textcoords="offset points",
                ha="left" if side == "right" else "right",
                color=ink,
            )
    axes.set_xlabel("whole file, MB")
    axes.set_ylabel("perplexity, lower is better")
    axes.set_title(f"{comparison['model']}, {comparison['text']}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.StringIO()
    figure.savefig(picture, metadata={"Date": None, "Description": digest(document)})
    pyplot.close(figure)
    return re.sub(r"[ \t]+$", "", picture.getvalue(), flags=re.MULTILINE)


def main(parser: argparse.ArgumentParser, given: Sequence[str] | None = None) -> None:
    """Refreshes the figures that the options name, then the picture and the tables."""
    parser.add_argument("--fit", action="store_true", help="plan the models anew, on this machine")
    parser.add_argument("--add", metavar="NAME", help="add the result that the files describe")
    parser.add_argument("--tool", help="the tool of that result")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="JSON of that result")
    arguments = parser.parse_args(given)
    if bool(arguments.add) != bool(arguments.files) or bool(arguments.add) != bool(arguments.tool):
        parser.error("--add needs --tool and files, and they need it")
    document = json.loads(FIGURES.read_text("utf-8"))
    if arguments.add:
        add(document, arguments.add, arguments.tool, arguments.files)
    if arguments.fit:
        document["fit"]["rows"] = [rounded(record) for record in fit()]
    FIGURES.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        (ROOT / page).write_text(filled(text, document), "utf-8")
    PICTURE.write_text(draw(document), "utf-8")


def rounded(value: Any) -> Any:
    """Returns a record with its numbers rounded to three digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main(argparse.ArgumentParser(prog="python -m bench figures"))
