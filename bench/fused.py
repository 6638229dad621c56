"""The GPU's attention of one new token and its fused MLP, against float64, in the models' shapes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bench.check import TOLERANCE, verdict
from bench.models import random_packed
from bench.results import Record
from pallas_kernels import InputNorm, MixedTensor, chips
from pallas_kernels.gpu import gated, joined
from pallas_kernels.gpu.attention import Scores, attend, parts_of

OF_CACHE = {"float32": 1e-4, "bfloat16": 0.02}
"""Largest error of attention by the cache's dtype, to which all operands are rounded."""

EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda a: a / (1 + np.exp(-a)),
    "gelu_tanh": lambda a: a / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3))),
}
"""Activations in float64."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """``heads`` query heads of ``width`` features over ``kv`` key-value heads, in a cache of ``slots``.

    Attributes:
      start: slots in use before the new token.
      padding: slots at the beginning of the first sequence that hold no token.
      window: number of positions that a query sees; None for all.
      parts: programs per head; None for the target's own choice.
    """

    heads: int
    kv: int
    width: int
    slots: int
    start: int
    batch: int = 1
    padding: int = 0
    window: int | None = None
    softcap: float | None = None
    dtype: str = "bfloat16"
    parts: int | None = None

    def compare(self, *, interpret: bool = False) -> Record:
        """Returns the fields of the case, and ``ok``, ``error`` and ``reason`` as `bench.check.verdict`.

        The case also fails if another slot than the new token's was written.
        """
        rng = np.random.default_rng(self.start)
        dtype, shape = jnp.dtype(self.dtype), (self.batch, self.kv, self.slots, self.width)
        q, k, v = (
            rng.normal(size=(self.batch, n, self.width)).astype(np.float32)
            for n in (self.heads, self.kv, self.kv)
        )
        token = jnp.asarray(np.concatenate([a.reshape(self.batch, -1) for a in (q, k, v)], axis=1))
        rotation = rng.normal(size=(self.batch, 2, self.width)).astype(np.float32)
        q, k = _rotated(q, rotation), _rotated(k, rotation)
        keys, values = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
        slot = np.arange(self.slots)
        first = np.zeros((self.batch, 1), int)
        first[0] = min(self.padding, self.start)
        places = np.where((slot >= first) & (slot <= self.start), slot - first, -1)
        parts = self.parts or parts_of(chips.of_target(), self.batch * self.kv, self.slots)
        scores = Scores(self.width**-0.5, self.softcap)
        window = np.iinfo(np.int32).max if self.window is None else self.window

        def run(*arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            return attend(*arrays, scores=scores, parts=parts, interpret=interpret)

        at = (jnp.asarray(a, jnp.int32) for a in (places[:, self.start], places, self.start, window))
        y, *written = jax.jit(run)(token, jnp.asarray(rotation), keys, values, *at)
        wanted = [old.at[:, :, self.start].set(new.astype(dtype)) for old, new in ((keys, k), (values, v))]
        right = all(_same(*pair, self.start) for pair in zip(written, wanted))
        exact = _exact(self, np.asarray(q, np.float64), *(np.asarray(a, np.float64) for a in wanted), places)
        found = verdict(np.asarray(y, np.float64), exact, OF_CACHE[self.dtype])
        if not right:
            found |= {"ok": False, "reason": "the new slot's values are wrong, or another slot was written"}
        return {"kernel": "attention", **dataclasses.asdict(self), **found}


@dataclasses.dataclass(frozen=True)
class MLP:
    """An MLP with ``rows`` of ``k`` channels, ``inner`` hidden channels and ``n`` outputs.

    Weights have 2 bits on average. The MLP follows a norm, and its output is added to a residual.
    """

    rows: int
    k: int
    inner: int
    n: int
    group_size: int
    activation: str = "silu"

    def compare(self, *, interpret: bool = False) -> Record:
        """Returns the fields of the case, and ``ok``, ``error`` and ``reason`` as `bench.check.verdict`."""
        rng = np.random.default_rng(self.inner)
        shapes = (self.k, self.inner), (self.k, self.inner), (self.inner, self.n)
        gate, up, down = (random_packed(shape, 2, self.group_size, rng) for shape in shapes)
        x, residual = (
            jnp.asarray(rng.normal(size=(self.rows, size)), jnp.float32) for size in (self.k, self.n)
        )
        norm = InputNorm(jnp.asarray(rng.uniform(0.01, 0.02, self.k), jnp.float32), 1e-5)
        w, last = joined.join([gate, up], feeds=self.group_size).behind(norm), joined.join([down])
        plan = gated.plan(self.rows, x.dtype, w, last, self.activation)
        run = jax.jit(lambda *a: gated.mlp(*a, activation=self.activation, plan=plan, interpret=interpret))
        found = np.asarray(run(x, w, last, residual), np.float64)
        first, second, third = (
            np.asarray(jax.jit(MixedTensor.dequantize)(one), np.float64) for one in (gate, up, down)
        )
        wide = np.asarray(norm(x), np.float64)
        hidden = EXACT[self.activation](wide @ first) * (wide @ second)
        wanted = hidden @ third + np.asarray(residual, np.float64)
        return {"kernel": "MLP", **dataclasses.asdict(self), **verdict(found, wanted, TOLERANCE)}


CASES: tuple[Attention | MLP, ...] = (
    Attention(32, 32, 128, 4096, 4095),
    Attention(32, 8, 128, 4096, 1000, batch=4, padding=200),
    Attention(9, 3, 64, 1000, 700, window=512),  # slots that are no multiple of a block
    Attention(8, 4, 256, 2048, 2000, softcap=50.0, window=1024),
    Attention(32, 8, 128, 4096, 0),
    Attention(32, 8, 64, 1024, 65, dtype="float32", parts=8),
    MLP(1, 4096, 11008, 4096, 128),
    MLP(4, 4096, 11008, 4096, 128),
    MLP(16, 2048, 8192, 2048, 64, "gelu_tanh"),
    MLP(1, 576, 1536, 576, 32),
)


def _rotated(a: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    cos, sin = rotation[:, :1], rotation[:, 1:]
    return a * cos + np.roll(a, a.shape[-1] // 2, axis=-1) * sin


def _same(found: jax.Array, wanted: jax.Array, slot: int) -> bool:
    """True if all other slots are equal, and this slot is up to the rounding of its products."""
    own, other = (a[:, :, slot].astype(jnp.float32) for a in (found, wanted))
    near = jnp.allclose(own, other, rtol=0.01, atol=1e-5)
    return bool(near & jnp.array_equal(found.at[:, :, slot].set(0), wanted.at[:, :, slot].set(0)))


def _exact(
    case: Attention, q: np.ndarray, keys: np.ndarray, values: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """Attention in float64, ``[batch, heads * width]``."""
    q = q.reshape(case.batch, case.kv, -1, case.width)
    score = np.einsum("bkrd,bksd->bkrs", q, keys) * case.width**-0.5
    if case.softcap is not None:
        score = case.softcap * np.tanh(score / case.softcap)
    ago = places[:, [case.start]] - places
    seen = (places >= 0) & (ago >= 0) & (ago < (case.window or case.slots))
    score = np.where(seen[:, None, None], score, -np.inf)
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    y = np.einsum("bkrs,bksd->bkrd", weight / weight.sum(axis=-1, keepdims=True), values)
    return y.reshape(case.batch, -1)
