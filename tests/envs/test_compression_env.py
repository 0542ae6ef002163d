"""The environment's conventions, with an evaluator that answers at once."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from secateur.envs.compression_env import CompressionEnv
from secateur.envs.core import Budget, Evaluation, InputError
from secateur.envs.rollout import rollout


class CountingEvaluator:
    """Scores the kept share of the units."""

    def __init__(self, space):
        self.space, self.calls, self.broken = space, 0, False

    def evaluate(self, policy):
        self.calls += 1
        if self.broken:
            raise RuntimeError("out of luck")
        return Evaluation(sum(policy.widths) / 14, self.space.costs.of_policy(policy))


BUDGETS = (Budget("half", {"macs": 2000.0}), Budget("strict", {"macs": 3000.0}, metric_drop=0.0))


@pytest.fixture
def env(feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.8), weight_bits=(8, 4))
    return CompressionEnv(space, CountingEvaluator(space), BUDGETS)


class Fixed:
    """An actor with the same action everywhere."""

    def __init__(self, action, budget, env):
        self.action, self.budget = np.full(env.action_space.shape, action, np.float32), budget

    def act(self, observation, step):
        return self.action


class Scalarized(gym.Wrapper):
    """The sum of the reward's components, as a float."""

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward.sum()), terminated, truncated, info


@pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version")  # it is: that is what the wrapper is for
def test_gymnasium_accepts_the_scalarized_environment(env):
    check_env(Scalarized(env), skip_render_check=True)


def test_registered_under_its_name():
    assert gym.spec("secateur/Compression-v0").entry_point == "secateur.envs.compression_env:CompressionEnv"


def test_rewards_are_vectors_in_the_reward_space(env):
    env.reset(seed=0)
    terminated, rewards = False, []
    while not terminated:
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        rewards.append(reward)
        assert env.observation_space.contains(observation)
        assert reward in env.reward_space and reward.shape == (env.reward_dim,)
        assert not truncated
    assert (np.array(rewards[:-1]) == 0).all()
    assert rewards[-1][0] > 0 > rewards[-1][1]


def test_the_recorded_action_is_the_executed_one(env):
    episode = rollout(env, Fixed(0.0, BUDGETS[0], env))
    levels = env.space.policy_space.sequence_to_levels(episode.actions)
    assert env.space.policy_space.levels_to_policy(levels) == episode.policy
    assert episode.actions.max() > 0, "the projection must have compressed"
    assert episode.evaluation.costs["macs"] <= 2000
    assert episode.feasible


def test_every_budget_holds_whatever_the_actor_does(env):
    rng = np.random.default_rng(0)

    class Random(Fixed):
        def act(self, observation, step):
            return rng.uniform(size=self.action.shape)

    for budget in BUDGETS:
        for _ in range(30):
            episode = rollout(env, Random(0, budget, env))
            assert episode.constraints["macs"] <= 0


def test_top1_drop_is_a_constraint_on_the_result(env):
    episode = rollout(env, Fixed(1.0, BUDGETS[1], env))
    assert episode.constraints["top1_drop"] == pytest.approx(0.9 - episode.evaluation.score)
    assert not episode.feasible


def test_observation_tells_what_the_budget_leaves(env):
    names = list(env.observation_names)
    observation, _ = env.reset(options={"budget": "half"})
    limit = observation[names.index("limit_macs")]
    assert limit == pytest.approx(2000 / env.space.dense_costs["macs"])
    assert observation[names.index("spent_macs")] == 1
    episode = rollout(env, Fixed(0.5, BUDGETS[0], env))
    last = dict(zip(names, episode.observations[-1], strict=True))
    assert last["reachable_macs"] == last["spent_macs"] <= last["limit_macs"] + 1e-6


def test_a_candidate_that_breaks_is_a_failed_episode(env):
    env.evaluator.broken = True
    episode = rollout(env, Fixed(0.5, BUDGETS[0], env))
    assert episode.failure == "RuntimeError: out of luck"
    assert episode.policy is not None and episode.evaluation is None and not episode.feasible
    env.evaluator.broken = False
    assert rollout(env, Fixed(0.5, BUDGETS[0], env)).failure is None


def test_unknown_budget_is_refused(env):
    with pytest.raises(InputError, match="no budget 'tiny'; the budgets are half, strict"):
        env.reset(options={"budget": "tiny"})
