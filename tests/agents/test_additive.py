"""The additive model against the Gaussian process that it is, and on scores whose form is known."""

import numpy as np
import pytest

from secateur.agents.envelope_ddpg.additive import AdditiveModel
from secateur.envs.core import Sensitivities

KINDS = np.array([0] * 20 + [1] * 20)
SENSITIVITY = np.random.default_rng(0).uniform(0.5, 1.5, 40)


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def score(entries):
    """Every entry hurts with its square; entries of the second kind are three times as bad."""
    return 2 - (SENSITIVITY * np.where(KINDS, 3, 1) * entries**2).mean(axis=1)


def correlation(model, entries):
    return np.corrcoef(model.predict(entries)[0], score(entries))[0, 1]


def test_predicts_from_fewer_policies_than_entries(rng):
    seen, new = rng.random((2, 30, 40))
    assert correlation(AdditiveModel(seen, score(seen), KINDS, 0.1, None), new) > 0.8


def test_knowing_the_kinds_of_choices_halves_what_is_unexplained():
    def mean_unexplained(kinds):
        found = []
        for seed in range(10):
            rng = np.random.default_rng(seed)
            seen, new = rng.random((2, 12, 40)) * rng.random((2, 12, 2))[:, :, KINDS]  # some prune more, others quantize more
            found.append(1 - correlation(AdditiveModel(seen, score(seen), kinds, 0.1, None), new))
        return np.mean(found)

    assert mean_unexplained(KINDS) < 0.5 * mean_unexplained(np.zeros(40, int))


def test_a_tiny_ridge_gives_the_scores_back_and_a_huge_one_their_mean(rng):
    seen = rng.random((15, 40))
    np.testing.assert_allclose(AdditiveModel(seen, score(seen), KINDS, 1e-9, None).predict(seen)[0], score(seen), atol=1e-5)
    far = AdditiveModel(seen, score(seen), KINDS, 1e9, None).predict(seen)[0]
    np.testing.assert_allclose(far, np.full(15, score(seen).mean()), atol=1e-5)


def test_deviations_are_smallest_at_evaluated_policies_and_match_the_errors(rng):
    seen, new = rng.random((2, 60, 40))
    model = AdditiveModel(seen, score(seen), KINDS, 0.1, None)
    expected, deviation = model.predict(new)
    assert model.predict(seen)[1].max() < deviation.min()
    assert 0.3 < np.sqrt(np.mean(((expected - score(new)) / deviation) ** 2)) < 2


def test_sensitivities_distinguish_entries_that_few_policies_cannot(rng):
    true = 10 ** rng.uniform(-2, 1, 40)
    curves = Sensitivities(2 * true[:, None] ** 1.2 * np.linspace(0, 1, 65) ** 2.5)  # half right: larger, and bent
    seen, new = rng.random((8, 40)), rng.random((200, 40))
    scores = [-(true * entries**2).sum(axis=1) for entries in (seen, new)]

    def predicted(sensitivities):
        return np.corrcoef(AdditiveModel(seen, scores[0], KINDS, 0.1, sensitivities).predict(new)[0], scores[1])[0, 1]

    assert predicted(curves) > 0.9 > 0.6 > predicted(None)


def test_what_sums_cannot_explain_stays_local(rng):
    seen = rng.random((60, 40))
    odd = seen[0] + rng.normal(size=40) * 0.02
    scores = score(seen)
    scores[0] -= 1.0  # much worse than its parts
    model = AdditiveModel(seen, scores, KINDS, 0.1, None)
    near, far = model.predict(np.stack([odd, seen[1]]))[0] - score(np.stack([odd, seen[1]]))
    assert near < -0.4 and abs(far) < 0.2


@pytest.mark.parametrize("count", [1, 2])
def test_equal_policies_are_no_error(rng, count):
    seen = np.full((count, 4), 0.5)
    model = AdditiveModel(seen, np.full(count, 0.7), np.zeros(4, int), 0.3, None)
    np.testing.assert_allclose(model.predict(rng.random((3, 4)))[0], np.full(3, 0.7))
