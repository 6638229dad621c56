"""`bench device`, the one command for a new device: all stages at tiny shapes, and failures."""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import __main__ as bench
from bench import device, device_stages, fused, machine, matmul, timing
from bench.device import limited
from pallas_kernels import chips
from pallas_kernels.tpu import config


def read(folder: Path) -> tuple[dict, str]:
    return json.loads((folder / "device-report.json").read_text()), (folder / "device-report.md").read_text()


def main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        bench.main(["device", *arguments])
    return ended.value.code


@pytest.fixture
def quick_to_compile():
    """Turns off most compiler optimizations: these tests do not measure speed."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.slow
def test_every_stage_runs(tmp_path, monkeypatch, quick_to_compile):
    assert main("--quick", "--allow-cpu", "--out", str(tmp_path)) == 0
    document, page = read(tmp_path)
    assert document["ok"] is True
    assert [stage["status"] for stage in document["stages"].values()] == ["passed"] * len(device.STAGES)
    stages = document["stages"]
    assert stages["capability"]["cases"][0]["platform"] == "cpu"
    assert stages["capability"]["cases"][2]["implementation"] == "xla"
    assert len(stages["check"]["cases"]) == 2
    assert all(row["microseconds"] > 0 for case in stages["matmul"]["cases"] for row in case["rows"])
    assert stages["decode"]["cases"][1]["seconds"]["packed"] > 0
    assert stages["prefill"]["cases"][1]["seconds"]["packed"] > 0
    found = stages["quantize"]["cases"][0]["perplexity"]
    assert found["packed"] == pytest.approx(found["packed_by_xla"], rel=1e-6)
    assert all(f"## {name}" in page for name in device.STAGES)
    assert sorted(os.listdir(tmp_path)) == ["device-report.json", "device-report.md"]


def test_the_stages_are_those_that_are_offered():
    assert tuple(device_stages.STAGES) == device.STAGES
    assert sum(seconds for _, seconds in device_stages.STAGES.values()) <= 8 * 60


def test_every_kernel_is_asked_on_a_gpu(monkeypatch):
    """Attention and MLPs run before products; a case's result is its module's."""
    with chips.target("h100"):
        labels = [label for label, _ in itertools.islice(device_stages.check(device_stages.Options()), 12)]
        monkeypatch.setattr(fused.Attention, "compare", lambda case: {"ok": False, "reason": "wrong"})
        _, run = next(device_stages.check(device_stages.Options()))
        assert run() == {"ok": False, "reason": "wrong", "text": "ok NO, reason wrong", "failed": "wrong"}
    assert labels[:10] == [*map(str, fused.CASES)]


def test_a_tpu_begins_with_its_checks_on(monkeypatch):
    asked = []

    def check(cases):
        for case in cases:
            asked.append((case, config.checking()))
            yield {"ok": True}

    monkeypatch.setattr(device_stages.values, "check", check)
    with chips.target("v6e"):
        cases = device_stages.check(device_stages.Options(quick=True))
        labels = [label for label, run in cases if run()["ok"]]
    (first, second), more = asked[:2], asked[2:]
    assert [checked for _, checked in (first, second)] == [True, True]
    assert more == [(case, False) for case, _ in (first, second)]
    assert ["bounds and semaphores checked" in label for label in labels] == [True, True, False, False]


def test_what_a_target_takes_is_asked_as_it_is_called():
    record = device_stages._implementation(1, 128)
    assert (record["implementation"], record["refused"]) == ("xla", [])


def test_a_failing_check_stops_the_next_stages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device_stages.values, "mixed_matmul", lambda x, w, **_: x @ w.dequantize() * jnp.nan)
    stages = "check,matmul"
    assert main("--quick", "--allow-cpu", "--out", str(tmp_path), "--stages", stages) == 1
    document, page = read(tmp_path)
    assert document["ok"] is False
    assert document["stages"]["check"]["status"].startswith("FAILED: 2 of 2 cases")
    assert "not finite" in document["stages"]["check"]["cases"][0]["failed"]
    assert document["stages"]["matmul"]["status"] == "not run"
    assert "FAILED" in page
    assert "FAILED" in capsys.readouterr().out


def raises() -> dict:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 GiB")


def test_an_exception_is_in_the_report(tmp_path):
    report = device.Report(tmp_path, ["check", "matmul"])
    cases = iter([("fine", lambda: {"text": "1", "value": float("nan")}), ("big", raises), ("next", raises)])
    assert not device.run_stage("check", report, cases, time.monotonic() + 60)
    document, page = read(tmp_path)
    stage = document["stages"]["check"]
    assert stage["status"] == "FAILED: big: JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    assert [case["label"] for case in stage["cases"]] == ["fine"]
    assert stage["cases"][0]["value"] == "nan"
    assert "in raises" in stage["traceback"]
    assert stage["traceback"] in page


def test_a_stage_ends_in_time(tmp_path):
    report = device.Report(tmp_path, ["check"])
    cases = ((str(i), lambda: {"text": "done"}) for i in range(5))
    assert device.run_stage("check", report, cases, time.monotonic() - 1)
    stage = read(tmp_path)[0]["stages"]["check"]
    assert stage["status"] == "passed, 4 cases left out: the time was up"
    assert len(stage["cases"]) == 1


def test_a_case_that_hangs_is_left(tmp_path):
    report, left = device.Report(tmp_path, ["check"]), []

    def hangs() -> dict:
        while not left:
            time.sleep(0.01)
        return {"text": "too late"}

    device.run_stage(
        "check", report, iter([("K 4096", hangs)]), 0.0, 0.05, lambda: left.append(read(tmp_path))
    )
    document, _ = left[0]
    assert document["stages"]["check"]["status"] == "FAILED: K 4096 did not end within 0 s"
    assert document["ok"] is False


def test_a_limit_ends_the_process():
    code = "import time; from bench.device import limited\nwith limited(0.1, 'it', print): time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stdout == "it did not end within 0 s\n"
    with limited(60, "this", print):
        pass


def test_without_an_accelerator_it_says_how_to_install(monkeypatch, capsys, tmp_path):
    assert main("--out", str(tmp_path / "none")) == 2
    said = capsys.readouterr().out
    assert "JAX found no accelerator, its platform is cpu" in said
    assert "pip install '.[cuda]'" in said
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(machine, "NEEDED", ("jax", "no_such_module"))
    assert main("--allow-cpu") == 2
    assert "lacks no_such_module" in capsys.readouterr().out


def test_an_old_driver_gets_cuda_12():
    assert machine.install_line({"driver": "550.54.15"}).startswith("pip install . 'jax[cuda12]'")
    assert machine.install_line({"driver": "580.82"}).startswith("pip install '.[cuda]'")


def smi(folder: Path, monkeypatch, text: str, status: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.nvidia_smi() is None
    monkeypatch.undo()
    values = "NVIDIA H100 80GB HBM3, 580.82, 1980, 2619, 1980, 2619, 70.1, 700.00, 31, 81559, [N/A]"
    smi(tmp_path, monkeypatch, values)
    found = machine.nvidia_smi()
    assert found["driver"] == "580.82"
    assert found["used_mib"] == "[N/A]"
    for text, status in (("NVIDIA-SMI has failed", 9), ("", 0), ("no devices were found", 0)):
        smi(tmp_path, monkeypatch, text, status)
        assert machine.nvidia_smi() is None


@pytest.mark.parametrize("rows", [2, 64])
def test_a_loop_and_calls_time_the_same_product(rows, monkeypatch):
    """The loop computes every product, and its time is that of one product, which no call beats by far.

    There is no bound on how much slower a call may be: on a busy machine, dispatch may take any time.
    """
    monkeypatch.setattr(timing, "_turns", lambda product: 3)
    rng = np.random.default_rng(0)
    weights = tuple(jnp.asarray(rng.normal(size=(512, 512)), jnp.float32) for _ in range(3))
    x = jnp.asarray(rng.normal(size=(rows, 512)), jnp.float32)
    product = timing.Product(jax.jit(lambda x, w: jnp.tanh(x @ w @ w @ w)), x, weights, 1, 1)
    loop, call = timing.prepare(product, loop=True), timing.prepare(product, loop=False)
    np.testing.assert_allclose(loop.y, product.run(x, weights[-1]), atol=1e-5)
    found = timing.take_turns({"loop": loop, "call": call}, 7)
    assert [len(times) for times in found.values()] == [7, 7]
    assert min(found["loop"]) < 10 * min(found["call"])


def test_products_of_a_row():
    """A kernel that does not run here is a row with the reason, and leaves the others."""
    given = "--products packed,bf16 --repeats 3 --group-size 32 --config block_n=32,split_k=2"
    rows = matmul.measure(1, 64, 64, matmul.options(argparse.ArgumentParser(), given.split()))
    assert [row["product"] for row in rows] == ["packed", "packed block_n=32,split_k=2", "bf16"]
    assert ["microseconds" in row for row in rows] == [True, False, True]
    assert rows[1]["error"]


def test_nothing_of_a_loop_is_left_out():
    """Every iteration multiplies with every weight: the compiled loop has one product for each."""
    weights = tuple(jnp.full((8, 8), float(i)) for i in range(3))
    x = jnp.ones((2, 8))

    def loop(x, weights, zero):
        return jax.lax.fori_loop(0, 4, lambda _, x: timing._chain(jnp.matmul, weights, zero, x)[0], x)

    text = jax.jit(loop).lower(x, weights, jnp.float32(0)).compile().as_text()
    body = next(part for part in text.split("\n\n") if "region_0" in part and "parameter" in part)
    assert text.count(" dot(") + text.count("__onednn$matmul") + body.count("custom-call(") >= 3


def test_rates():
    product = timing.Product(jnp.matmul, jnp.ones((1, 8)), (), 3_350_000, 989_400_000)
    with timing.chips.target("NVIDIA H100 80GB HBM3"):
        row = timing.rates(product, [3e-6, 1e-6, 2e-6])
    assert (row["microseconds"], row["least"], row["most"]) == (2, 1, 3)
    assert row["percent_of_bandwidth"] == pytest.approx(50)
    assert row["percent_of_matrix_peak"] == pytest.approx(50)
    with pytest.raises(ValueError, match="not at rest"):
        timing.rates(product, [-1e-6, -2e-6, 0])


def test_copies_exceed_the_cache(monkeypatch):
    weight = {"a": jnp.ones(1 << 20, jnp.uint8)}
    assert len(timing.copies(weight, 1)) == 1
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(timing.chips, "of_target", lambda: dataclasses.replace(H100, l2_bytes=5 << 20))
    found = timing.copies(weight, 1)
    assert len(found) == 15
    assert len({one["a"].unsafe_buffer_pointer() for one in found}) == 15
    assert len(timing.copies(weight, 2048)) == 4


H100 = timing.chips.find("h100")
