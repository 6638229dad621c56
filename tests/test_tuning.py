"""The tuning table: what stands in it is used, what was fastest is written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from bench import tune
from pallas_kernels import mosaic_gpu, mosaic_tpu, tuning


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    monkeypatch.setattr(tuning, "TABLE", path)
    tuning.read_table.cache_clear()
    yield path
    tuning.read_table.cache_clear()


@pytest.mark.parametrize("kernel", [mosaic_gpu, mosaic_tpu])
def test_the_table_comes_before_the_heuristic(table, kernel):
    name = kernel.__name__.rpartition(".")[2]
    by_heuristic = kernel.heuristic("Some device", 16, 4096, 4096)
    assert kernel.choose("Some device", 16, 4096, 4096) == by_heuristic
    field = {"mosaic_gpu": "stages", "mosaic_tpu": "groups"}[name]
    measured = dataclasses.replace(by_heuristic, **{field: 2})
    tune.store(table, name, tuning.key("Some device", 16, 4096, 4096), dataclasses.asdict(measured))
    tuning.read_table.cache_clear()
    for m in (9, 16):
        assert kernel.choose("Some device", m, 4096, 4096) == measured
    assert kernel.choose("Some device", 8, 4096, 4096) == kernel.heuristic("Some device", 8, 4096, 4096)
    assert kernel.choose("Other device", 16, 4096, 4096) == by_heuristic


def test_store_keeps_what_is_there(table):
    tune.store(table, "mosaic_gpu", "a/16x1x1", {"stages": 2})
    tune.store(table, "mosaic_gpu", "b/16x1x1", {"stages": 3})
    tune.store(table, "mosaic_gpu", "a/16x1x1", {"stages": 4})
    assert json.loads(table.read_text()) == {
        "mosaic_gpu": {"a/16x1x1": {"stages": 4}, "b/16x1x1": {"stages": 3}}
    }
    assert [path.name for path in table.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize("kernel", [mosaic_gpu, mosaic_tpu])
def test_candidates_are_valid_and_differ(kernel):
    start = kernel.heuristic("Some device", 16, 4096, 4096)
    found = list(tune.candidates(start, tune.FIELDS[kernel.__name__.rpartition(".")[2]]))
    assert found[0] == start
    assert len(set(found)) == len(found) > 10


def test_the_fastest_wins_and_what_fails_is_left_out():
    def refuses(x):
        raise NotImplementedError

    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda _, a: jnp.sin(a @ x), x))
    x = jnp.ones((64, 64))
    products = {"fast": (jax.jit(jnp.sin), (x,), 0), "slow": (slow, (x,), 0), "not": (refuses, (x,), 0)}
    best, seconds = tune.fastest(products, repeats=5)
    assert best == "fast"
    assert sorted(seconds) == ["fast", "slow"]
    with pytest.raises(ValueError, match="none of 1 configurations"):
        tune.fastest({"not": products["not"]}, repeats=5)
