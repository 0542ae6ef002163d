"""EvoPress: level switches stay at the edge of the budget, and the parent is never replaced by a worse policy."""

import numpy as np
import pytest

from secateur.agents.evopress import EvoPress, EvoPressConfig
from secateur.agents.greedy import allocate
from secateur.envs.core import Episode
from tests.agents.problems import additive_space, harm_of, least_harm, scored, search_by_harm, share_budget


def lineage(space, budget, seed=0, **options):
    agent = EvoPress(EvoPressConfig(**options), space, [budget], np.random.default_rng(seed))
    return agent, agent.searchers[budget.name]


def test_starts_at_the_greedy_policy(toy):
    actors = EvoPress(EvoPressConfig(), toy, toy.budgets, np.random.default_rng(0)).ask(100)
    assert len(actors) == 5 * len(toy.budgets)
    for budget in toy.budgets:
        first = next(actor for actor in actors if actor.budget == budget)
        np.testing.assert_array_equal(first.sequence, allocate(toy, toy.sensitivities, budget, 0.75))


@pytest.mark.parametrize("limits", [{"cost0": 0.6}, {"cost0": 0.7, "cost1": 0.6}])
def test_mutations_switch_levels_and_use_the_budget_up(limits):
    space = additive_space(3, len(limits))
    _, searcher = lineage(space, share_budget(space, **limits))
    problem = searcher.problem
    up_and_down = 0
    for _ in range(40):
        levels = searcher.mutate(searcher.parent)
        assert problem.excess(levels[None])[0] == 0
        room = [problem.excess(levels[None] - np.eye(6, dtype=int)[i])[0] > 0 for i in np.flatnonzero(levels)]
        change = levels - searcher.parent
        up_and_down += change.max() > 0 > change.min()
        # Only choices that the mutation compressed may have room left.
        assert all(room) or change.max() > 0
    assert up_and_down > 30


def test_choices_that_save_nothing_are_not_compressed():
    space = additive_space(0, free=3)
    _, searcher = lineage(space, share_budget(space, cost0=0.6))
    assert all((searcher.mutate(searcher.parent)[:3] == 0).all() for _ in range(50))


def told(searcher, scores):
    """One generation with these scores; its levels."""
    actors = [searcher.next() for _ in range(5)]
    for actor, score in zip(actors, scores, strict=True):
        failed = Episode("it", None, None, failure="RuntimeError: out of memory")
        searcher.learn(actor, failed if score is None else scored(actor, score))
    return [searcher.problem.levels(actor.sequence).tolist() for actor in actors]


def test_the_parent_is_replaced_by_members_that_are_not_worse():
    space = additive_space(1)
    _, searcher = lineage(space, share_budget(space, cost0=0.6))
    greedy = searcher.parent.tolist()
    assert told(searcher, [None] * 5)[0] == greedy
    assert searcher.parent.tolist() == greedy, "nothing is known of any member"
    second = told(searcher, [0.1, 0.5, np.nan, 0.4, None])
    assert searcher.parent.tolist() == second[1]
    told(searcher, [0.49] * 5)
    assert searcher.parent.tolist() == second[1]
    equal = told(searcher, [0.4, 0.4, 0.4, 0.5, 0.4])
    assert searcher.parent.tolist() == equal[3]


def test_no_policy_is_evaluated_twice_while_there_are_new_ones(toy):
    agent, _ = lineage(toy, toy.budgets[0])
    policies = [episode.policy for episode in toy.run(agent, 100)]
    assert len(set(policies)) == 100


def test_prescreened_mutations_have_less_predicted_harm():
    space = additive_space(5)
    budget = share_budget(space, cost0=0.5)

    def mean_harm(candidates):
        agents = [lineage(space, budget, seed, candidates=candidates)[0] for seed in range(4)]
        return np.mean([harm_of(space, actor.sequence) for agent in agents for actor in agent.ask(5)[1:]])

    assert mean_harm(8) < mean_harm(1)


def test_improves_on_the_greedy_policy():
    better = 0
    for seed in (1, 4, 5, 7, 11):
        space = additive_space(seed, 2)
        budget = share_budget(space, cost0=0.55, cost1=0.5)
        greedy, best = harm_of(space, allocate(space, space.sensitivities, budget, 1.0)), least_harm(space, budget)
        assert greedy > best + 0.01
        better += search_by_harm(space, lineage(space, budget, seed, power=1.0)[0], 50) < greedy - 0.5 * (greedy - best)
    assert better >= 4
