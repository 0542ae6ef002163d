"""Spearman's rank correlation and its confidence interval."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import spearmanr


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Return Spearman's rank correlation of two sequences, (n,); tied values share their mean rank.

    NaN if one sequence is constant.
    """
    pair = np.asarray(first, float), np.asarray(second, float)
    if any(np.ptp(values) == 0 for values in pair):
        return float("nan")  # scipy would warn
    return float(spearmanr(*pair).statistic)


def spearman_interval(correlation: float, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a rank correlation over `count` > 3 independent pairs.

    Fisher's interval on the scale of z = artanh r, with the standard error sqrt((1 + r^2 / 2) / (n - 3)).

    Source: Bonett and Wright 2000, Psychometrika 65, 23-28.
    """
    bounded = np.clip(correlation, -1 + 1e-12, 1 - 1e-12)
    half = 1.96 * np.sqrt((1 + bounded**2 / 2) / (count - 3))
    low, high = np.tanh(np.arctanh(bounded) + np.array([-half, half]))
    return float(low), float(high)
