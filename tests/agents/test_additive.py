"""The additive model against the Gaussian process that it is, and on scores whose form is known."""

import numpy as np
import pytest

from secateur.agents.envelope_ddpg.additive import AdditiveModel
from secateur.envs.core import Sensitivities

RNG = np.random.default_rng(0)
KINDS = np.array([0] * 20 + [1] * 20)
SENSITIVITY = RNG.uniform(0.5, 1.5, 40)


def score(entries):
    """Every entry hurts with its square; entries of the second kind are three times as bad."""
    return 2 - (SENSITIVITY * np.where(KINDS, 3, 1) * entries**2).mean(axis=1)


def correlation(model, entries):
    return np.corrcoef(model.predict(entries)[0], score(entries))[0, 1]


def test_foretells_from_fewer_policies_than_entries():
    known, new = RNG.random((2, 30, 40))
    assert correlation(AdditiveModel(known, score(known), KINDS, 0.1, None), new) > 0.8


def test_what_a_kind_does_is_known_before_what_entries_do():
    known, new = RNG.random((12, 40)) * RNG.random((12, 1)), RNG.random((30, 40))
    knows_kinds = correlation(AdditiveModel(known, score(known), KINDS, 0.1, None), new)
    assert knows_kinds > 0.5 and knows_kinds > correlation(AdditiveModel(known, score(known), np.zeros(40, int), 0.1, None), new)


def test_known_scores_come_back_without_a_penalty_and_their_mean_with_a_huge_one():
    known = RNG.random((15, 40))
    np.testing.assert_allclose(AdditiveModel(known, score(known), KINDS, 1e-9, None).predict(known)[0], score(known), atol=1e-5)
    far = AdditiveModel(known, score(known), KINDS, 1e9, None).predict(known)[0]
    np.testing.assert_allclose(far, np.full(15, score(known).mean()), atol=1e-5)


def test_it_is_surest_of_what_it_knows_and_about_as_wrong_as_it_says():
    known, new = RNG.random((2, 60, 40))
    model = AdditiveModel(known, score(known), KINDS, 0.1, None)
    expected, deviation = model.predict(new)
    assert model.predict(known)[1].max() < deviation.min()
    assert 0.3 < np.sqrt(np.mean(((expected - score(new)) / deviation) ** 2)) < 2


def test_sensitivities_tell_entries_apart_that_few_policies_cannot():
    true = 10 ** RNG.uniform(-2, 1, 40)
    curves = Sensitivities(2 * true[:, None] ** 1.2 * np.linspace(0, 1, 65) ** 2.5)  # half right: larger, and bent
    known, new = RNG.random((8, 40)), RNG.random((200, 40))
    scores = [-(true * entries**2).sum(axis=1) for entries in (known, new)]

    def predicted(sensitivities):
        return np.corrcoef(AdditiveModel(known, scores[0], KINDS, 0.1, sensitivities).predict(new)[0], scores[1])[0, 1]

    assert predicted(curves) > 0.9 > 0.6 > predicted(None)


def test_what_sums_cannot_tell_stays_where_it_was_seen():
    known = RNG.random((60, 40))
    odd = known[0] + RNG.normal(size=40) * 0.02
    scores = score(known)
    scores[0] -= 1.0  # much worse than its parts
    model = AdditiveModel(known, scores, KINDS, 0.1, None)
    near, far = model.predict(np.stack([odd, known[1]]))[0] - score(np.stack([odd, known[1]]))
    assert near < -0.4 and abs(far) < 0.2


@pytest.mark.parametrize("count", [1, 2])
def test_alike_policies_do_not_break_it(count):
    known = np.full((count, 4), 0.5)
    model = AdditiveModel(known, np.full(count, 0.7), np.zeros(4, int), 0.3, None)
    np.testing.assert_allclose(model.predict(RNG.random((3, 4)))[0], np.full(3, 0.7))
