"""`bench.check`: wrong and missing values fail, and the cases are those of real products."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import pytest
from matmul_cases import MOSAIC_GPU

from bench import check
from bench.__main__ import main
from bench.results import line
from pallas_kernels import backends, chips
from pallas_kernels.gpu import kernel as gpu

SMALL = (check.Case(64, 40, 2, 32, 9), check.Case(64, 40, 2, 32, 17))


def test_cases_are_those_of_real_products():
    for k, n, m in itertools.product((4096, 11008), (1024, 4096), (1, 8, 16, 33, 64, 2048)):
        mine = [c for c in check.CASES if (c.k, c.n, c.m) == (k, n, m)]
        assert {c.split_k for c in mine} == ({None} if m == 2048 else {None, 1, 2, 4})
        if m in (1, 16, 2048):
            assert {c.bits for c in mine} == {2, 3}
    assert {c.group_size for c in check.CASES} == {32, 64, 128}
    weights = [c.weight for c in check.CASES]
    assert len(list(itertools.groupby(weights))) == len(set(weights))


def test_right_values_pass():
    (record,) = check.check(SMALL[:1], implementation="xla")
    assert record["ok"]
    assert 0 <= record["error"] < 1e-3
    assert record["reason"] is None


def test_weights_side_by_side_are_compared():
    (record,) = check.check([dataclasses.replace(SMALL[0], n=64, joined=True)], implementation="xla")
    assert record["ok"]
    assert "joined yes" in line(record)


@pytest.mark.slow
def test_processes_share_the_cases():
    cases = [*SMALL, check.Case(96, 40, 3, 32, 2)]
    records = list(check.check_in_processes(cases, 2))
    assert sorted((r["k"], r["m"], r["ok"]) for r in records) == [
        (64, 9, True),
        (64, 17, True),
        (96, 2, True),
    ]
    some = check.check_in_processes(cases, 1)
    next(some)
    some.close()
    assert check.PREALLOCATE not in check.os.environ


@pytest.fixture(scope="module")
def exact():
    """The reference of the small cases; its small weight compiles quickly."""
    return check._Reference(SMALL[0], 17)


@pytest.fixture
def made(monkeypatch, exact):
    """Numbers of rows with which references were created; each of them is ``exact``."""
    rows = []
    monkeypatch.setattr(check, "_Reference", lambda case, m: rows.append(m) or exact)
    return rows


def test_cases_share_a_reference(monkeypatch, exact, made):
    right = lambda x, w, residual: jnp.asarray(exact.y)[: x.shape[0]]  # noqa: E731
    monkeypatch.setitem(backends.BACKENDS, "xla", dataclasses.replace(backends.XLA, matmul=right))
    assert [(r["m"], r["ok"]) for r in check.check(SMALL, implementation="xla")] == [(9, True), (17, True)]
    assert made == [17]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda y: jnp.full_like(y, jnp.nan), "360 of 360 values are not finite"),
        (lambda y: y.at[0, 7].set(jnp.inf), "1 of 360 values are not finite"),
        (lambda y: 1.05 * y, "expected at most 0.01"),
        (lambda y: y[:, ::-1], "expected at most 0.01"),
    ],
)
def test_wrong_values_fail(monkeypatch, tmp_path, exact, made, wrong, reason):
    product = lambda x, w, residual: wrong(jnp.asarray(exact.y[: x.shape[0]]))  # noqa: E731
    monkeypatch.setitem(backends.BACKENDS, "xla", dataclasses.replace(backends.XLA, matmul=product))
    (record,) = check.check(SMALL[:1], implementation="xla")
    assert record["ok"] is False
    assert reason in record["reason"]
    monkeypatch.setattr(check.check, "__defaults__", (SMALL[:1],))
    with pytest.raises(SystemExit) as ended:
        main(["check", "--implementation", "xla", "--json", str(tmp_path / "found.json")])
    assert ended.value.code
    assert json.loads((tmp_path / "found.json").read_text())["cases"][0]["ok"] is False


def test_what_a_compiler_says_is_the_reason(made):
    (record,) = check.check(SMALL[:1], implementation="mosaic_gpu")
    assert record["ok"] is False
    assert ("CPU" if MOSAIC_GPU else "mosaic_gpu needs jax 0.12") in record["reason"]


def test_no_case_begins_when_the_time_is_over():
    records = list(check.check(SMALL, seconds=0))
    assert [(r["ok"], r["reason"]) for r in records] == 2 * [(None, "not run: 0 s are over")]
    assert "not run" in line(records[0])


@pytest.mark.parametrize("target", ["h100", "rtx4090"])
def test_split_k_is_forced_upon_the_gpu_kernel_only(monkeypatch, exact, made, target):
    forced = []

    def kernel(x, w, *, config):
        forced.append((config.split_k, config.groups_per_step))
        return jnp.asarray(exact.y[: x.shape[0]])

    monkeypatch.setattr(gpu, "mixed_matmul", kernel)
    cases = [dataclasses.replace(SMALL[0], group_size=128, split_k=split) for split in (1, 2, 4)]
    assert not list(check.check(cases))  # on a CPU
    with chips.target(target):
        assert all(record["ok"] for record in check.check(cases))
    assert forced == [(1, 4), (2, 4), (4, 4 if target == "h100" else 2)]
