"""Parser of libtpu's reports on the kernels that it compiled."""

import collections
import glob
import os
import re
from typing import Any


def kernels(dump: str) -> dict[str, dict[str, Any]]:
    """Bundles, operations by unit, spills and estimated cycles of every kernel, from libtpu's reports."""
    kernels: dict[str, dict[str, Any]] = {}
    for path in sorted(glob.glob(f"{dump}/*final_hlo-static-per-bundle-utilization.txt")):
        name = re.sub(r"-\d+-final_hlo.*", "", os.path.basename(path).split("-", 1)[1])
        if name.startswith(("<late", "TLP")):  # the program around the kernels
            continue
        with open(path) as file:
            text = file.read()
        header = re.search(r"MXU, .*", text)
        assert header is not None, f"libtpu changed the format of {path}"
        units = [unit.strip() for unit in header[0].split(",")]
        table = text.split("== UTILIZATION:")[1].split("\n")
        rows = [list(map(int, line.split())) for line in table if re.fullmatch(r"[\d ]+", line)]
        used = {unit: sum(row[i] for row in rows) for i, unit in enumerate(units)}
        kernels[name] = {
            "bundles": len(rows),
            "bundles_by_loop_depth": _depths(dump, name),
            "operations": {unit: count for unit, count in used.items() if count},
            "spills": used.get("VSTORE:SPILL", 0),
            "estimated_cycles": None,
        }
    for path in glob.glob(f"{dump}/profile/*.textproto"):
        with open(path) as file:
            text = file.read()
        for name, cycles in re.findall(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)', text):
            kernels.setdefault(name, {})["estimated_cycles"] = int(cycles)
    return kernels


def _depths(dump: str, kernel: str) -> dict[str, int]:
    """Number of bundles by loop depth; depth 1 is the grid."""
    depth: collections.Counter[str] = collections.Counter()
    for path in glob.glob(f"{dump}/*-{glob.escape(kernel)}-*final_bundles.txt"):
        if "schedule" in path or "gap" in path:
            continue
        with open(path) as file:
            for line in file:
                if found := re.match(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*((?:> ?)*)\{", line):
                    depth[str(found[1].count(">"))] += 1
    return dict(sorted(depth.items()))
