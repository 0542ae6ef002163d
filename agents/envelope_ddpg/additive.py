"""Foretells the scores of policies from few of them: a Gaussian process with a prior for compression.

Source: Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, algorithm 2.1; additive kernels, Duvenaud et al. 2011.

    score(x) = sum_i g_i(x_i) + g(totals) + local(totals) + near(x)                                                (1)

1. Every entry x_i of the sequence adds a part of its own: in proportion to its sensitivity ** 0.75, where measured, else a
   quadratic of its strength.
2. Totals say most: the means of x, x^2 and x^4 over each kind of choice (prune ratios, weight bits ...), and the sums of the
   sensitivities to the powers 0.5, 0.75 and 1. A handful of episodes tell how the score follows from them.
3. What strong compression does says little of mild: `local` varies with the totals as fast as they do.
4. What sums cannot tell stays where it was seen: `near` is alike for sequences that differ by little. Without it, a policy that
   did worse than its parts is tried again and again, each time with another small change.
"""

from __future__ import annotations

import numpy as np

from secateur.envs.core import Sensitivities

SHARED = 3.0
"""Variance of the part of the totals, in units of that of single entries."""

NEAR = 0.5
"""Variance of what is peculiar to a neighborhood, in the same units."""

REACH = 0.15
"""Root mean square difference of entries at which sequences are no longer near: the length scale."""


class AdditiveModel:
    """Eq. (1), fitted once.

    Args:
        entries: of the known sequences, (n, entries) in [0, 1].
        scores: theirs, (n,).
        kinds: of the entries, (entries,) integers.
        ridge: variance of what eq. (1) leaves unexplained, above 0, in units of that of single entries.
        sensitivities: of the entries, if they are known.
    """

    def __init__(
        self, entries: np.ndarray, scores: np.ndarray, kinds: np.ndarray, ridge: float, sensitivities: Sensitivities | None
    ):
        self._kinds, self._sensitivities = kinds, sensitivities
        own, totals = self._raw(entries)
        self._own_moments = own.mean(axis=0), own.std() + 1e-9
        self._total_moments = totals.mean(axis=0), totals.std(axis=0) + 1e-6
        self._known = self._features(entries)
        self._mean = scores.mean()
        covariance = _kernel(self._known, self._known) + ridge * np.eye(len(scores))
        self._inverse = np.linalg.inv(covariance)
        self._weights = self._inverse @ (scores - self._mean)
        self._variance = float((scores - self._mean) @ self._weights) / len(scores)  # of single entries, most likely

    def predict(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the expected scores of other sequences, (m,), and their standard deviations, (m,)."""
        wanted = self._features(entries)
        covariance = _kernel(wanted, self._known)
        prior = (wanted[0] ** 2).sum(axis=1) + SHARED * (wanted[1] ** 2).sum(axis=1) + 1 + NEAR
        variance = np.maximum(prior - np.einsum("ij,jk,ik->i", covariance, self._inverse, covariance, optimize=True), 0)
        return covariance @ self._weights + self._mean, np.sqrt(self._variance * variance)

    def _raw(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what entries add by themselves, (n, entries or 2 * entries), and the totals, (n, totals)."""
        by_kind = [entries[:, self._kinds == kind] for kind in np.unique(self._kinds)]
        totals = [(alike**power).mean(axis=1) for alike in by_kind for power in (1, 2, 4)]
        if self._sensitivities is None:
            return np.hstack([entries, entries**2]), np.stack(totals, axis=1)
        alone = self._sensitivities(entries)
        totals += [(alone**power).sum(axis=1) for power in (0.5, 0.75, 1)]
        return alone**0.75, np.stack(totals, axis=1)

    def _features(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        own, totals = self._raw(entries)
        own = (own - self._own_moments[0]) / self._own_moments[1]
        totals = (totals - self._total_moments[0]) / self._total_moments[1]
        place = entries / (REACH * np.sqrt(entries.shape[1]))
        return own / np.sqrt(own.shape[1]), totals / np.sqrt(totals.shape[1]), place


def _kernel(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return the covariances of two sets of features, (len(a), len(b)): the four parts of eq. (1)."""
    (own_a, totals_a, place_a), (own_b, totals_b, place_b) = a, b
    linear = own_a @ own_b.T + SHARED * totals_a @ totals_b.T
    return linear + _bells(totals_a, totals_b) + NEAR * _bells(place_a, place_b)


def _bells(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return exp(-|a - b|^2 / 2), (len(a), len(b))."""
    return np.exp(-((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T) / 2)
