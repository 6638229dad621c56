"""Runs all checks and measurements of a device in one command, about eight minutes, and writes a report.

    python -m bench device --out device-report

The stages run in order until one fails: a description of the device and of the implementation that products
use, values against float64, times of products, decode, prefill, a real quantization, a profile. The report is
``device-report.json`` and ``.md`` in the folder, rewritten after every case, so that one exists whatever
happens. Exit status 1: a stage failed. Exit status 2: there is nothing to measure here; the command that
installs what is missing is printed.
"""

import argparse
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from bench import machine
from bench.results import Record, write_json

STAGES = ("capability", "check", "matmul", "decode", "prefill", "quantize", "profile")
MINUTES = 8.0  # approximate duration of all stages
CASE_SECONDS = 180.0  # limit of a case (or the time left + 2/3 of this); a longer one hangs
TRACEBACK_LINES = 30


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def limited(
    seconds: float, what: str, on_expiry: Callable[[str], None], leave: Callable[[], None] = _leave
) -> Iterator[None]:
    """Context that ends the process, with status 1, after this many seconds.

    A device cannot interrupt a kernel that hangs. ``on_expiry`` is called first, from another thread, with a
    sentence that names what took too long.
    """

    def expire() -> None:
        try:
            on_expiry(f"{what} did not end within {seconds:.0f} s")
        finally:
            leave()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Report:
    """The findings so far, and the two files that report them.

    Attributes:
      page: the Markdown file.
      file: the JSON file.
      content: the JSON document: ``ok`` and a record for each stage.
    """

    def __init__(self, folder: Path, names: list[str], file: Path | None = None) -> None:
        self.page, self.file = folder / "device-report.md", file or folder / "device-report.json"
        self.content: Record = {
            "command": " ".join(["python -m bench", *sys.argv[1:]]),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "ok": None,
            "stages": {name: {"status": "not run", "seconds": 0.0, "cases": []} for name in names},
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        """Writes both files, each completely before it is renamed."""
        write_json(self.file, self.content)
        part = self.page.with_suffix(".part")
        part.write_text(self.markdown(), encoding="utf-8")
        part.replace(self.page)

    def fail(self, stage: Record, reason: str) -> None:
        """Ends a stage as failed."""
        stage["status"] = f"FAILED: {reason}"
        self.content["ok"] = False
        self.write()
        print(f"FAILED: {reason}", flush=True)

    def markdown(self) -> str:
        """Returns the report as Markdown."""
        stages = self.content["stages"]
        lines = ["# Device report", "", f"`{self.content['command']}`, {self.content['started']}", ""]
        lines += ["| stage | result | seconds | cases |", "|---|---|---|---|"]
        for name, stage in stages.items():
            cases = len(stage["cases"])
            lines.append(f"| {name} | {stage['status']} | {stage['seconds']:.0f} | {cases} |")
        for name, stage in stages.items():
            if stage["status"] == "not run":
                continue
            lines += ["", f"## {name}", "", "```"]
            lines += [_text(case) for case in stage["cases"]]
            lines += [stage["traceback"]] if "traceback" in stage else []
            lines += ["```"]
        return "\n".join(lines) + "\n"


def _text(case: Mapping[str, Any]) -> str:
    failed = f"\n    FAILED: {case['failed']}" if "failed" in case else ""
    return f"{case.get('text', case.get('label'))}{failed}"


def run_stage(
    name: str,
    report: Report,
    cases: Iterator[tuple[str, Callable[[], Record]]],
    deadline: float,
    case_seconds: float = CASE_SECONDS,
    leave: Callable[[], None] = _leave,
) -> bool:
    """Runs the cases that begin before the deadline; returns True if none failed.

    An exception fails the stage and ends it. A case that reports a failure only fails the stage: the other
    cases show where the fault begins. A case that hangs ends the process, after the report names it.
    """
    stage, start = report.content["stages"][name], time.monotonic()
    stage["status"] = "running"
    print(f"== {name}", flush=True)

    fail = partial(report.fail, stage)
    label, left = "the first case", 0
    try:
        for label, run in cases:
            if time.monotonic() > deadline and stage["cases"]:
                left = 1 + sum(1 for _ in cases)
                break
            left_s = deadline - time.monotonic()
            with limited(max(case_seconds, left_s + case_seconds / 1.5), label, fail, leave):
                begin = time.monotonic()
                case = {"label": label, **run(), "wall_s": time.monotonic() - begin}
            stage["cases"].append(case)
            stage["seconds"] = time.monotonic() - start
            print(f"{_text(case)}", flush=True)
            report.write()
    except BaseException as error:
        frames = traceback.format_exc().strip().splitlines()
        stage["traceback"] = "\n".join(frames[-TRACEBACK_LINES:])
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        fail(f"{label}: {type(error).__name__}: {first[:300]}")
        if not isinstance(error, Exception):
            raise
        return False
    failed = [case for case in stage["cases"] if "failed" in case]
    if failed:
        fail(f"{len(failed)} of {len(stage['cases'])} cases, the first {failed[0]['label']}")
        return False
    stage["status"] = f"passed, {left} cases left out: the time was up" if left else "passed"
    report.write()
    return True


def run(report: Report, quick: bool, minutes: float = MINUTES) -> bool:
    """Runs the report's stages until one fails; returns True if none did. ``minutes`` is their total time."""
    names = list(report.content["stages"])
    try:
        from bench.device_stages import STAGES as known
        from bench.device_stages import Options
    except Exception:
        report.content["stages"][names[0]] |= {"status": "FAILED", "traceback": traceback.format_exc()}
        report.content["ok"] = False
        report.write()
        raise
    options, deadline, share = Options(quick), time.monotonic(), minutes / MINUTES
    for name in names:
        stage, seconds = known[name]
        deadline += share * seconds
        options.deadline = deadline
        if not run_stage(name, report, stage(options), deadline, min(1.0, share) * CASE_SECONDS):
            break
    else:
        report.content["ok"] = True
    report.write()
    print(f"the report: {report.page} and {report.file}", flush=True)
    return bool(report.content["ok"])


def main(parser: argparse.ArgumentParser, given: Sequence[str]) -> None:
    """Runs the stages that the options ask for; see the module's docstring."""
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the report")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them, with commas; all without")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="that all stages may take together")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--allow-cpu", action="store_true", help="go on without an accelerator")
    arguments = parser.parse_args(given)
    names = arguments.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"--stages has {unknown[0]!r}, expected some of {', '.join(STAGES)}")
    if reason := machine.obstacle(arguments.allow_cpu):
        print(f"{parser.prog}: {reason}. To install:\n{machine.install_line(machine.nvidia_smi())}")
        sys.exit(2)
    report = Report(arguments.out, names, arguments.json)
    sys.exit(0 if run(report, arguments.quick, arguments.minutes) else 1)
