"""Checks of the GPU's decode attention (one new token) against float64, in the models' shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from bench.check import verdict
from bench.results import Record
from pallas_kernels import chips
from pallas_kernels.gpu.attention import Scores, attend, parts_of

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}
"""Largest error relative to the largest output, by the cache's dtype, to which all operands are rounded."""


@dataclasses.dataclass(frozen=True)
class Case:
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


CASES = (
    Case(32, 32, 128, 4096, 4095),
    Case(32, 8, 128, 4096, 1000, batch=4, padding=200),
    Case(9, 3, 64, 1000, 700, window=512),  # slots that are no multiple of a block
    Case(8, 4, 256, 2048, 2000, softcap=50.0, window=1024),
    Case(32, 8, 128, 4096, 0),
    Case(32, 8, 64, 1024, 65, dtype="float32", parts=8),
)


def compare(case: Case, *, interpret: bool = False) -> Record:
    """Returns the fields of the case, and ``ok``, ``error`` and ``reason`` as `bench.check.verdict`.

    The case also fails if another slot than the new token's was written.
    """
    rng = np.random.default_rng(case.start)
    dtype, shape = jnp.dtype(case.dtype), (case.batch, case.kv, case.slots, case.width)
    q, k, v = (
        rng.normal(size=(case.batch, n, case.width)).astype(np.float32)
        for n in (case.heads, case.kv, case.kv)
    )
    token = jnp.asarray(np.concatenate([a.reshape(case.batch, -1) for a in (q, k, v)], axis=1))
    rotation = rng.normal(size=(case.batch, 2, case.width)).astype(np.float32)
    q, k = _rotated(q, rotation), _rotated(k, rotation)
    keys, values = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    slot = np.arange(case.slots)
    first = np.zeros((case.batch, 1), int)
    first[0] = min(case.padding, case.start)
    places = np.where((slot >= first) & (slot <= case.start), slot - first, -1)
    parts = case.parts or parts_of(chips.of_target(), case.batch * case.kv, case.slots)
    scores = Scores(case.width**-0.5, case.softcap)
    window = np.iinfo(np.int32).max if case.window is None else case.window

    def run(*arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return attend(*arrays, scores=scores, parts=parts, interpret=interpret)

    at = (jnp.asarray(a, jnp.int32) for a in (places[:, case.start], places, case.start, window))
    y, *written = jax.jit(run)(token, jnp.asarray(rotation), keys, values, *at)
    wanted = [old.at[:, :, case.start].set(new.astype(dtype)) for old, new in ((keys, k), (values, v))]
    right = all(_same(*pair, case.start) for pair in zip(written, wanted))
    exact = _exact(case, np.asarray(q, np.float64), *(np.asarray(a, np.float64) for a in wanted), places)
    found = verdict(np.asarray(y, np.float64), exact, TOLERANCE[case.dtype])
    if not right:
        found |= {"ok": False, "reason": "the new slot's values are wrong, or another slot was written"}
    return {"kernel": "attention", **dataclasses.asdict(case), **found}


def _rotated(a: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    cos, sin = rotation[:, :1], rotation[:, 1:]
    return a * cos + np.roll(a, a.shape[-1] // 2, axis=-1) * sin


def _same(found: jax.Array, wanted: jax.Array, slot: int) -> bool:
    """True if all other slots are equal, and this slot is up to the rounding of its products."""
    own, other = (a[:, :, slot].astype(jnp.float32) for a in (found, wanted))
    near = jnp.allclose(own, other, rtol=0.01, atol=1e-5)
    return bool(near & jnp.array_equal(found.at[:, :, slot].set(0), wanted.at[:, :, slot].set(0)))


def _exact(case: Case, q: np.ndarray, keys: np.ndarray, values: np.ndarray, places: np.ndarray) -> np.ndarray:
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
