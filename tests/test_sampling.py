"""Sampling of tokens, compared with NumPy that applies the definitions one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slim_jax.infer.sampling import Sampling, filter_logits, penalized, sample

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (5, 41)).astype(np.float32)


def kept(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """True for each token that may be drawn, ``bool[B, vocab]``, computed token by token."""
    found = np.zeros(logits.shape, bool)
    for row, values in enumerate(logits.astype(np.float64)):
        order = np.argsort(-values)[: top_k or None]
        p = np.exp(values[order] - values.max())
        p /= p.sum()
        total = 0.0
        for token, probability in zip(order, p):
            if total >= top_p or probability < min_p * p[0]:
                break
            found[row, token] = True
            total += probability
    return found


@pytest.mark.parametrize("top_k", [0, 1, 4, 41])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.9])
def test_likely(top_k, top_p, min_p):
    found = np.asarray(
        filter_logits(jnp.asarray(LOGITS), jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p))
    )
    expected = kept(LOGITS, top_k, top_p, min_p)
    assert (np.isfinite(found) == expected).all()
    assert (found[expected] == LOGITS[expected]).all()


def test_likely_keeps_the_fewest_tokens_that_reach_top_p():
    logits = jnp.log(jnp.asarray([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]))
    found = np.isfinite(np.asarray(filter_logits(logits, jnp.int32(0), jnp.float32(0.7), jnp.float32(0))))
    assert found.tolist() == [[False, True, False, True], [True, False, False, False]]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_penalized(penalty):
    seen = RNG.random(LOGITS.shape) < 0.3
    expected = LOGITS.copy()
    for at in zip(*np.nonzero(seen)):
        expected[at] = LOGITS[at] / penalty if LOGITS[at] > 0 else LOGITS[at] * penalty
    found = np.asarray(penalized(jnp.asarray(LOGITS), jnp.asarray(seen), jnp.float32(penalty)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_sampling_follows_the_distribution():
    logits = jnp.log(jnp.tile(jnp.asarray([[0.1, 0.2, 0.7]]), (4000, 1)))
    drawn = np.asarray(sample(logits, jax.random.key(0)))
    assert np.bincount(drawn) / 4000 == pytest.approx([0.1, 0.2, 0.7], abs=0.03)


def test_what_a_row_has_seen():
    choice = Sampling(repetition_penalty=1.2).start(0, 2, 6)
    choice = choice.reads(jnp.asarray([[0, 3], [2, 2]]), jnp.asarray([[-1, 0], [0, 1]]))
    choice = choice.reads(jnp.asarray([[5], [0]]), jnp.asarray([[1], [2]]))
    assert [np.flatnonzero(row).tolist() for row in np.asarray(choice.seen)] == [[3, 5], [0, 2]]
    assert Sampling(temperature=1.0).start(0, 2, 6).seen is None


def test_next():
    logits, step = jnp.asarray(LOGITS), jnp.int32(3)
    greedy = Sampling(repetition_penalty=2.0).start(0, *LOGITS.shape)
    best = LOGITS.argmax(axis=1)
    assert greedy.next(logits, step).tolist() == best.tolist()
    seen = greedy.reads(jnp.asarray(best[:, None], jnp.int32), jnp.zeros((5, 1), jnp.int32))
    halved = LOGITS.copy()
    halved[np.arange(5), best] /= 2
    assert seen.next(logits, step).tolist() == halved.argmax(axis=1).tolist()
    drawn = {
        tuple(Sampling(temperature=9.0, top_k=3).start(seed, *LOGITS.shape).next(logits, step).tolist())
        for seed in range(20)
    }
    assert len(drawn) > 10
    allowed = kept(LOGITS, 3, 1.0, 0.0)
    assert all(allowed[row, token] for tokens in drawn for row, token in enumerate(tokens))
