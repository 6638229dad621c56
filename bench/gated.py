"""Checks of the GPU's fused MLP kernels against float64, in the models' shapes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bench.check import verdict
from bench.models import random_packed
from bench.results import Record
from pallas_kernels import InputNorm, MixedTensor
from pallas_kernels.gpu import gated, joined

TOLERANCE = 0.01
"""Largest error relative to the largest output: both inputs are rounded to bfloat16."""

EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda a: a / (1 + np.exp(-a)),
    "gelu_tanh": lambda a: a / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3))),
}
"""Activations in float64."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An MLP with ``rows`` of ``k`` channels, ``inner`` hidden channels and ``n`` outputs.

    Weights have 2 bits on average. The MLP follows a norm, and its output is added to a residual.
    """

    rows: int
    k: int
    inner: int
    n: int
    group_size: int
    activation: str = "silu"


CASES = (
    Case(1, 4096, 11008, 4096, 128),
    Case(4, 4096, 11008, 4096, 128),
    Case(16, 2048, 8192, 2048, 64, "gelu_tanh"),
    Case(1, 576, 1536, 576, 32),
)


def compare(case: Case, *, interpret: bool = False) -> Record:
    """Returns the fields of the case, and ``ok``, ``error`` and ``reason`` as `bench.check.verdict`."""
    rng = np.random.default_rng(case.inner)
    shapes = (case.k, case.inner), (case.k, case.inner), (case.inner, case.n)
    gate, up, down = (random_packed(shape, 2, case.group_size, rng) for shape in shapes)
    x, residual = (jnp.asarray(rng.normal(size=(case.rows, size)), jnp.float32) for size in (case.k, case.n))
    norm = InputNorm(jnp.asarray(rng.uniform(0.01, 0.02, case.k), jnp.float32), 1e-5)
    w, last = joined.join([gate, up], feeds=case.group_size).behind(norm), joined.join([down])
    plan = gated.plan(case.rows, x.dtype, w, last, case.activation)
    assert plan is not None, case
    run = jax.jit(lambda *a: gated.mlp(*a, activation=case.activation, plan=plan, interpret=interpret))
    found = np.asarray(run(x, w, last, residual), np.float64)
    first, second, third = (
        np.asarray(jax.jit(MixedTensor.dequantize)(one), np.float64) for one in (gate, up, down)
    )
    wide = np.asarray(norm(x), np.float64)
    hidden = EXACT[case.activation](wide @ first) * (wide @ second)
    wanted = hidden @ third + np.asarray(residual, np.float64)
    return {"kernel": "MLP", **dataclasses.asdict(case), **verdict(found, wanted, TOLERANCE)}
