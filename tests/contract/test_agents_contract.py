"""What every agent promises, on a toy problem."""

import pickle
from dataclasses import fields, is_dataclass

import numpy as np
import pytest

from secateur.agents import AGENTS, QUERYABLE
from secateur.agents.core import Saving, SequenceActor
from secateur.envs.core import Budget, Episode

SMALL = {
    "envelope_ddpg": {
        "warmup": 10, "candidates": 8, "training_budgets": 3, "updates": 2, "batch": 16, "planned": 6, "hidden": 16, "critics": 2,
        "rounds": 2,
    },
    "amc_ddpg": {"warmup": 10, "hidden": 16, "batch": 16},
}  # fmt: skip
"""Options of agents that otherwise take too long; what they promise is the same."""


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


def test_same_seed_same_run_of_valid_executed_sequences(make, toy):
    def run(seed):
        return toy.run(make(seed), 40)

    first, second = run(3), run(3)
    assert [(episode.budget, episode.policy) for episode in first] == [(episode.budget, episode.policy) for episode in second]
    for episode in first:
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


def test_waits_only_for_episodes_that_are_out(make, toy):
    agent = make()
    for _ in range(4):
        actors = ask_all(agent)
        if not actors:
            assert agent.ask(1) == [], "used up for good"
            return
        agent.tell([(actor, toy.episode(actor)) for actor in actors])


def test_order_of_the_episodes_changes_nothing(make, toy):
    rng = np.random.default_rng(0)
    first, second = make(), make()
    for _ in range(3):
        actors, same = ask_all(first), ask_all(second)
        assert sequences(actors) == sequences(same)
        first.tell([(actor, toy.episode(actor)) for actor in actors])
        for i in rng.permutation(len(same)):
            second.tell([(same[i], toy.episode(same[i]))])
    assert sequences(ask_all(first)) == sequences(ask_all(second))


def test_choices_do_not_depend_on_the_number_of_workers(make, toy):
    """With one budget; with several, another budget may have its turn while one waits."""
    toy.budgets = toy.budgets[:1]

    def run(slots):
        agent, out, asked, rng = make(), [], [], np.random.default_rng(slots)
        while len(asked) < 26:
            more = agent.ask(slots - len(out))
            asked, out = asked + more, out + more
            if not out:
                break
            actor = out.pop(int(rng.integers(len(out))))
            agent.tell([(actor, toy.episode(actor))])
        return sequences(asked[:26])

    assert run(1) == run(5)


def test_pickles_with_episodes_out_and_goes_on_alike(make, toy):
    agent = make()
    toy.run(agent, 17)
    actors = agent.ask(3)
    restored, restored_actors = pickle.loads(pickle.dumps((agent, actors)))
    assert all(isinstance(actor, SequenceActor) for actor in restored_actors)
    agent.tell([(actor, toy.episode(actor)) for actor in actors])
    restored.tell([(actor, toy.episode(actor)) for actor in restored_actors])
    for _ in range(3):
        actors, same = agent.ask(4), restored.ask(4)
        assert sequences(actors) == sequences(same)
        agent.tell([(actor, toy.episode(actor)) for actor in actors])
        restored.tell([(actor, toy.episode(actor)) for actor in same])


def failed(kind, actor, toy):
    if kind == "failed":
        return Episode(actor.budget.name, None, None, failure="RuntimeError: out of memory")
    return toy.episode(actor, top1=np.nan)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_survives_failed_and_nan_episodes(make, toy, share):
    rng = np.random.default_rng(0)
    agent, asked = make(), 0
    while asked < 40 and (actors := agent.ask(4)):
        asked += len(actors)
        kinds = [rng.choice(["failed", "nan"]) if rng.random() < share else None for _ in actors]
        agent.tell([(a, failed(kind, a, toy) if kind else toy.episode(a)) for a, kind in zip(actors, kinds, strict=True)])
    for actor in ask_all(agent):
        assert np.isfinite(actor.sequence).all()


def test_agents_that_can_be_queried_are_stored_after_a_search(toy, tmp_path):
    budget = Budget("new", {"cost": 0.43})
    for name, load in QUERYABLE.items():
        config_class, agent_class = AGENTS[name]
        agent = agent_class(config_class(**SMALL[name]), toy, toy.budgets, np.random.default_rng(0))
        toy.run(agent, 12)
        assert isinstance(agent, Saving)
        agent.save(tmp_path / name)
        loaded = load(tmp_path / name, toy)
        assert loaded.learned == 12 and loaded.preference.tolist() == agent.preference.tolist()
        found = loaded.propose(budget, count=2, rollouts=16)
        assert len(found) == 2 and all(toy.cost(sequence) <= 0.43 for sequence in found)
        assert loaded.predict_quality(np.stack(found)).shape == (2,)
