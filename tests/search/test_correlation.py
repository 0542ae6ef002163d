"""Spearman's rank correlation and its confidence interval."""

import numpy as np
import pytest

from secateur.search.correlation import spearman, spearman_interval


def test_only_ranks_count():
    values = [0.3, 0.1, 0.2, 0.9, 0.5]
    assert spearman(values, np.exp(values)) == pytest.approx(1)
    assert spearman(values, [-v for v in values]) == pytest.approx(-1)
    # Textbook formula 1 - 6 sum d^2 / (n (n^2 - 1)) without ties; ranks 3 1 2 5 4 against 1 2 3 4 5.
    assert spearman(values, [1, 2, 3, 4, 5]) == pytest.approx(1 - 6 * (4 + 1 + 1 + 1 + 1) / (5 * 24))
    # Tied values share their mean rank: 1.5 1.5 3 against 1 2 3.
    assert spearman([7, 7, 8], [1, 2, 3]) == pytest.approx(1.5 / np.sqrt(1.5 * 2))


def test_a_constant_side_has_no_correlation():
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3])) and np.isnan(spearman([1, 2, 3], [1, 1, 1]))


def test_the_interval_follows_the_formula():
    low, high = spearman_interval(0.8, 30)
    assert (low, high) == pytest.approx((0.582, 0.911), abs=1e-3)  # tanh(artanh 0.8 -+ 1.96 sqrt(1.32 / 27))
    assert spearman_interval(1.0, 30) == pytest.approx((1, 1), abs=1e-4)


def test_the_interval_holds_the_true_correlation_in_95_of_100_samples():
    rng, true, inside = np.random.default_rng(0), 0.8, 0
    pearson = 2 * np.sin(np.pi * true / 6)  # of normal pairs whose rank correlation is `true`
    for pairs in rng.multivariate_normal([0, 0], [[1, pearson], [pearson, 1]], size=(500, 30)):
        low, high = spearman_interval(spearman(*pairs.T), 30)
        inside += low <= true <= high
    assert 0.91 < inside / 500 < 0.985
