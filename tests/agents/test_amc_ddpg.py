"""AMC's agent: what it learns from, when it learns, and that it learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from secateur.agents.amc_ddpg import AmcDdpg
from secateur.agents.amc_ddpg_config import AmcDdpgConfig
from secateur.envs.core import Budget, Episode, InputError

SMALL = AmcDdpgConfig(warmup=6, hidden=16, batch=16, lookahead=1)


def agent_of(toy, seed=0, config=SMALL, budgets=None):
    return AmcDdpg(config, toy, budgets or toy.budgets[:1], np.random.default_rng(seed))


def parameters(agent):
    networks = (agent.actor, agent.critic, agent.target_actor, agent.target_critic)
    return [torch.cat([parameter.flatten() for parameter in network.parameters()]).tolist() for network in networks]


def test_learns_which_choices_raise_the_reward(toy, monkeypatch):
    monkeypatch.setattr(toy, "score", lambda sequence: 0.5 + (sequence[:, 0].mean() - sequence[:5, 1].mean()) / 2)
    config = AmcDdpgConfig(warmup=20, hidden=32, batch=32, actor_rate=1e-3)
    for seed in range(2):
        agent = agent_of(toy, seed, config, [Budget("loose", {"cost": 1.0})])
        scores = [episode.evaluation.score for episode in toy.run(agent, 70)]
        assert np.mean(scores[:20]) < 0.6 and np.mean(scores[-10:]) > 0.85


def test_learning_starts_after_the_warm_up(toy):
    agent = agent_of(toy)
    before = parameters(agent)
    toy.run(agent, 7, slots=1)  # the last one is not learned from yet
    assert parameters(agent) == before
    toy.run(agent, 1, slots=1)
    assert all(new != old for new, old in zip(parameters(agent), before, strict=True))


def test_target_networks_follow_slowly(toy):
    agent = agent_of(toy)
    first = parameters(agent)
    toy.run(agent, 12, slots=1)
    actor, critic, target_actor, target_critic = map(np.array, parameters(agent))
    for start, online, target in ((first[0], actor, target_actor), (first[1], critic, target_critic)):
        assert 0 < np.abs(target - start).sum() < np.abs(online - start).sum()


def test_the_baseline_is_the_mean_reward_where_all_rewards_are_equal(toy):
    agent = agent_of(toy)
    for _ in range(12):
        (actor,) = agent.ask(1)
        agent.tell([(actor, toy.episode(actor, top1=0.75))])
    assert agent.baseline == pytest.approx(0.75)


def test_noise_decays_after_the_warm_up(toy):
    """An actor that does not learn is followed more and more closely."""
    agent = agent_of(toy, config=replace(SMALL, actor_rate=1e-12, noise_decay=0.7), budgets=[Budget("loose", {"cost": 1.0})])
    sequences = np.array([episode.actions[toy.used] for episode in toy.run(agent, 36, slots=1)])
    assert sequences[:6].std(axis=0).mean() > 0.15 and sequences[-6:].std(axis=0).max() == 0


def test_executed_actions_are_stored_even_when_others_were_asked_for(toy):
    executed = np.where(toy.used, 1.0, 0.0).astype(np.float32)
    agent = agent_of(toy)
    for _ in range(2):
        (actor,) = agent.ask(1)
        agent.tell([(actor, replace(toy.episode(actor), actions=executed))])
    agent.ask(1)
    stored = np.array([action for _, action, *_ in agent.replay])
    np.testing.assert_array_equal(stored, np.tile(executed, (2, 1)))


def test_every_step_gets_the_reward_of_the_episode_and_only_the_last_one_has_no_next_step(toy):
    agent = agent_of(toy)
    (actor,) = agent.ask(1)
    episode = toy.episode(actor)
    agent.tell([(actor, episode)])
    agent.ask(1)
    states, _, rewards, following, more = (np.array(column) for column in zip(*agent.replay, strict=True))
    shown = toy.simulate(lambda *at: actor.sequence[None, at[2]], [actor.budget]).observations[0]
    np.testing.assert_array_equal(states, shown[:-1])
    np.testing.assert_array_equal(following, shown[1:])
    np.testing.assert_array_equal(rewards, np.full(6, episode.reward[0]))
    assert more.tolist() == [True] * 5 + [False]


def test_the_oldest_transitions_are_dropped(toy):
    agent = agent_of(toy, config=replace(SMALL, capacity=20, warmup=100))
    toy.run(agent, 5, slots=1)
    assert len(agent.replay) == 20


def test_failed_and_early_stopped_episodes_are_not_learned_from(toy):
    agent = agent_of(toy)
    (first,) = agent.ask(1)
    agent.tell([(first, Episode(first.budget.name, None, None, failure="RuntimeError: no"))])
    (second,) = agent.ask(1)
    episode = toy.episode(second)
    agent.tell([(second, replace(episode, evaluation=replace(episode.evaluation, stopped=True)))])
    agent.ask(1)
    assert agent.queue.learned == 2 and not agent.replay


def test_torchs_own_generator_is_left_alone(toy):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    toy.run(agent_of(toy), 10)
    torch.testing.assert_close(torch.rand(3), wanted)


@pytest.mark.parametrize("wrong", [{"warmup": 0}, {"noise": -1}, {"noise_decay": 0}, {"target_rate": 1.5}, {"batch": 0}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(InputError, match=f"`{next(iter(wrong))}` of the agent `amc_ddpg`"):
        AmcDdpgConfig(**wrong)
