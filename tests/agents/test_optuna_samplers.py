"""Optuna's samplers: deterministic, alike after pickling, and they use what they are told."""

import pickle

import numpy as np
import pytest

from secateur.agents.optuna_samplers import OptunaConfig, OptunaSamplers
from secateur.agents.random_search import RandomConfig, RandomSearch
from secateur.envs.core import InputError

SAMPLERS = ("tpe", "gp", "cmaes", "nsgaiii")


def agent(toy, seed=0, budgets=None, **options):
    return OptunaSamplers(OptunaConfig(**options), toy, budgets or toy.budgets[:1], np.random.default_rng(seed))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_deterministic_and_alike_after_pickling(toy, sampler):
    options = {"sampler": sampler, "startup": 2, "population": 4, "batch": 2}
    count = 4 if sampler == "gp" else 12  # its model takes seconds
    first, second = agent(toy, **options), agent(toy, **options)
    policies = [[episode.policy for episode in toy.run(one, count)] for one in (first, second)]
    assert policies[0] == policies[1] and len(set(policies[0])) > count // 2
    restored = pickle.loads(pickle.dumps(first))
    assert [e.policy for e in toy.run(restored, 2)] == [e.policy for e in toy.run(second, 2)]
    assert [e.policy for e in toy.run(agent(toy, 1, **options), 2)] != policies[0][:2]


def test_a_batch_is_out_before_any_of_it_is_told(toy):
    one = agent(toy, batch=3)
    actors = one.ask(10)
    assert len(actors) == 3 and one.ask(1) == []
    one.tell([(actors[0], toy.episode(actors[0]))])
    assert one.ask(1) == []
    one.tell([(actor, toy.episode(actor)) for actor in actors[1:]])
    assert len(one.ask(10)) == 3


def test_scores_and_failures_reach_the_study(toy):
    one = agent(toy, sampler="nsgaiii", batch=2)
    actors = one.ask(2)
    good = toy.episode(actors[0])
    one.tell([(actors[0], good), (actors[1], toy.episode(actors[1], top1=np.nan))])
    trials = one.searchers[toy.budgets[0].name]._study.trials
    assert trials[0].values == pytest.approx(good.reward.tolist())
    assert trials[1].state.name == "FAIL"


def test_tpe_finds_better_policies_than_random_search(toy):
    found, random = [], []
    for seed in range(3):
        found.append(max(e.evaluation.score for e in toy.run(agent(toy, seed), 80)))
        baseline = RandomSearch(RandomConfig(), toy, toy.budgets[:1], np.random.default_rng(seed))
        random.append(max(e.evaluation.score for e in toy.run(baseline, 80)))
    assert np.mean(found) > np.mean(random)


def test_unknown_samplers_are_refused():
    with pytest.raises(InputError, match="`sampler` of the agent `optuna` must be"):
        OptunaConfig(sampler="grid")
