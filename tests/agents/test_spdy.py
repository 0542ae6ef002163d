"""SPDY: the dynamic program is optimal up to its discretization, and CMA-ES moves the coefficients to better scores."""

import pickle

import numpy as np
import pytest
from cmaes import CMA, SepCMA

from secateur.agents.greedy import allocate
from secateur.agents.spdy import Spdy, SpdyConfig, solve_combined, solve_single
from tests.agents.problems import additive_space, harm_of, least_harm, scored, share_budget


def search(space, budget, seed=0, **options):
    agent = Spdy(SpdyConfig(power=1.0, **options), space, [budget], np.random.default_rng(seed))
    return agent, agent.searchers[budget.name]


def test_first_policy_is_optimal_under_one_limit_where_greedy_is_not():
    greedy_misses = 0
    for seed in range(8):
        space = additive_space(seed)
        budget = share_budget(space, cost0=0.55)
        best = least_harm(space, budget)
        agent, _ = search(space, budget, buckets=4000, rounds=1)
        assert harm_of(space, agent.ask(1)[0].sequence) == pytest.approx(best)
        greedy_misses += harm_of(space, allocate(space, space.sensitivities, budget, 1.0)) > best + 1e-6
    assert greedy_misses >= 2


def test_several_limits_are_met_and_nearly_optimal():
    gaps = []
    for seed in range(8):
        space = additive_space(seed, 2)
        budget = share_budget(space, cost0=0.55, cost1=0.5)
        sequence = search(space, budget)[0].ask(1)[0].sequence
        levels = space.policy_space.sequence_to_levels(sequence)
        assert space.projection.slack(levels[None], budget)[0] <= 0
        best = least_harm(space, budget)
        gaps.append(harm_of(space, sequence) / best - 1)
        assert harm_of(space, sequence) <= harm_of(space, allocate(space, space.sensitivities, budget, 1.0)) + 1e-9
    assert np.mean(gaps) < 0.03 and min(gaps) < 1e-6


def brute_force(harms, costs, room):
    levels = np.stack(np.meshgrid(*[np.arange(harms.shape[1])] * len(harms), indexing="ij"), axis=-1).reshape(-1, len(harms))
    entries = np.arange(len(harms))
    fits = (costs[:, entries, levels].sum(axis=2) <= room[:, None] + 1e-9).all(axis=0)
    return harms[entries, levels].sum(axis=1)[fits].min()


def test_dynamic_program_with_savings_and_forbidden_levels():
    rng = np.random.default_rng(0)
    for _ in range(20):
        harms, costs = rng.random((4, 5)), rng.integers(-5, 6, (1, 4, 5)).astype(float)
        harms[rng.integers(4), rng.integers(5)] = np.inf
        room = costs.min(axis=2).sum(axis=1) + 6.0
        if not (harms[np.arange(4), costs[0].argmin(axis=1)] < np.inf).all():
            continue
        found = solve_single(harms, costs[0], float(room[0]), 600)
        assert harms[np.arange(4), found].sum() == pytest.approx(brute_force(harms, costs, room))


def test_limits_that_cannot_be_met_give_the_least_cost():
    harms, costs = np.array([[0.0, 2.0, 1.0], [0.0, 1.0, np.inf]]), np.array([[0.0, -1.0, -1.0], [0.0, -1.0, -9.0]])
    assert solve_single(harms, costs, -5.0, 100).tolist() == [2, 1]
    assert solve_combined(harms, np.stack([costs, -costs]), np.array([-5.0, 0.0]), 100, 5).shape == (2,)
    assert solve_combined(harms, np.empty((0, 2, 3)), np.empty(0), 100, 5).tolist() == [0, 0]


def test_coefficients_protect_choices():
    space = additive_space(0)
    _, searcher = search(space, share_budget(space, cost0=0.55))
    np.testing.assert_array_equal(searcher.solution(np.ones(6)), searcher.first)
    for entry in np.flatnonzero(searcher.first):
        protected = searcher.solution(np.where(np.arange(6) == entry, 1000.0, 1.0))
        assert protected[entry] < searcher.first[entry] or searcher.problem.excess(np.zeros((1, 6), int))[0] > 0


def search_hidden_harm(space, budget, seed):
    """Search where the true harm weighs choices differently than sensitivities do.

    Returns:
        The true harm of the first policy, and the least one of eight generations.
    """
    hidden = np.exp(np.random.default_rng(100 + seed).normal(0, 1.0, 6))
    agent, searcher = search(space, budget, seed)
    found = []
    for _ in range(8):
        actors = agent.ask(searcher._optimizer.population_size)
        levels = [searcher.problem.levels(actor.sequence) for actor in actors]
        harm = [float((hidden * searcher.harms[np.arange(6), at]).sum()) for at in levels]
        found += harm
        agent.tell([(actor, scored(actor, -value)) for actor, value in zip(actors, harm, strict=True)])
    return found[0], min(found)


def test_finds_coefficients_that_the_scores_prefer():
    better = 0
    for seed in range(5):
        space = additive_space(seed)
        first, best = search_hidden_harm(space, share_budget(space, cost0=0.55), seed)
        better += best < first - 1e-9
    assert better >= 3


def test_the_covariance_is_diagonal_for_many_choices(toy):
    assert isinstance(search(toy, toy.budgets[0])[1]._optimizer, CMA)
    assert isinstance(search(toy, toy.budgets[0], separable_from=11)[1]._optimizer, SepCMA)


def test_draws_are_alike_after_pickling_between_generations(toy):
    agent, _ = search(toy, toy.budgets[0], population=6)
    actors = agent.ask(6)
    assert len(actors) == 6 and agent.ask(1) == []
    agent.tell([(actor, toy.episode(actor)) for actor in actors])
    restored = pickle.loads(pickle.dumps(agent))
    for one, other in zip(agent.ask(6), restored.ask(6), strict=True):
        np.testing.assert_array_equal(one.sequence, other.sequence)
