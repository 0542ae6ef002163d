"""Foretells the scores of policies from few of them: a Gaussian process with a prior for compression.

Source: Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, algorithm 2.1; additive kernels, Duvenaud et al. 2011.

    score(x) = sum_i g_i(x_i) + g(means) + local(means)                                                            (1)

1. Every entry x_i of the table adds a quadratic g_i of its own.
2. Entries of a kind (prune ratios, weight bits ...) do alike: a part of the score follows from the means of x, x^2 and x^4 over
   each kind, which a handful of episodes tell. The g_i are what single entries do beyond that.
3. What strong compression does says little of mild: `local` varies with the means as fast as they do.
"""

from __future__ import annotations

import numpy as np

SHARED = 3.0
"""Variance of the part that all entries of a kind share, in units of that of the quadratics."""


class AdditiveModel:
    """Eq. (1), fitted once.

    Args:
        entries: of the known tables, (n, entries) in [0, 1].
        scores: theirs, (n,).
        kinds: of the entries, (entries,) integers.
        ridge: variance of what eq. (1) leaves unexplained, above 0, in units of that of the quadratics.
    """

    def __init__(self, entries: np.ndarray, scores: np.ndarray, kinds: np.ndarray, ridge: float):
        self._kinds = kinds
        own, shared = _own(entries), self._shared(entries)
        self._own_moments = own.mean(axis=0), own.std() + 1e-9
        self._shared_moments = shared.mean(axis=0), shared.std(axis=0) + 1e-6
        self._known = self._features(entries)
        self._mean = scores.mean()
        covariance = _kernel(self._known, self._known) + ridge * np.eye(len(scores))
        self._inverse = np.linalg.inv(covariance)
        self._weights = self._inverse @ (scores - self._mean)
        self._variance = float((scores - self._mean) @ self._weights) / len(scores)  # of the quadratics, most likely

    def foretell(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the expected scores of other tables, (m,), and their standard deviations, (m,)."""
        wanted = self._features(entries)
        covariance = _kernel(wanted, self._known)
        prior = (wanted[0] ** 2).sum(axis=1) + SHARED * (wanted[1] ** 2).sum(axis=1) + 1
        variance = np.maximum(prior - np.einsum("ij,jk,ik->i", covariance, self._inverse, covariance, optimize=True), 0)
        return covariance @ self._weights + self._mean, np.sqrt(self._variance * variance)

    def _features(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = (_own(entries) - self._own_moments[0]) / self._own_moments[1]
        shared = (self._shared(entries) - self._shared_moments[0]) / self._shared_moments[1]
        return own / np.sqrt(own.shape[1]), shared / np.sqrt(shared.shape[1])

    def _shared(self, entries: np.ndarray) -> np.ndarray:
        """Return the means of powers of the entries of each kind, (n, 3 * kinds)."""
        by_kind = [entries[:, self._kinds == kind] for kind in np.unique(self._kinds)]
        return np.stack([(alike**power).mean(axis=1) for alike in by_kind for power in (1, 2, 4)], axis=1)


def _own(entries: np.ndarray) -> np.ndarray:
    """Return what each entry adds by itself, (n, 2 * entries)."""
    return np.hstack([entries, entries**2])


def _kernel(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return the covariances of two sets of features, (len(a), len(b)): the three parts of eq. (1)."""
    (own_a, shared_a), (own_b, shared_b) = a, b
    distances = (shared_a**2).sum(axis=1)[:, None] + (shared_b**2).sum(axis=1) - 2 * shared_a @ shared_b.T
    return own_a @ own_b.T + SHARED * shared_a @ shared_b.T + np.exp(-distances / 2)
