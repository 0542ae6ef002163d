"""Predicts the scores of policies from few of them: a Gaussian process with a prior for compression.

Source: Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, algorithm 2.1; additive kernels, Duvenaud et al. 2011.

    score(x) = sum_i g_i(x_i) + g(totals) + local(totals) + near(x)                                                (1)

1. Every entry x_i of the sequence adds a part of its own: in proportion to its sensitivity ** 0.75 where it was measured, else
   a quadratic of its action.
2. The totals explain most: the means of x, x^2 and x^4 over each kind of choice (prune ratios, weight bits ...), and the sums of
   the sensitivities to the powers 0.5, 0.75 and 1. A few episodes show how the score follows from them.
3. The effect of strong compression says little about that of mild compression: `local` varies with the totals as fast as they do.
4. `near` is what sums cannot explain: it is similar for sequences that differ little. Without it, a policy that scored worse than
   its parts is tried again and again, each time with another small change.
"""

from __future__ import annotations

import numpy as np

from secateur.envs.core import Sensitivities

SHARED = 3.0
"""Variance of the part of the totals, in units of that of single entries."""

NEAR = 0.5
"""Variance of the part `near`, in the same units."""

LENGTH_SCALE = 0.15
"""Length scale of the part `near`: root mean square difference of the entries."""


class AdditiveModel:
    """Eq. (1), fitted once.

    Args:
        entries: actions of the evaluated sequences, (n, entries) in [0, 1].
        scores: of these sequences, (n,).
        kinds: kind of choice of each entry, (entries,) integers.
        ridge: variance of what eq. (1) leaves unexplained, above 0, in units of that of single entries.
        sensitivities: of the entries; None: not measured.
    """

    def __init__(
        self, entries: np.ndarray, scores: np.ndarray, kinds: np.ndarray, ridge: float, sensitivities: Sensitivities | None
    ):
        self._kinds, self._sensitivities = kinds, sensitivities
        own, totals = self._raw(entries)
        self._own_moments = own.mean(axis=0), own.std() + 1e-9
        self._total_moments = totals.mean(axis=0), totals.std(axis=0) + 1e-6
        self._evaluated = self._features(entries)
        self._mean = scores.mean()
        covariance = _kernel(self._evaluated, self._evaluated) + ridge * np.eye(len(scores))
        self._inverse = np.linalg.inv(covariance)
        self._weights = self._inverse @ (scores - self._mean)
        self._variance = float((scores - self._mean) @ self._weights) / len(scores)  # of single entries: maximum likelihood

    def predict(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the expected scores of other sequences, (m,), and their standard deviations, (m,)."""
        features = self._features(entries)
        covariance = _kernel(features, self._evaluated)
        prior = (features[0] ** 2).sum(axis=1) + SHARED * (features[1] ** 2).sum(axis=1) + 1 + NEAR
        variance = np.maximum(prior - np.einsum("ij,jk,ik->i", covariance, self._inverse, covariance, optimize=True), 0)
        return covariance @ self._weights + self._mean, np.sqrt(self._variance * variance)

    def _raw(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of single entries, (n, entries or 2 * entries), and the totals, (n, totals)."""
        by_kind = [entries[:, self._kinds == kind] for kind in np.unique(self._kinds)]
        totals = [(group**power).mean(axis=1) for group in by_kind for power in (1, 2, 4)]
        if self._sensitivities is None:
            return np.hstack([entries, entries**2]), np.stack(totals, axis=1)
        single = self._sensitivities(entries)
        totals += [(single**power).sum(axis=1) for power in (0.5, 0.75, 1)]
        return single**0.75, np.stack(totals, axis=1)

    def _features(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the scaled features of single entries, of the totals and of the place, each (n, features)."""
        own, totals = self._raw(entries)
        own = (own - self._own_moments[0]) / self._own_moments[1]
        totals = (totals - self._total_moments[0]) / self._total_moments[1]
        place = entries / (LENGTH_SCALE * np.sqrt(entries.shape[1]))
        return own / np.sqrt(own.shape[1]), totals / np.sqrt(totals.shape[1]), place


def _kernel(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return the covariances of two sets of features, (len(a), len(b)): the four parts of eq. (1)."""
    (own_a, totals_a, place_a), (own_b, totals_b, place_b) = a, b
    linear = own_a @ own_b.T + SHARED * totals_a @ totals_b.T
    return linear + _gaussian(totals_a, totals_b) + NEAR * _gaussian(place_a, place_b)


def _gaussian(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return exp(-|a - b|^2 / 2), (len(a), len(b))."""
    return np.exp(-((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T) / 2)
