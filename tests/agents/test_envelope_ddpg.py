"""The one-stage envelope DDPG agent: its operator, its memory, and fronts that are known."""

import json
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from secateur.agents.envelope_ddpg import EnvelopeDdpgConfig
from secateur.agents.envelope_ddpg.agent import EnvelopeDdpg, truncated_normal
from secateur.agents.envelope_ddpg.networks import Mlp, follow
from secateur.agents.envelope_ddpg.replay import sample_preferences, tighter_budgets
from secateur.agents.envelope_ddpg.targets import critic_loss, envelope_target, pessimistic
from secateur.agents.pareto import hypervolume
from secateur.agents.uniform import uniform_family
from secateur.envs.core import Budget, Episode, Evaluation, InputError

INGREDIENTS = {"envelope": True, "relabel_preferences": True, "relabel_budgets": True}
"""Of the method; off by default."""
SMALL = EnvelopeDdpgConfig(
    warmup=12, candidates=16, goals=4, updates=4, batch=16, planned=8, hidden=16, critics=2, lookahead=4, homotopy_episodes=30,
    **INGREDIENTS,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def agent_of(toy, seed=0, config=SMALL, budgets=None):
    return EnvelopeDdpg(config, toy, budgets or toy.budgets, np.random.default_rng(seed))


def sequences(actors):
    return [(actor.budget.name, actor.sequence.tolist()) for actor in actors]


# ------------------------------------------------------------------------------------------------------------ the operator


def test_envelope_target_equals_a_slow_double_loop():
    rng = np.random.default_rng(0)
    critics, n, k, objectives, mixing = 3, 7, 5, 4, 0.3
    top1, costs = rng.random((critics, n, k)), rng.random((n, k, objectives - 1))
    preferences = sample_preferences(rng, n, objectives)
    valid = rng.random((n, k)) < 0.7
    valid[:, 0] = True
    wanted = np.empty((n, objectives))
    for i in range(n):
        best, best_utility, plain = None, -np.inf, None
        for j in range(k):
            lowest, vector = np.inf, None
            for critic in range(critics):  # the whole vector of the critic with the smaller scalarised value
                candidate = np.array([top1[critic, i, j], *(-costs[i, j])])
                if preferences[i] @ candidate < lowest:
                    lowest, vector = preferences[i] @ candidate, candidate
            if j == 0:
                plain = vector
            if valid[i, j] and lowest > best_utility:
                best, best_utility = vector, lowest
        wanted[i] = mixing * best + (1 - mixing) * plain
    vectors = pessimistic(top1, costs, np.repeat(preferences[:, None], k, axis=1))
    np.testing.assert_allclose(envelope_target(vectors, preferences, mixing, valid), wanted)


def test_the_losses_are_those_of_the_whole_vectors():
    rng = np.random.default_rng(0)
    values = torch.tensor(rng.random((2, 5)), requires_grad=True)
    costs, targets = torch.tensor(rng.random((5, 2))), torch.tensor(rng.random((5, 3)))
    preferences = torch.tensor(sample_preferences(rng, 5, 3))
    full = torch.cat([values[..., None], -costs.expand(2, 5, 2)], dim=-1)
    vector_loss = (targets - full).square().sum(-1).mean()
    scalar_loss = ((preferences * (targets - full)).sum(-1) ** 2).mean()
    for weight in (0.0, 0.4, 1.0):
        wanted = torch.autograd.grad((1 - weight) * vector_loss + weight * scalar_loss, values, retain_graph=True)[0]
        found = torch.autograd.grad(critic_loss(values, costs, targets, preferences, weight), values)[0]
        torch.testing.assert_close(found, wanted)


def test_on_top1_alone_both_losses_are_the_same():
    rng = np.random.default_rng(0)
    values, costs, targets = (torch.tensor(rng.random(shape)) for shape in ((2, 5), (5, 2), (5, 3)))
    preferences = torch.eye(3, dtype=float)[0].expand(5, 3)
    torch.testing.assert_close(*(critic_loss(values, costs, targets, preferences, weight) for weight in (0.0, 1.0)))


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


def test_noise_stays_in_the_range_without_piling_up_at_its_ends():
    drawn = truncated_normal(np.full(20_000, 0.1), 0.5, np.random.default_rng(0))
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert np.mean((drawn == 0) | (drawn == 1)) < 0.01


def test_tighter_budgets_can_be_met(toy):
    for budget in tighter_budgets(toy, toy.budgets, 20, np.random.default_rng(0)):
        named = next(named for named in toy.budgets if named.name == budget.name)
        assert 0 < budget.limits["cost"] <= named.limits["cost"]
        assert toy.cost(toy.execute(np.zeros(toy.used.shape), budget)) <= budget.limits["cost"] + 1e-9


def test_episodes_are_practiced_only_under_budgets_that_execute_them_alike(toy):
    agent = agent_of(toy, budgets=toy.budgets[:1], config=replace(SMALL, goals=12))
    toy.run(agent, 30)
    practiced = [len(memory.goals) for memory in agent.learner.memories]
    assert max(practiced) > 3 and min(practiced) < 13
    for memory in agent.learner.memories:
        for i, goal in enumerate(agent.goals):
            alike = np.array_equal(toy.execute(memory.sequence, goal), memory.sequence)
            assert (i in memory.goals) == (alike and -memory.reward[1] <= goal.limits["cost"])
        sequence = memory.sequence[None]
        shown = toy.simulate(lambda *at, sequence=sequence: sequence[:, at[2]], [toy.budgets[0]])
        np.testing.assert_array_equal(memory.observations, shown.observations[0])


# ------------------------------------------------------------------------------------------------------------- the agent


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup": 0}, {"candidates": 0}, {"local": 1.5}, {"blind": 2}, {"elsewhere": -0.1}, {"mixing": float("nan")}, {"tau": 0},
        {"screening": "best"}, {"ahead": "never"}, {"dropout": 1.0}, {"preference": (0.0, 0.0)}, {"preference": (-1.0, 2.0)},
        {"updates": 0}, {"noise_decay": 0}, {"critics": 0}, {"smoothing": -1}, {"ridge": 0},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        EnvelopeDdpgConfig(**wrong)


def test_a_preference_needs_a_weight_for_every_objective(toy):
    with pytest.raises(InputError, match="one weight for each of top1, cost"):
        agent_of(toy, config=replace(SMALL, preference=(1.0, 1.0, 1.0)))


SWITCHES = [
    {"envelope": False}, {"relabel_preferences": False}, {"relabel_budgets": False}, {"homotopy": True}, {"episodic": True},
    {"candidates": 1}, {"rules": 0}, {"edge": False}, {"ahead": "next"}, {"scalar": True}, {"preference": (0.5, 0.5)},
    {"screening": "thompson"}, {"screening": "pessimistic"}, {"screening": "optimistic"}, {"dropout": 0.1}, {"elsewhere": 1.0},
    {"smoothing": 0.0}, {"local": 1.0}, {"local": 0.0}, {"blind": 0.0}, {"additive": False}, {"log_odds": False},
    {"sensitivity": False}, {"rounds": 0}, {"screening": "bound"},
]  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_switch_runs_and_matters(toy, switch):
    def run(config):
        agent = agent_of(toy, 1, config)
        policies = [episode.policy for episode in toy.run(agent, 40, slots=2)]
        shown = np.stack([toy.best, 1 - toy.best])
        return policies, agent.learner.predictions(shown).tolist()

    changed = run(replace(SMALL, **switch))
    assert len(changed[0]) == 40
    assert run(replace(SMALL, **switch)) == changed
    assert changed != run(SMALL)


def test_uniform_policies_are_among_the_candidates(toy):
    agent = agent_of(toy)
    toy.run(agent, 24)
    budget = toy.budgets[0]
    wanted = {toy.decode(toy.scale_to_budget(sequence, budget)) for sequence in uniform_family(toy, 7)}
    # Nothing is drawn around them: an actor without noise and no moves leave them to themselves.
    found = agent._candidates(np.tile(agent.preference, (64, 1)), [budget] * 64, 0.0, moved=0)
    assert wanted <= {toy.decode(sequence) for sequence in found}


@pytest.mark.parametrize("log_odds", [True, False])
def test_opinions_are_in_top1_whatever_is_learned(toy, log_odds):
    agent = agent_of(toy, config=replace(SMALL, log_odds=log_odds))
    toy.run(agent, 60)
    memories = agent.learner.memories
    seen = np.array([memory.reward[0] for memory in memories])
    told = agent.learner.predictions(np.stack([memory.sequence for memory in memories])).mean(axis=0)
    assert np.abs(told - seen).mean() < 0.3 * np.abs(seen - seen.mean()).mean()


def test_log_odds_of_top1_are_finite_and_come_back(toy):
    learner = agent_of(toy).learner
    top1 = np.array([0.0, 1e-4, 0.1, 0.5, 0.93, 1.0])
    scores = learner._score(top1)
    assert np.isfinite(scores).all() and (np.diff(scores) > 0).all()
    np.testing.assert_allclose(learner._top1(scores), top1, atol=1e-12)
    torch.testing.assert_close(learner._top1(torch.from_numpy(scores)), torch.from_numpy(top1))


def test_executed_actions_are_stored_even_when_others_were_asked_for(toy):
    agent = agent_of(toy, budgets=toy.budgets[:1])
    actors = agent.ask(4)
    for actor in actors:
        agent.tell([(actor, replace(toy.episode(actor), actions=np.where(toy.used, 1.0, 0.0)))])
    agent.ask(4)
    assert agent.learner.memories
    for memory in agent.learner.memories:
        np.testing.assert_array_equal(memory.sequence, np.where(toy.used, 1.0, 0.0))


def test_an_episode_that_breaks_top1_drop_is_learned_from_and_wins_nothing(toy):
    budget = replace(toy.budgets[0], top1_drop=0.001)
    agent = agent_of(toy, budgets=[budget])
    for _ in range(6):
        actors = agent.ask(2)
        agent.tell([(actor, toy.episode(actor, top1=0.5)) for actor in actors])
    agent.ask(2)
    assert len(agent.learner.memories) >= 6 and not len(agent.archive)


def test_early_stopped_scores_are_not_learned(toy):
    agent = agent_of(toy)
    for _ in range(8):
        for actor in agent.ask(2):
            episode = toy.episode(actor)
            stopped = Evaluation(episode.evaluation.top1, episode.evaluation.costs, stopped=True)
            agent.tell([(actor, replace(episode, evaluation=stopped))])
    assert not agent.learner.memories


def test_an_episode_told_twice_is_refused(toy):
    agent = agent_of(toy)
    (actor,) = agent.ask(1)
    agent.tell([(actor, toy.episode(actor))])
    with pytest.raises(ValueError, match="not out"):
        agent.tell([(actor, toy.episode(actor))])


@pytest.mark.parametrize("elsewhere", [0.2, 1.0])
def test_choices_do_not_depend_on_how_many_workers_there_are_and_how_fast(toy, elsewhere):
    def run(slots):
        agent, out, asked = agent_of(toy, config=replace(SMALL, elsewhere=elsewhere)), [], []
        rng = np.random.default_rng(slots)
        while len(asked) < 30:
            more = agent.ask(slots - len(out))
            asked += more
            out += more
            actor = out.pop(int(rng.integers(len(out))))
            agent.tell([(actor, toy.episode(actor))])
        return sequences(asked[:30])

    assert run(1) == run(3) == run(4) == run(9), "never more than `lookahead` are out"


def test_torchs_own_generator_is_left_alone(toy):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    toy.run(agent_of(toy), 16)
    torch.testing.assert_close(torch.rand(3), wanted)


def test_a_pickled_agent_goes_on_alike_while_it_learns(toy):
    agent = agent_of(toy)
    toy.run(agent, 24)
    restored = pickle.loads(pickle.dumps(agent))
    assert [e.policy for e in toy.run(agent, 10)] == [e.policy for e in toy.run(restored, 10)]


def test_costs_of_an_endless_stream_of_failures_stay_bounded(toy):
    agent = agent_of(toy)
    for _ in range(20):
        for actor in agent.ask(2):
            agent.tell([(actor, Episode(actor.budget.name, None, None, failure="RuntimeError: no"))])
    assert agent.learned >= 30 and not agent.learner.memories


# --------------------------------------------------------------------------------------------------- questions and storage


@pytest.fixture
def trained(toy):
    agent = agent_of(toy)
    toy.run(agent, 30)
    return agent


def test_proposals_keep_any_budget(toy, trained):
    budget = Budget("new", {"cost": 0.43})
    for preference in (None, np.array([0.4, 0.6])):
        found = trained.propose(budget, preference, 3, 32)
        assert len(found) == 3 and len({toy.decode(sequence) for sequence in found}) == 3
        for sequence in found:
            assert toy.cost(sequence) <= 0.43
            np.testing.assert_array_equal(toy.execute(sequence, budget), sequence)


def test_rounds_find_what_the_critics_like_better(toy, trained):
    preferences, budgets = np.tile(trained.preference, (16, 1)), [toy.budgets[0]] * 16
    first = trained._candidates(preferences, budgets, 0.5, 0)

    def value(sequences):
        return trained._expected(sequences, "mean", 0.0)[:, 0]

    sequences, values, origin = trained._refine(first, preferences, budgets, value)
    assert len(sequences) == len(values) == len(origin) == 16 + trained.config.rounds * 8
    assert values.max() > values[:16].max() and origin.max() < 16
    assert max(toy.cost(sequence) for sequence in sequences) <= toy.budgets[0].limits["cost"]


def test_a_saved_agent_answers_alike(toy, trained, tmp_path, monkeypatch):
    trained.save(tmp_path / "agent")
    monkeypatch.setattr(toy, "sensitivities", None)  # a question should not wait for their measurement
    assert sorted(file.name for file in (tmp_path / "agent").iterdir()) == [
        "agent.json", "networks.safetensors", "replay.npz",
    ]  # fmt: skip
    loaded = EnvelopeDdpg.load(tmp_path / "agent", toy)
    budget = Budget("new", {"cost": 0.43})
    for one, other in zip(trained.propose(budget), loaded.propose(budget), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(toy.run(loaded, 8)) == 8


@pytest.mark.parametrize("told", [5, 21, 40])
def test_a_saved_agent_goes_on_alike_with_what_was_out(toy, tmp_path, told):
    def run(agent, out, count):
        """Answer `count` actors in a random order, up to four out at a time."""
        rng, seen = np.random.default_rng(told), []
        while len(seen) < count:
            out += agent.ask(4 - len(out))
            actor = out.pop(int(rng.integers(len(out))))
            failure = Episode(actor.budget.name, None, None, failure="RuntimeError: no")
            agent.tell([(actor, toy.episode(actor) if actor.ticket % 7 else failure)])
            seen.append((actor.ticket, actor.budget.name, actor.sequence.tolist()))
        return seen

    straight, out = agent_of(toy), []
    run(straight, out, told)
    straight.save(tmp_path / "agent")
    restored = EnvelopeDdpg.load(tmp_path / "agent", toy)
    again = restored.ask(len(out))
    assert sorted(a.ticket for a in again) == sorted(a.ticket for a in out), "evaluations that were out are handed out once more"
    again = [next(a for a in again if a.ticket == actor.ticket) for actor in out]
    assert run(straight, out, 25) == run(restored, again, 25)
    shown = np.stack([toy.best, 1 - toy.best])
    np.testing.assert_array_equal(straight.learner.predictions(shown), restored.learner.predictions(shown))


def test_a_finished_agent_has_learned_from_everything_that_was_told(toy):
    agent = agent_of(toy)
    toy.run(agent, 14)
    missing, *others = agent.ask(3)
    agent.tell([(actor, toy.episode(actor)) for actor in others])
    agent.finish()
    assert len(agent.learner.memories) == 16 and agent.learned == agent.asked
    assert len(toy.run(agent, 6)) == 6


def test_the_preference_can_change_while_it_runs(toy):
    def costs_after(preference):
        agent = agent_of(toy, budgets=toy.budgets[:1])
        toy.run(agent, 20)
        agent.prefer(preference)
        return np.mean([toy.cost(agent_actor.sequence) for agent_actor in _actors(toy, agent, 20)])

    assert costs_after((0.1, 0.9)) < costs_after((1, 0)) - 0.1
    with pytest.raises(InputError, match="one weight for each of"):
        agent_of(toy).prefer((1.0,))
    with pytest.raises(InputError, match="not all zero"):
        agent_of(toy).prefer((0.0, 0.0))


def _actors(toy, agent, count):
    actors = []
    while len(actors) < count:
        (actor,) = agent.ask(1)
        agent.tell([(actor, toy.episode(actor))])
        actors.append(actor)
    return actors


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
    with pytest.raises(InputError, match="schema 9.*Start another search"):
        EnvelopeDdpg.load(folder, toy)
    (folder / "agent.json").write_text(json.dumps(state))
    (folder / "networks.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="damaged"):
        EnvelopeDdpg.load(folder, toy)


def test_every_option_is_described():
    assert all(f"{field.name}" in EnvelopeDdpgConfig.__doc__ for field in fields(EnvelopeDdpgConfig))


# -------------------------------------------------------------------------------------------------------------- known fronts


FRONTS = ["convex", "partly_concave"]
EXPLORER = EnvelopeDdpgConfig(
    warmup=20, candidates=48, goals=48, updates=8, batch=32, planned=12, hidden=32, critics=3, elsewhere=1.0, sharpening=10
)


def share_of_hypervolume(make, seed, evaluations=150, **options):
    space = make()
    agent = EnvelopeDdpg(replace(EXPLORER, **options), space, [Budget("any", {"cost": 0.95})], np.random.default_rng(seed))
    episodes = space.run(agent, evaluations, slots=1)
    found = np.array([[-episode.evaluation.top1, -episode.reward[1]] for episode in episodes])
    costs, top1 = space.front()
    keep = costs <= 0.95
    reference = np.array([0.0, 1.0])
    return hypervolume(found, reference) / hypervolume(np.column_stack([-top1, costs])[keep], reference)


def test_the_concave_front_is_concave_somewhere(known_fronts):
    for name, concave in zip(FRONTS, (False, True), strict=True):
        costs, top1 = known_fronts[name]().front()
        assert bool((np.diff(top1, 2) > 1e-3).any()) == concave, name


@pytest.mark.parametrize("name", FRONTS)
def test_finds_a_known_front(known_fronts, name):
    assert share_of_hypervolume(known_fronts[name], 0) >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, INGREDIENTS], ids=["by default", "with all ingredients"])
@pytest.mark.parametrize("name", FRONTS)
def test_finds_a_known_front_with_most_seeds(known_fronts, name, options):
    shares = [share_of_hypervolume(known_fronts[name], seed, **options) for seed in range(10)]
    assert sum(share >= 0.9 for share in shares) >= 8
