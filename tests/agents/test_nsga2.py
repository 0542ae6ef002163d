"""NSGA-II: its operators, its selection, and that it optimizes."""

import numpy as np
import pytest

from secateur.agents.nsga2 import Member, Nsga2, Nsga2Config, polynomial_mutation, simulated_binary_crossover, survivors
from secateur.agents.random_search import RandomConfig, RandomSearch
from secateur.envs.core import InputError


def member(first, second, violation=0.0):
    return Member(np.zeros(1), np.array([first, second], float), violation)


def test_survivors_are_ranked_by_violation_then_front_then_crowding():
    ends, middle, crowded = [member(0, 4), member(4, 0)], member(2, 2), member(2.1, 1.95)
    dominated, violating, worse = member(3, 3), member(-1, -1, 0.1), member(-2, -2, 0.2)
    failed = Member(np.zeros(1), np.full(2, np.inf), np.inf)
    everyone = [failed, worse, violating, dominated, crowded, middle, *ends]
    best = survivors(everyone, 8)
    assert set(map(id, best[:2])) == set(map(id, ends))
    assert set(map(id, best[2:4])) == {id(middle), id(crowded)}
    assert best[4:] == [dominated, violating, worse, failed]
    assert survivors(everyone, 3) == best[:3]


def test_crossover_keeps_the_parents_mean_and_their_agreement():
    rng = np.random.default_rng(0)
    first, second = np.full(200_000, 0.4), np.full(200_000, 0.6)
    children = simulated_binary_crossover(first, second, 15.0, rng)
    changed = children[children != 0.4]
    assert len(changed) == pytest.approx(100_000, rel=0.02)
    assert changed.mean() == pytest.approx(0.5, abs=0.002)
    np.testing.assert_allclose(simulated_binary_crossover(first, first, 15.0, rng), 0.4)


def test_mutation_moves_the_expected_share_and_stays_inside():
    genes = np.random.default_rng(1).random(50_000)
    moved = polynomial_mutation(genes, 20.0, 0.1, np.random.default_rng(0))
    assert moved.min() >= 0 and moved.max() <= 1
    assert np.mean(moved != genes) == pytest.approx(0.1, abs=0.01)
    assert np.abs(moved - genes)[moved != genes].mean() < 0.1


def test_finds_better_policies_than_random_search(toy):
    evolved, random = [], []
    for seed in range(4):
        agent = Nsga2(Nsga2Config(), toy, toy.budgets[:1], np.random.default_rng(seed))
        evolved.append(max(episode.evaluation.score for episode in toy.run(agent, 200)))
        baseline = RandomSearch(RandomConfig(), toy, toy.budgets[:1], np.random.default_rng(seed))
        random.append(max(episode.evaluation.score for episode in toy.run(baseline, 200)))
    assert np.mean(evolved) > np.mean(random) + 0.01


def test_one_population_serves_all_budgets_in_turn(toy):
    agent = Nsga2(Nsga2Config(population=6), toy, toy.budgets, np.random.default_rng(0))
    actors = agent.ask(100)
    names = [budget.name for budget in toy.budgets]
    assert len(names) > 1 and [actor.budget.name for actor in actors] == [names[i % len(names)] for i in range(6)]
    assert agent.ask(1) == [], "the generation is out"
    agent.tell([(actor, toy.episode(actor)) for actor in reversed(actors)])
    (population,) = {id(searcher): searcher for searcher in agent.searchers.values()}.values()
    assert len(population.members) == 6 and len(agent.ask(100)) == 6


def test_every_budget_may_have_a_population_of_its_own(toy):
    agent = Nsga2(Nsga2Config(population=4, shared=False), toy, toy.budgets, np.random.default_rng(0))
    actors = agent.ask(100)
    assert len(actors) == 4 * len(toy.budgets)
    own = [actor for actor in actors if actor.budget.name == toy.budgets[0].name]
    agent.tell([(actor, toy.episode(actor)) for actor in own])
    assert {actor.budget.name for actor in agent.ask(100)} == {toy.budgets[0].name}, "the others wait"


def test_an_episode_told_twice_is_refused(toy):
    agent = Nsga2(Nsga2Config(), toy, toy.budgets, np.random.default_rng(0))
    (actor,) = agent.ask(1)
    agent.tell([(actor, toy.episode(actor))])
    with pytest.raises(ValueError, match="not out"):
        agent.tell([(actor, toy.episode(actor))])


@pytest.mark.parametrize("wrong", [{"population": 3}, {"crossover": 1.5}, {"edge": -1}, {"mutation": -1}, {"redraws": -1}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Nsga2Config(**wrong)
