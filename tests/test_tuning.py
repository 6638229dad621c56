"""The autotuning tables: entries are used, and the fastest correct configuration is written."""

import dataclasses
import json
import math
from argparse import Namespace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import tune
from bench.timing import Product
from pallas_kernels import autotune, pack
from pallas_kernels.gpu import kernel as gpu
from pallas_kernels.tpu import decode as tpu

KERNELS = pytest.mark.parametrize("kernel", [gpu, tpu])
FIELD = {"mosaic_gpu": "stages", "mosaic_tpu": "groups"}


def name_of(kernel) -> str:
    return kernel.NAME


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Paths of the packaged table and of the user's; neither exists."""
    monkeypatch.setattr(autotune, "PACKAGED", tmp_path / "packaged.json")
    monkeypatch.setenv("SLIM_JAX_CACHE", str(tmp_path / "cache"))
    autotune.forget()
    yield tmp_path / "packaged.json", autotune.user_table()
    autotune.forget()


@KERNELS
def test_the_table_comes_before_the_heuristic(tables, kernel):
    product = (4096, 4096, 2, 128)
    by_heuristic = kernel.heuristic("Some device", 16, 4096, 4096)
    assert kernel.choose("Some device", 16, *product) == by_heuristic
    measured = dataclasses.replace(by_heuristic, **{FIELD[name_of(kernel)]: 2})
    key = autotune.key("Some device", 16, *product)
    tune.store(tables[1], name_of(kernel), key, dataclasses.asdict(measured))
    autotune.forget()
    for m in (9, 16):
        assert kernel.choose("Some device", m, *product) == measured
    assert kernel.choose("Some device", 8, *product) == kernel.heuristic("Some device", 8, 4096, 4096)
    assert kernel.choose("Other device", 16, *product) == by_heuristic
    for other in ((4096, 4096, 3, 128), (4096, 4096, 2, 64)):  # three bits, or groups of 64
        assert kernel.choose("Some device", 16, *other) == by_heuristic


@KERNELS
def test_a_kernel_asks_for_its_weight(kernel, monkeypatch):
    """The lookup uses the mean width and group size of the weight that is multiplied."""
    asked = []
    monkeypatch.setattr(kernel, "choose", lambda *key: asked.append(key) or kernel.Config())
    monkeypatch.setattr(kernel, "_product", lambda x, *_: x, raising=False)
    monkeypatch.setattr(kernel, "_decode", lambda x, *_: x, raising=False)
    bits = np.array([1, 2, 2, 3])
    zeros = np.zeros((4, 128), np.uint8)
    w = pack(np.zeros((256, 128), np.uint8), zeros, zeros, bits, group_size=64)
    kernel.mixed_matmul(jnp.ones((4, 256), jnp.bfloat16), w)
    assert asked[0][1:] == (4, 256, 128, 2.0, 64)


def test_mean_widths_count_as_the_nearest(tables):
    assert autotune.key("a", 1, 2, 3, 2.1, 64) == autotune.key("a", 1, 2, 3, 2, 64) == "a/1x2x3/2bit-g64"


def test_the_users_entries_win(tables):
    key = autotune.key("a", 16, 1, 1, 2, 64)
    for path, stages in zip(tables, (2, 4)):
        tune.store(path, "mosaic_gpu", key, {"stages": stages})
    autotune.forget()
    found = autotune.tuned("mosaic_gpu", gpu.Config, "a", 16, 1, 1, 2, 64)
    assert found == gpu.Config(stages=4)
    tables[1].unlink()
    autotune.forget()
    found = autotune.tuned("mosaic_gpu", gpu.Config, "a", 16, 1, 1, 2, 64)
    assert found == gpu.Config(stages=2)


def test_where_the_users_table_is(monkeypatch):
    for name in ("SLIM_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/somebody")
    assert str(autotune.user_table()) == "/somebody/.cache/slim-jax/tuned.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(autotune.user_table()) == "/cache/slim-jax/tuned.json"
    monkeypatch.setenv("SLIM_JAX_CACHE", "/here")
    assert str(autotune.user_table()) == "/here/tuned.json"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"mosaic_gpu": 1}', '{"mosaic_gpu": {"KEY": {"nothing": 1}}}']
)
def test_a_broken_cache_stops_no_product(tables, content):
    key = autotune.key("a", 16, 4096, 4096, 2, 64)
    tables[1].parent.mkdir()
    tables[1].write_text(content.replace("KEY", key))
    with pytest.warns(UserWarning, match="ignored"):
        found = gpu.choose("a", 16, 4096, 4096, 2, 64)
    assert found == gpu.heuristic("a", 16, 4096, 4096)


