"""The one-stage envelope DDPG agent: its operator, its memory, and fronts that are known."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from secateur.agents.envelope_ddpg import EnvelopeDdpgConfig
from secateur.agents.envelope_ddpg.agent import EnvelopeDdpg
from secateur.agents.envelope_ddpg.networks import Mlp, follow
from secateur.agents.envelope_ddpg.replay import sample_preferences, tighter_budgets
from secateur.agents.envelope_ddpg.targets import envelope_target, pessimistic
from secateur.agents.pareto import hypervolume
from secateur.agents.uniform import uniform_family
from secateur.envs.core import Budget, Evaluation, InputError

INGREDIENTS = {"envelope": True, "relabel_preferences": True, "relabel_budgets": True}
"""Of the method; off by default."""
SMALL = EnvelopeDdpgConfig(
    warmup=12, candidates=16, training_budgets=4, updates=4, batch=16, planned=8, hidden=16, critics=2, lookahead=4, **INGREDIENTS
)


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def agent_of(toy, seed=0, config=SMALL, budgets=None):
    return EnvelopeDdpg(config, toy, budgets or toy.budgets, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def shared():
    """What is trained once for several tests."""
    return {}


@pytest.fixture
def trained(toy, shared):
    """An agent of its own for each test, after the same 30 evaluations."""
    if "trained" not in shared:
        agent = agent_of(toy)
        toy.run(agent, 30)
        shared["trained"] = pickle.dumps(agent)
    return pickle.loads(shared["trained"])


# ------------------------------------------------------------------------------------------------------------ the operator


def test_envelope_target_equals_a_slow_double_loop():
    rng = np.random.default_rng(0)
    critics, n, k, objectives, mixing = 3, 7, 5, 4, 0.3
    top1, costs = rng.random((critics, n, k)), rng.random((n, k, objectives - 1))
    preferences = sample_preferences(rng, n, objectives)
    wanted = np.empty((n, objectives))
    for i in range(n):
        best, best_utility, plain = None, -np.inf, None
        for j in range(k):
            lowest, vector = np.inf, None
            for critic in range(critics):  # the whole vector of the critic with the smaller scalarized value
                candidate = np.array([top1[critic, i, j], *(-costs[i, j])])
                if preferences[i] @ candidate < lowest:
                    lowest, vector = preferences[i] @ candidate, candidate
            if j == 0:
                plain = vector
            if lowest > best_utility:
                best, best_utility = vector, lowest
        wanted[i] = mixing * best + (1 - mixing) * plain
    vectors = pessimistic(top1, costs, np.repeat(preferences[:, None], k, axis=1))
    np.testing.assert_allclose(envelope_target(vectors, preferences, mixing), wanted)


# ------------------------------------------------------------------------------------------------------------------ parts


def test_members_of_an_ensemble_are_independent_perceptrons():
    rng = np.random.default_rng(0)
    net, inputs = Mlp(3, 5, 2, 8, rng), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    out = net(inputs)
    assert out.shape == (3, 4, 2)
    with torch.no_grad():
        net.weights[0][1] += 1
    changed = (net(inputs) != out).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


def test_targets_follow_slowly():
    rng = np.random.default_rng(0)
    online, target = Mlp(1, 2, 1, 4, rng), Mlp(1, 2, 1, 4, rng)
    before, goal = target.weights[0].detach().clone(), online.weights[0].detach()
    follow(target, online, 0.25)
    torch.testing.assert_close(target.weights[0].detach(), before + 0.25 * (goal - before))


def test_tighter_budgets_can_be_met(toy):
    for budget in tighter_budgets(toy, toy.budgets, 20, np.random.default_rng(0)):
        named = next(named for named in toy.budgets if named.name == budget.name)
        assert 0 < budget.limits["cost"] <= named.limits["cost"]
        assert toy.cost(toy.execute(np.zeros(toy.used.shape), budget)) <= budget.limits["cost"] + 1e-9


def test_episodes_are_practiced_only_under_budgets_that_execute_them_alike(toy):
    agent = agent_of(toy, budgets=toy.budgets[:1], config=replace(SMALL, training_budgets=12))
    toy.run(agent, 14)
    agent.finish()
    practiced = [len(memory.budgets) for memory in agent.learner.memories]
    assert max(practiced) > 3 and min(practiced) < 13
    for memory in agent.learner.memories:
        for i, budget in enumerate(agent.training_budgets):
            alike = np.array_equal(toy.execute(memory.sequence, budget), memory.sequence)
            assert (i in memory.budgets) == (alike and -memory.reward[1] <= budget.limits["cost"])
        sequence = memory.sequence[None]
        shown = toy.simulate(lambda *at, sequence=sequence: sequence[:, at[2]], [toy.budgets[0]])
        np.testing.assert_array_equal(memory.observations, shown.observations[0])


# ------------------------------------------------------------------------------------------------------------- the agent


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup": 0}, {"candidates": 0}, {"rounds": -1}, {"local": 1.5}, {"unguided": 2}, {"exploration_share": -0.1},
        {"mixing": float("nan")}, {"preference": (0.0, 0.0)}, {"preference": (-1.0, 2.0)}, {"updates": 0}, {"critics": 0},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(wrong):
    with pytest.raises(InputError, match=f"`{next(iter(wrong))}` of envelope DDPG"):
        EnvelopeDdpgConfig(**wrong)


def test_a_preference_needs_a_weight_for_every_objective(toy):
    with pytest.raises(InputError, match="one weight for each of top1, cost"):
        agent_of(toy, config=replace(SMALL, preference=(1.0, 1.0, 1.0)))


SWITCHES = [
    {"envelope": False}, {"relabel_preferences": False}, {"relabel_budgets": False}, {"candidates": 1}, {"rounds": 0},
    {"preference": (0.5, 0.5)}, {"exploration_share": 1.0}, {"local": 1.0}, {"local": 0.0}, {"unguided": 0.0},
    {"additive": False}, {"sensitivity": False},
]  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_switch_runs_and_matters(toy, shared, switch):
    def run(config):
        agent = agent_of(toy, 1, config)
        policies = [episode.policy for episode in toy.run(agent, 22, slots=2)]
        return policies, agent.predict_quality(np.stack([toy.best, 1 - toy.best])).tolist()

    if "all" not in shared:
        shared["all"] = run(SMALL)
    changed = run(replace(SMALL, **switch))
    assert len(changed[0]) == 22
    assert changed != shared["all"]


def test_uniform_policies_are_among_the_candidates(toy, trained):
    budget = toy.budgets[0]
    wanted = {toy.decode(toy.scale_to_budget(sequence, budget)) for sequence in uniform_family(toy, 7)}
    found = trained.candidates.make(np.tile(trained.preference, (64, 1)), [budget] * 64, noise=0.0, changed=0)
    assert wanted <= {toy.decode(sequence) for sequence in found}


def test_predictions_are_in_top1(toy, trained):
    memories = trained.learner.memories
    seen = np.array([memory.reward[0] for memory in memories])
    predicted = trained.predict_quality(np.stack([memory.sequence for memory in memories]))
    assert np.abs(predicted - seen).mean() < 0.6 * np.abs(seen - seen.mean()).mean()


def test_scores_of_0_and_100_percent_can_be_learned(toy):
    agent = agent_of(toy)
    for number in range(8):
        actors = agent.ask(2)
        agent.tell([(actor, toy.episode(actor, top1=float(number % 2))) for actor in actors])
    agent.finish()
    predicted = agent.predict_quality(np.stack([memory.sequence for memory in agent.learner.memories]))
    seen = np.array([memory.reward[0] for memory in agent.learner.memories])
    assert set(seen) == {0, 1} and ((predicted > -0.02) & (predicted < 1.02)).all()
    assert predicted[seen == 1].mean() > predicted[seen == 0].mean()


def test_executed_actions_are_stored_even_when_others_were_asked_for(toy):
    agent = agent_of(toy, budgets=toy.budgets[:1])
    for actor in agent.ask(4):
        agent.tell([(actor, replace(toy.episode(actor), actions=np.where(toy.used, 1.0, 0.0)))])
    agent.finish()
    assert len(agent.learner.memories) == 4
    for memory in agent.learner.memories:
        np.testing.assert_array_equal(memory.sequence, np.where(toy.used, 1.0, 0.0))


def test_an_episode_that_violates_top1_drop_is_learned_from_and_not_on_the_front(toy):
    budget = replace(toy.budgets[0], metric_drop=0.001)
    agent = agent_of(toy, budgets=[budget])
    agent.tell([(actor, toy.episode(actor, top1=0.5)) for actor in agent.ask(4)])
    agent.finish()
    assert len(agent.learner.memories) == 4 and not len(agent.archive)


def test_early_stopped_scores_are_not_learned(toy):
    agent = agent_of(toy)
    first, *others = agent.ask(4)
    episode = toy.episode(first, top1=0.999)
    stopped = Evaluation(episode.evaluation.score, episode.evaluation.costs, stopped=True)
    agent.tell([(first, replace(episode, evaluation=stopped)), *((actor, toy.episode(actor)) for actor in others)])
    agent.finish()
    assert len(agent.learner.memories) == 3 and len(agent.archive)
    assert episode.policy not in agent.archive.policies


def test_failed_scores_are_not_on_the_front(toy):
    agent = agent_of(toy)
    agent.tell([(actor, toy.episode(actor, top1=np.nan)) for actor in agent.ask(4)])
    agent.finish()
    assert agent.learned == 4 and not agent.learner.memories and not len(agent.archive)


def test_torchs_own_generator_is_left_alone(toy):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    toy.run(agent_of(toy), 16)
    torch.testing.assert_close(torch.rand(3), wanted)


# --------------------------------------------------------------------------------------------------- queries and storage


def test_proposals_keep_any_budget(toy, trained):
    budget = Budget("new", {"cost": 0.43})
    for preference in (None, np.array([0.4, 0.6])):
        found = trained.propose(budget, preference, 3, 32)
        assert len(found) == 3 and len({toy.decode(sequence) for sequence in found}) == 3
        for sequence in found:
            assert toy.cost(sequence) <= 0.43
            np.testing.assert_array_equal(toy.execute(sequence, budget), sequence)


def test_rounds_find_sequences_with_better_predictions(toy, trained):
    preferences, budgets = np.tile(trained.preference, (16, 1)), [toy.budgets[0]] * 16
    first = trained.candidates.make(preferences, budgets, 0.5, 0)
    sequences, values, origin = trained.candidates.refine(first, preferences, budgets, trained.predict_quality, rounds=4)
    assert len(sequences) == len(values) == len(origin) == 16 + 4 * 8
    assert values.max() > values[:16].max() and origin.max() < 16
    assert max(toy.cost(sequence) for sequence in sequences) <= toy.budgets[0].limits["cost"]


def test_a_new_agent_proposes_what_the_rules_know(toy):
    budget = Budget("new", {"cost": 0.43})
    found = agent_of(toy).propose(budget, count=2, rollouts=8)
    assert len(found) == 2 and all(toy.cost(sequence) <= 0.43 for sequence in found)


def test_a_saved_agent_proposes_alike_and_searches_on(toy, trained, tmp_path, monkeypatch):
    waiting = trained.ask(2)
    trained.tell([(waiting[0], toy.episode(waiting[0]))])  # the other one is still out
    trained.save(tmp_path / "agent")
    assert trained.learned == 32 and len(trained.learner.memories) == 31
    assert sorted(file.name for file in (tmp_path / "agent").iterdir()) == [
        "agent.json", "networks.safetensors", "replay.npz",
    ]  # fmt: skip
    untouched = type(toy)()
    monkeypatch.setattr(untouched, "sensitivities", None)  # a query should not wait for their measurement
    loaded = EnvelopeDdpg.load(tmp_path / "agent", untouched)
    assert loaded.learned == 32 and set(loaded.archive.policies) == set(trained.archive.policies)
    np.testing.assert_array_equal(loaded.archive.objectives, trained.archive.objectives)
    budget = Budget("new", {"cost": 0.43})
    for one, other in zip(trained.propose(budget), loaded.propose(budget), strict=True):
        np.testing.assert_array_equal(one, other)
    chosen = [toy.decode(memory.sequence) for memory in loaded.learner.memories]
    policies = [episode.policy for episode in toy.run(loaded, 4)]
    assert len(policies) == 4 and not set(policies) & set(chosen)


def test_a_finished_agent_has_learned_from_everything_that_was_told(toy):
    agent = agent_of(toy)
    toy.run(agent, 8)
    missing, *others = agent.ask(3)
    agent.tell([(actor, toy.episode(actor)) for actor in others])
    agent.finish()
    assert len(agent.learner.memories) == 10 and agent.learned == 11
    assert len(toy.run(agent, 3)) == 3


def test_the_preference_can_change_while_it_runs(toy, trained):
    def costs_after(preference):
        agent = pickle.loads(pickle.dumps(trained))
        agent.prefer(preference)
        # The first ones were chosen before.
        return np.mean([toy.cost(episode.actions) for episode in toy.run(agent, 14)[2:]])

    assert costs_after((0.1, 0.9)) < costs_after((1, 0)) - 0.1
    with pytest.raises(InputError, match="one weight for each of"):
        trained.prefer((1.0,))
    with pytest.raises(InputError, match="not all zero"):
        trained.prefer((0.0, 0.0))


def test_damaged_or_foreign_agents_are_refused(toy, trained, tmp_path):
    folder = tmp_path / "agent"
    with pytest.raises(InputError, match=r"holds no agent: it has no agent\.json"):
        EnvelopeDdpg.load(folder, toy)
    trained.save(folder)
    other = type(toy)()
    other.objectives = ("top1", "other")
    with pytest.raises(InputError, match="belongs to another problem"):
        EnvelopeDdpg.load(folder, other)
    state = json.loads((folder / "agent.json").read_text())
    (folder / "agent.json").write_text(json.dumps({**state, "schema": 9}))
    with pytest.raises(InputError, match="schema 9.*search again"):
        EnvelopeDdpg.load(folder, toy)
    (folder / "agent.json").write_text(json.dumps(state))
    (folder / "networks.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        EnvelopeDdpg.load(folder, toy)


# -------------------------------------------------------------------------------------------------------------- known fronts


FRONTS = {"convex": 0.89, "partly_concave": 0.84}
"""Share of the hypervolume that 50 evaluations must find; 100 of random search find 0.89 and 0.82."""
EXPLORER = EnvelopeDdpgConfig(
    warmup=16, candidates=32, training_budgets=48, updates=6, batch=32, planned=8, hidden=32, critics=3, rounds=2,
    exploration_share=1.0,
)  # fmt: skip


def share_of_hypervolume(make, seed, evaluations, **options):
    space = make()
    agent = EnvelopeDdpg(replace(EXPLORER, **options), space, [Budget("any", {"cost": 0.95})], np.random.default_rng(seed))
    episodes = space.run(agent, evaluations, slots=1)
    found = np.array([[-episode.evaluation.score, -episode.reward[1]] for episode in episodes])
    costs, top1 = space.front()
    keep = costs <= 0.95
    reference = np.array([0.0, 1.0])
    return hypervolume(found, reference) / hypervolume(np.column_stack([-top1, costs])[keep], reference)


def test_the_concave_front_is_concave_somewhere(known_fronts):
    for name, concave in (("convex", False), ("partly_concave", True)):
        costs, top1 = known_fronts[name]().front()
        assert bool((np.diff(top1, 2) > 1e-3).any()) == concave, name


@pytest.mark.parametrize("name", FRONTS)
def test_finds_a_known_front(known_fronts, name):
    assert np.mean([share_of_hypervolume(known_fronts[name], seed, 50) for seed in range(2)]) >= FRONTS[name]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, INGREDIENTS], ids=["by default", "with all ingredients"])
@pytest.mark.parametrize("name", FRONTS)
def test_finds_a_known_front_with_every_seed(known_fronts, name, options):
    assert min(share_of_hypervolume(known_fronts[name], seed, 60, **options) for seed in range(6)) >= FRONTS[name]
