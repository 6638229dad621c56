"""Compilation in a process of its own: compilers read their flags once per process, and may abort."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from bench.results import Record

TELLING = re.compile(r"LLVM ERROR|[\w.]*(Error|Exception|Exit)\b|F\d{4} ")
"""Beginnings of lines that state the reason in a traceback, or in a compiler's last words."""


def compiled(
    compiler: str, folder: str, request: Record, environment: dict[str, str], timeout: float
) -> Record:
    """Runs ``compile_here(folder, **request)`` of ``bench.<compiler>``, which returns a record.

    Args:
      compiler: name of the module.
      folder: for the files that the compiler writes.
      request: arguments that JSON can express.
      environment: variables of the process, in addition to this one's.
      timeout: limit in seconds.

    Returns:
      The record, and ``error``: None, or one line if the process failed; ``aborted`` is then True if a
      signal ended it.
    """
    code = (
        f"import json, sys; from bench.{compiler} import compile_here; folder, request = sys.argv[1:]; "
        "found = compile_here(folder, **json.loads(request)); "
        "open(f'{folder}/result.json', 'w').write(json.dumps(found))"
    )
    call = [sys.executable, "-c", code, folder, json.dumps(request)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled after {timeout:.0f} s", "aborted": False}
    result = Path(folder, "result.json")
    if result.exists():
        return {"error": None, **json.loads(result.read_text())}
    return {"error": _reason(done), "aborted": done.returncode < 0}


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    died = f"the compiler died (signal {-done.returncode}): " if done.returncode < 0 else ""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
    if any("No module named 'libtpu'" in line or "libtpu.so" in line for line in lines):
        return "libtpu is not installed: pip install 'jax[tpu]'"
    return died + ([line for line in lines if TELLING.match(line)] or lines)[-1][:400]
