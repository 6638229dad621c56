"""Slow, plain float64 NumPy versions of the algorithm, written from its formulas, not from our code."""

import numpy as np


def hessian(x: np.ndarray) -> np.ndarray:
    """Computes ``(2 / T) X^T X``."""
    return 2.0 / len(x) * x.T @ x


def damped(h: np.ndarray, damping: float) -> np.ndarray:
    """Adds ``damping`` times the mean diagonal of live inputs to theirs; sets that of dead inputs to 1."""
    h = h.copy()
    live = [j for j in range(len(h)) if h[j, j] != 0]
    mean = np.mean([h[j, j] for j in live])
    for j in range(len(h)):
        h[j, j] = h[j, j] + damping * mean if j in live else 1.0
    return h


def inverse_cholesky(h: np.ndarray) -> np.ndarray:
    """Upper triangular ``U`` with ``U^T U = H^-1``, computed from the inverse."""
    return np.linalg.cholesky(np.linalg.inv(h)).T


def salience(w: np.ndarray, u: np.ndarray, group_size: int) -> np.ndarray:
    """Sum of ``w_ij^2 / u_j^2`` over each group; ``w`` is ``[K, N]``."""
    element = w**2 / np.diag(u)[:, None] ** 2
    return np.array([element[i : i + group_size].sum() for i in range(0, len(w), group_size)])


def log_softmax(y: np.ndarray) -> np.ndarray:
    y = y - y.max(axis=1, keepdims=True)
    return y - np.log(np.exp(y).sum(axis=1, keepdims=True))


def divergence(y: np.ndarray, y_hat: np.ndarray) -> float:
    """``KL(softmax(y) || softmax(y_hat))``, averaged over tokens."""
    p, q = log_softmax(y), log_softmax(y_hat)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=1)))


def gptq(w: np.ndarray, u: np.ndarray, grids: list, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """GPTQ column by column on the whole matrix, errors propagated at once; returns codes and values.

    ``grids`` has ``(scale [N], zero [N], levels [N])`` for each group.
    """
    w = w.copy()
    codes, values = np.zeros(w.shape), np.zeros(w.shape)
    for j in range(len(w)):
        scale, zero, levels = grids[j // group_size]
        codes[j] = np.clip(np.rint(w[j] / scale + zero), 0, levels)
        values[j] = scale * (codes[j] - zero)
        error = (w[j] - values[j]) / u[j, j]
        for later in range(j + 1, len(w)):
            w[later] -= u[j, later] * error
    return codes, values


def direct_scores(
    x: np.ndarray, w: np.ndarray, by_width: dict, order: np.ndarray, bits: int, group_size: int
) -> list:
    """The paper's bit search: every candidate's weight is built and multiplied from scratch."""
    groups, result = len(order), []
    for p in range((groups - 1) // 2 + 1):
        widths = np.full(groups, bits)
        widths[order[:p]] -= 1
        widths[order[groups - p :]] += 1
        w_hat = np.concatenate(
            [by_width[b][i * group_size : (i + 1) * group_size] for i, b in enumerate(widths)]
        )
        result.append(divergence(x @ w, x @ w_hat))
    return result
