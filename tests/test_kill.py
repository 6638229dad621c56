"""A run that is killed with SIGKILL at any moment resumes to the same checkpoint: ``make test-slow``."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import QUANTIZE, write_model, write_text
from test_pipeline import assert_same_checkpoint

KILLS = 20


def start(model: Path, text: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "convert.cli", "quantize", model, out, "--calibration", text, *QUANTIZE]
    return subprocess.Popen([*map(str, command), *options], stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "best"])
def test_killed_at_random_moments(tmp_path, preset):
    model = write_model(tmp_path / "hf")
    text = write_text(tmp_path / "calib.txt", 4000, seed=0)
    options = ("--preset", preset, "--set", "epochs=2")
    begin = time.monotonic()
    whole = start(model, text, tmp_path / "whole", *options)
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    seconds = time.monotonic() - begin

    rng, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        out = tmp_path / f"parts-{runs}"
        begin, fresh = time.monotonic(), not out.exists()
        part = start(model, text, out, *options, "--resume")
        try:
            _, errors = part.communicate(timeout=rng.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            part.kill()
            part.communicate()
            kills += 1
            continue
        assert part.returncode == 0, errors
        assert_same_checkpoint(tmp_path / "whole", out)
        runs += 1
        if fresh:  # the machine may have become faster
            seconds = min(seconds, time.monotonic() - begin)
    last = start(model, text, out, *options, "--resume")
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert_same_checkpoint(tmp_path / "whole", out)