def test_store_keeps_what_is_there(tables):
    _, table = tables
    tune.store(table, "mosaic_gpu", "a/16x1x1", {"stages": 2})
    tune.store(table, "mosaic_gpu", "b/16x1x1", {"stages": 3})
    tune.store(table, "mosaic_gpu", "a/16x1x1", {"stages": 4})
    assert json.loads(table.read_text()) == {
        "mosaic_gpu": {"a/16x1x1": {"stages": 4}, "b/16x1x1": {"stages": 3}}
    }
    assert [path.name for path in table.parent.iterdir()] == ["tuned.json"]


@KERNELS
def test_candidates_are_valid_and_differ(kernel):
    start = kernel.heuristic("Some device", 16, 4096, 4096)
    fields = tune.FIELDS[name_of(kernel)]
    found = list(tune.candidates(start, fields))
    assert found[0] == start
    assert len(set(found)) == len(found) > 10
    changes = [sum(getattr(c, f) != getattr(start, f) for f in fields) for c in found]
    assert changes == sorted(changes)  # a search that is cut short has tried the nearest


X = jnp.ones((4, 32))
WEIGHTS = (jnp.ones((32, 8)),)
WANTED = np.full((4, 8), 32.0)


def product(run) -> Product:
    return Product(run, X, WEIGHTS, 1, 1)


def refuses(x, w):
    raise NotImplementedError("no such device")


@jax.jit
def slow(x, w):
    return jax.lax.fori_loop(0, 20_000, lambda _, y: jnp.minimum(y, x @ w), x @ w)


def test_the_fastest_wins_and_what_fails_is_left_out():
    found = tune.search(
        [("slow", product(slow)), ("fast", product(jnp.matmul)), ("not", product(refuses))], WANTED, math.inf
    )
    assert found.best(repeats=3)[0] == "fast"
    assert sorted(found.works) == ["fast", "slow"]
    assert found.failed == {"not": "no such device"}
    with pytest.raises(ValueError, match="none of 1 configurations works on this device: no such device"):
        tune.search([("not", product(refuses))], WANTED, math.inf).best(repeats=3)


@pytest.mark.parametrize(
    "wrong", [lambda x, w: x @ w + 1, lambda x, w: x @ w * jnp.nan, lambda x, w: x @ x.T]
)
def test_a_wrong_candidate_never_wins(wrong):
    """A wrong candidate loses however fast it is, even if all others are slow."""
    found = tune.search([("slow", product(slow)), ("wrong", product(wrong))], WANTED, math.inf)
    assert found.best(repeats=3)[0] == "slow"
    assert found.failed["wrong"].startswith("values are wrong")


def test_the_search_ends_in_time():
    tried = []

    def products():
        for name in range(100):
            tried.append(name)
            yield name, product(jnp.matmul)

    assert list(tune.search(products(), WANTED, -math.inf).works) == [0]
    assert len(tune.search(products(), WANTED, math.inf).works) == tune.FINALISTS
    assert tried == [0, 1, *range(100)]


def test_tune_writes_what_it_found(monkeypatch, capsys):
    """A whole autotuning of a kernel whose heuristic is wrong."""

    def mixed_matmul(x, w, *, config):
        if config.stages == 4:
            raise NotImplementedError("not this one")
        y = jnp.dot(x.astype(jnp.float32), w.dequantize())
        return y if config.stages == 2 else 2 * y

    kernel = SimpleNamespace(
        NAME=gpu.NAME,
        heuristic=lambda kind, m, k, n: gpu.Config(),
        mixed_matmul=mixed_matmul,
    )
    monkeypatch.setitem(tune.FIELDS, "mosaic_gpu", {"stages": (2, 3, 4)})
    arguments = Namespace(bits=2, group_size=32, repeats=3)
    found = tune.tune(kernel, 4, (128, 64), arguments, seconds=60)
    assert found == dataclasses.asdict(gpu.Config(stages=2))
    assert (
        "stages=3, groups_per_step=4, split_k=1, split_blocks=1): values are wrong" in capsys.readouterr().out
    )
