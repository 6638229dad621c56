"""The stage of `bench.device` that compares attention, MLPs and products with float64."""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

from bench import attention, gated
from bench import check as values
from bench.results import Record, line
from pallas_kernels import chips
from pallas_kernels.tpu import config

MOST_PROCESSES = 8


def _likeliest(case: values.Case) -> bool:
    """True if a case is among the most informative, which run first because compiling takes seconds."""
    if case.n < 1024:
        return case.m == 17
    if case.joined:
        return case.m == 16 and (case.k, case.n) in ((4096, 4096), (11008, 1024))
    if case.split_k is not None:
        return case.m == 16 and case.bits == 2 and (case.k, case.n) in ((4096, 4096), (11008, 1024))
    if case.bits == 3:
        return case.m in (16, 2048) and (case.k, case.n) == (4096, 4096)
    return case.m in (1, 16, 33, 2048)


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Record]]]:
    """The cases of the stage, most informative first; ``quick`` takes a few tiny ones.

    TPUs first run the most informative cases with bounds and semaphores checked
    (`pallas_kernels.tpu.config.checked`).
    """
    if chips.of_target().platform == "cuda" and not quick:
        for case in attention.CASES:
            yield str(case), partial(_compared, attention, case)
        for mlp in gated.CASES:
            yield str(mlp), partial(_compared, gated, mlp)
    wanted = list(values.CASES)
    if quick:
        wanted = [case for case in wanted if case.k == 192 and case.bits == 2 and case.m in (1, 17)]
    elif chips.of_target().platform != "cuda":
        wanted = [case for case in wanted if case.split_k is None]
    wanted.sort(key=lambda case: not _likeliest(case))
    # Only one process can hold a TPU. On a GPU, compiling a case takes much longer than running it.
    alone = quick or chips.of_target().platform != "cuda"
    processes = 1 if alone else min(MOST_PROCESSES, max(1, (os.cpu_count() or 1) // 2))
    if chips.of_target().platform == "tpu":
        first = [case for case in wanted if quick or _likeliest(case)]
        with contextlib.closing(values.check(first)) as records:
            for case in first:
                yield f"{case}, bounds and semaphores checked", partial(_compared_checked, records)
    records = values.check(wanted) if processes == 1 else values.check_in_processes(wanted, processes)
    with contextlib.closing(records):
        for case in wanted:
            yield (
                str(case) if processes == 1 else f"a case in {processes} processes",
                partial(_checked, records),
            )


def _compared(kernel: ModuleType, case: Any) -> Record:
    return _told(kernel.compare(case))


def _compared_checked(records: Iterator[Record]) -> Record:
    with config.checked():
        return _checked(records)


def _checked(records: Iterator[Record]) -> Record:
    return _told(next(records))


def _told(record: Record) -> Record:
    return record | {"text": line(record)} | ({} if record["ok"] else {"failed": record["reason"]})
