"""Random search and uniform compression."""

import numpy as np
import pytest

from secateur.agents import AGENTS
from secateur.agents.random_search import random_sequence
from secateur.agents.uniform import uniform_family
from secateur.envs.core import Budget, InputError


def make(name, toy, budgets=None, seed=0, **options):
    config_class, agent = AGENTS[name]
    return agent(config_class(**options), toy, budgets or toy.budgets, np.random.default_rng(seed))


def test_random_search_stays_at_the_edge_of_the_budget(toy):
    step = 0.25 / 11  # what one level of one entry costs
    for episode in toy.run(make("random", toy), 100):
        limit = next(b for b in toy.budgets if b.name == episode.budget).limits["cost"]
        # Scaling changes all entries at once, so several of them may round up together.
        assert limit - 6 * step <= episode.evaluation.costs["cost"] <= limit


def test_random_search_covers_every_level_and_repeats_no_policy(toy):
    episodes = toy.run(make("random", toy, toy.budgets[:1]), 150)
    actions = np.array([episode.actions for episode in episodes])
    for step, column in np.argwhere(toy.used):
        assert len(np.unique(actions[:, step, column])) == 5
    assert len({episode.policy for episode in episodes}) == 150


def test_random_sequences_vary_the_ratio_between_the_kinds(toy):
    rng = np.random.default_rng(0)
    sequences = np.array([random_sequence(toy, rng) for _ in range(2000)])
    assert sequences.min() >= 0 and sequences.max() <= 1 and not sequences[:, ~toy.used].any()
    by_kind = sequences[:, :5].mean(axis=1)
    assert np.abs(by_kind - 0.5).max() > 0.45  # independent actions would have to agree in five entries
    assert np.std(by_kind[:, 0] - by_kind[:, 1]) > 1.2 * np.sqrt(2 / 12 / 5)


def test_random_search_goes_below_the_edge_of_a_budget_with_a_single_policy_there(toy):
    loose = Budget("loose", {"cost": 1.0})  # its edge is a single policy: no compression
    episodes = toy.run(make("random", toy, [loose]), 20)
    assert len({episode.policy for episode in episodes}) == 20


@pytest.mark.parametrize("name", ["random", "bee_colony"])
def test_budgets_share_the_evaluations_evenly(name, toy):
    episodes = toy.run(make(name, toy), 60)
    assert sum(episode.budget == "half" for episode in episodes) == 30


def test_uniform_is_one_policy_per_budget_when_there_is_one_kind_of_choice(pruning_toy):
    agent = make("uniform", pruning_toy)
    episodes = pruning_toy.run(agent, 100)
    assert [episode.budget for episode in episodes] == ["half", "quarter"]
    assert all(len(np.unique(episode.actions[:, 0])) == 1 for episode in episodes)
    assert agent.ask(5) == []


def test_uniform_starts_even_then_varies_the_ratio_between_the_kinds(toy):
    family = uniform_family(toy, exponents=7)
    assert len(family) == 7**2 - 6**2
    assert len(np.unique(family[0][toy.used])) == 1
    assert all(len(np.unique(sequence[toy.used[:, k], k])) == 1 for sequence in family for k in range(2))
    assert {sequence[0, 0] > sequence[0, 1] for sequence in family[1:]} == {True, False}
    assert len({tuple(sequence[0]) for sequence in family}) == len(family)


def test_uniform_repeats_no_policy(toy):
    episodes = toy.run(make("uniform", toy), 1000)
    keys = [(episode.budget, episode.policy) for episode in episodes]
    assert len(keys) == len(set(keys)) < 26


@pytest.mark.parametrize(("name", "options"), [("random", {"redraws": -1}), ("uniform", {"exponents": 0})])
def test_options_out_of_range(name, options):
    with pytest.raises(InputError, match="must be at least"):
        AGENTS[name][0](**options)
