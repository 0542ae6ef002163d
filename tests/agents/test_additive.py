"""The additive model against the Gaussian process that it is, and on scores whose form is known."""

import numpy as np
import pytest

from agents.envelope_ddpg.additive import AdditiveModel

RNG = np.random.default_rng(0)
KINDS = np.array([0] * 20 + [1] * 20)
SENSITIVITY = RNG.uniform(0.5, 1.5, 40)


def score(entries):
    """Every entry hurts with its square; entries of the second kind are three times as bad."""
    return 2 - (SENSITIVITY * np.where(KINDS, 3, 1) * entries**2).mean(axis=1)


def correlation(model, entries):
    return np.corrcoef(model.foretell(entries)[0], score(entries))[0, 1]


def test_foretells_from_fewer_policies_than_entries():
    known, new = RNG.random((2, 30, 40))
    assert correlation(AdditiveModel(known, score(known), KINDS, 0.1), new) > 0.8


def test_what_a_kind_does_is_known_before_what_entries_do():
    known, new = RNG.random((12, 40)) * RNG.random((12, 1)), RNG.random((30, 40))
    knows_kinds = correlation(AdditiveModel(known, score(known), KINDS, 0.1), new)
    assert knows_kinds > 0.5 and knows_kinds > correlation(AdditiveModel(known, score(known), np.zeros(40, int), 0.1), new)


def test_known_scores_come_back_without_a_penalty_and_their_mean_with_a_huge_one():
    known = RNG.random((15, 40))
    np.testing.assert_allclose(AdditiveModel(known, score(known), KINDS, 1e-9).foretell(known)[0], score(known), atol=1e-5)
    far = AdditiveModel(known, score(known), KINDS, 1e9).foretell(known)[0]
    np.testing.assert_allclose(far, np.full(15, score(known).mean()), atol=1e-5)


def test_it_is_surest_of_what_it_knows_and_about_as_wrong_as_it_says():
    known, new = RNG.random((2, 60, 40))
    model = AdditiveModel(known, score(known), KINDS, 0.1)
    expected, deviation = model.foretell(new)
    assert model.foretell(known)[1].max() < deviation.min()
    assert 0.3 < np.sqrt(np.mean(((expected - score(new)) / deviation) ** 2)) < 2


@pytest.mark.parametrize("count", [1, 2])
def test_alike_policies_do_not_break_it(count):
    known = np.full((count, 4), 0.5)
    model = AdditiveModel(known, np.full(count, 0.7), np.zeros(4, int), 0.3)
    np.testing.assert_allclose(model.foretell(RNG.random((3, 4)))[0], np.full(3, 0.7))
