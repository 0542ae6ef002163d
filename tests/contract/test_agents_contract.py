"""What every agent promises, on a toy problem."""

import pickle
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest

from secateur.agents import AGENTS
from secateur.agents.core import SequenceActor
from secateur.envs.core import Episode

SMALL = {
    "envelope_ddpg": {
        "warmup": 12,
        "candidates": 12,
        "goals": 3,
        "updates": 3,
        "batch": 16,
        "planned": 6,
        "hidden": 16,
        "critics": 2,
    }  # fmt: skip
}
"""Options of agents that otherwise think for too long; what they promise is the same."""


@pytest.fixture(params=AGENTS)
def make(request, toy):
    config_class, agent = AGENTS[request.param]
    config = config_class(**SMALL.get(request.param, {}))
    return lambda seed=0: agent(config, toy, toy.budgets, np.random.default_rng(seed))


def sequences(actors):
    return [(actor.budget.name, actor.sequence.tolist()) for actor in actors]


def ask_all(agent, most=40):
    """What an agent hands out at once."""
    actors = []
    while len(actors) < most and (more := agent.ask(1)):
        actors += more
    return actors


def test_configs_are_frozen_dataclasses_with_defaults():
    for config_class, _ in AGENTS.values():
        assert is_dataclass(config_class) and config_class.__dataclass_params__.frozen
        assert hash(config_class()) == hash(config_class())
        assert all(field.name in config_class.__doc__ for field in fields(config_class))


def test_same_seed_same_run(make, toy):
    def run(seed):
        return [(episode.budget, episode.policy) for episode in toy.run(make(seed), 80)]

    assert run(3) == run(3)


def test_actors_are_valid_tables_behind_the_wall(make, toy):
    for episode in toy.run(make(), 80):
        assert episode.actions.shape == toy.used.shape
        assert episode.feasible
    for actor in make().ask(5):
        assert actor.sequence.shape == toy.used.shape
        assert actor.sequence.min() >= 0 and actor.sequence.max() <= 1
        np.testing.assert_array_equal(toy.execute(actor.sequence, actor.budget), actor.sequence)
        np.testing.assert_array_equal(actor.act(np.zeros(1), 2), actor.sequence[2])


def test_asks_at_most_what_is_wanted_and_serves_every_budget(make, toy):
    agent = make()
    assert agent.ask(0) == []
    actors = agent.ask(6)
    assert len(actors) == 6
    assert {actor.budget.name for actor in actors} == {"half", "quarter"}


def test_never_idles_while_nothing_is_out_unless_for_good(make, toy):
    agent = make()
    for _ in range(100):
        actors = agent.ask(3)
        if not actors:
            assert agent.ask(1) == []
            return
        agent.tell([(actor, toy.episode(actor)) for actor in actors])


def test_order_of_the_episodes_changes_nothing(make, toy):
    rng = np.random.default_rng(0)
    first, second = make(), make()
    for _ in range(6):
        actors, same = ask_all(first), ask_all(second)
        assert sequences(actors) == sequences(same)
        first.tell([(actor, toy.episode(actor)) for actor in actors])
        for i in rng.permutation(len(same)):
            second.tell([(same[i], toy.episode(same[i]))])
    assert sequences(ask_all(first)) == sequences(ask_all(second))


def test_pickles_with_episodes_out_and_goes_on_alike(make, toy):
    agent = make()
    toy.run(agent, 25)
    actors = agent.ask(3)
    restored, restored_actors = pickle.loads(pickle.dumps((agent, actors)))
    assert all(isinstance(actor, SequenceActor) for actor in restored_actors)
    agent.tell([(actor, toy.episode(actor)) for actor in actors])
    restored.tell([(actor, toy.episode(actor)) for actor in restored_actors])
    for _ in range(10):
        actors, same = agent.ask(4), restored.ask(4)
        assert sequences(actors) == sequences(same)
        agent.tell([(actor, toy.episode(actor)) for actor in actors])
        restored.tell([(actor, toy.episode(actor)) for actor in same])


def broken(kind, actor, toy):
    if kind == "failed":
        return Episode(actor.budget.name, None, None, failure="RuntimeError: out of memory")
    return toy.episode(actor, top1=np.nan)


@pytest.mark.parametrize("kind", ["failed", "nan"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_survives_failed_and_nan_episodes(make, toy, kind, share):
    rng = np.random.default_rng(0)
    agent, asked = make(), 0
    while asked < 120 and (actors := agent.ask(4)):
        asked += len(actors)
        agent.tell([(a, broken(kind, a, toy) if rng.random() < share else toy.episode(a)) for a in actors])
    finite = [actor.sequence for actor in ask_all(agent)]
    assert all(np.isfinite(sequence).all() for sequence in finite)
    if hasattr(agent, "archive"):
        assert np.isfinite(agent.archive.objectives).all()
        assert bool(len(agent.archive)) == (share < 1)


def test_what_was_stopped_early_is_on_no_archive(make, toy):
    agent = make()
    if not hasattr(agent, "archive"):
        pytest.skip("keeps no archive")
    first, *others = agent.ask(4)
    stopped = toy.episode(first, top1=0.999)
    stopped = replace(stopped, evaluation=replace(stopped.evaluation, stopped=True))
    agent.tell([(first, stopped), *((actor, toy.episode(actor)) for actor in others)])
    assert stopped.policy not in agent.archive.policies
