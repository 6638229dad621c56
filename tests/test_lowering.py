"""Lowering for chips that are not present, known only by name (`AbstractDevice`): which code runs.

Interpret mode and compilers of single products do not show what `vmap`, several devices or a chip that a
kernel refuses do to a program; lowering does. A test fails if anything warns or logs an error.
"""

import logging
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P
from matmul_cases import MOSAIC_GPU
from test_step import packed_model

from pallas_kernels import mixed_matmul, mixed_ragged_dot
from pallas_kernels.chips import BY_SHORT_NAME
from pallas_kernels.layout import abstract_tensor
from pallas_kernels.tpu import config
from slim_jax.infer.forward import forward, stackable
from slim_jax.infer.fuse import ready
from slim_jax.model.cache import Run, State

TPUS, GPUS, REFUSED = ("v6e", "v5e", "v7x"), ("h100", "a100-80", "b200"), ("t4", "rtx5090", "mi300x")
K = N = 128
G = 64


def mesh_of(target: str, count: int = 1, kind: AxisType = AxisType.Auto) -> AbstractMesh:
    """Mesh of ``count`` devices of a chip, as JAX names it."""
    device = BY_SHORT_NAME[target]
    tpu = device.platform == "tpu"
    cores = device.processors if tpu else None
    one = AbstractDevice(device_kind=device.name, num_cores=cores, platform="tpu" if tpu else "gpu")
    return AbstractMesh((count,), ("x",), (kind,), abstract_device=one)


def lowered(target: str, function, *args, mesh: AbstractMesh | None = None) -> str:
    with use_abstract_mesh(mesh or mesh_of(target)):
        traced = jax.jit(function).trace(*args)
        return traced.lower(lowering_platforms=(BY_SHORT_NAME[target].platform,)).as_text()


def rows(*shape: int, dtype=jnp.bfloat16, sharding=None):
    return jax.ShapeDtypeStruct((*shape, K), dtype, sharding=sharding)


def weight(group_size: int = G, sharding=None):
    w = abstract_tensor((K, N), widths=(2,), segments=(K // group_size,), group_size=group_size)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), w)


def several(count: int):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape), a.dtype), weight())


def over_four(kind: AxisType, target: str) -> str:
    """Product of four rows on four devices, with the weights on all."""
    mesh = mesh_of(target, 4, kind)
    cut, whole = (NamedSharding(mesh, spec) for spec in (P("x"), P()))
    return lowered(target, mixed_matmul, rows(4, sharding=cut), weight(sharding=whole), mesh=mesh)


def gradient(x, w):
    return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(mixed_matmul(x, w))))(x)


def through_layers(x, ws):
    return jax.lax.scan(lambda x, w: (mixed_matmul(x, w), None), x, ws)[0]


@cache
def model():
    return packed_model(layers=1, widths=(2,))  # one width: each has its own loop to lower


def decode_step(target: str) -> str:
    """Lowered decode step of a tiny model."""
    with use_abstract_mesh(mesh_of(target)):
        runs = [Run(run[0].config, len(run), stackable(run)) for run in model().runs()]
        outer, blocks = jax.eval_shape(lambda model: ready(model)[:2], model())
        state = jax.eval_shape(lambda: State.empty(runs, 1, 64, dtype=jnp.bfloat16))

    def step(outer, blocks, state, tokens):
        return forward(outer, blocks, state, tokens, jnp.broadcast_to(state.length, tokens.shape))

    return lowered(target, step, outer, blocks, state, jax.ShapeDtypeStruct((1, 1), jnp.int32))


PROGRAMS = {
    **{f"{m} rows": partial(lambda target, m: lowered(target, mixed_matmul, rows(m), weight()), m=m)
       for m in (1, 4, 16, 40, 300)},
    "gradient": lambda target: lowered(target, gradient, rows(4, dtype=jnp.float32), weight()),
    "vmap": lambda target: lowered(target, jax.vmap(mixed_matmul, (0, None)), rows(3, 1), weight()),
    "explicit": partial(over_four, AxisType.Explicit),
    "auto": partial(over_four, AxisType.Auto),
    "scan": lambda target: lowered(target, through_layers, rows(1, dtype=jnp.float32), several(2)),
    "experts": lambda target: lowered(
        target, mixed_ragged_dot, rows(8), several(2), jax.ShapeDtypeStruct((2,), jnp.int32)
    ),
    "weights": lambda target: lowered(target, jax.vmap(mixed_matmul), rows(2, 1), several(2)),
    "float16": lambda target: lowered(target, mixed_matmul, rows(1, dtype=jnp.float16), weight()),
    "decode step": decode_step,
}  # fmt: skip
LOOPS = {"scan": 1, "experts": 1, "weights": 1}
"""Number of loops of the programs themselves."""


def cases():
    """Yields all programs and targets, as quick or slow tests.

    All programs are quick for two chips without a kernel, of either maker, and for one TPU and one GPU with
    a kernel. The other targets have one quick product; the rest are slow tests.
    """
    for target in (*TPUS, *GPUS, *REFUSED):
        for name in PROGRAMS:
            quick = target in (TPUS[0], GPUS[0], "t4", "mi300x") or name == "1 rows"
            marks = [] if quick else [pytest.mark.slow]
            if name == "decode step" and target in GPUS:  # attention's kernel, until it is rewritten
                marks.append(pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"))
            yield pytest.param(target, name, marks=marks)


@pytest.mark.parametrize(("target", "name"), list(cases()))
def test_the_path_of_a_program(target, name, caplog):
    with caplog.at_level(logging.WARNING):
        text = PROGRAMS[name](target)
    assert caplog.records == []
    many = name == "300 rows" and target in GPUS  # a dense product is faster
    served = target in TPUS or (target in GPUS and MOSAIC_GPU)
    by_kernel = served and name != "auto" and not many
    assert ("tpu_custom_call" in text or "mosaic_gpu" in text) == by_kernel
    if target not in TPUS:
        loops = text.count("stablehlo.while")
        assert loops == LOOPS.get(name, 0) if name != "decode step" else loops <= 1


def test_one_program_is_right_on_every_platform():
    """Traced here for a CPU and lowered for other platforms: only CPUs loop over packed words."""
    traced = jax.jit(mixed_matmul).trace(rows(1), weight())
    loops = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")
        for platform in ("cpu", "cuda", "rocm")
    }
    assert loops == {"cpu": 2, "cuda": 0, "rocm": 0}


@pytest.mark.parametrize("group_size", [256, 96])
def test_a_group_size_without_a_kernel(group_size):
    w = abstract_tensor((768, N), widths=(2,), segments=(768 // group_size,), group_size=group_size)
    text = lowered("h100", mixed_matmul, jax.ShapeDtypeStruct((1, 768), jnp.bfloat16), w)
    assert "mosaic_gpu" not in text
    assert "stablehlo.while" not in text


def test_tpu_kernels_with_checks_on():
    """The checked kernels are another program of the same function."""
    product = jax.jit(lambda x, w: mixed_matmul(x, w))

    def text():
        with use_abstract_mesh(mesh_of("v6e")):
            return product.trace(rows(1), weight()).lower(lowering_platforms=("tpu",)).as_text()

    plain = text()
    with config.checked():
        checked = text()
    for what in ("disable_bounds_checks", "disable_semaphore_checks"):
        assert what in plain
        assert what not in checked
