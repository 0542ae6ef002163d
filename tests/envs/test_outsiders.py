"""The environment trains agents of other libraries unchanged, where these are installed."""

import warnings

import gymnasium as gym
import numpy as np
import pytest

from secateur.envs.compression_env import CompressionEnv
from secateur.envs.core import Budget, Evaluation

pytestmark = pytest.mark.filterwarnings("ignore")


class KeptShare:
    """Scores the kept share of the units."""

    def __init__(self, space):
        self.space, self.calls = space, 0

    def evaluate(self, policy):
        self.calls += 1
        return Evaluation(sum(policy.widths) / 14, self.space.costs.of_policy(policy))


class Scalarized(gym.Wrapper):
    """The sum of the reward's components."""

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward.sum()), terminated, truncated, {}


def library(name):
    """Return a module, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


@pytest.fixture
def env(feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.8), weight_bits=(8, 4))
    return CompressionEnv(space, KeptShare(space), [Budget("half", {"macs": 2000.0})])


def test_stable_baselines3_trains_ddpg(env):
    sb3 = library("stable_baselines3")
    model = sb3.DDPG("MlpPolicy", Scalarized(env), learning_starts=6, batch_size=4, policy_kwargs={"net_arch": [8]}, seed=0)
    model.learn(18)
    assert env.evaluator.calls == 18 // env.space.num_steps
    action, _ = model.predict(env.reset()[0])
    assert env.action_space.contains(action)


def test_morl_baselines_trains_capql(env):
    capql = library("morl_baselines.multi_policy.capql.capql")
    env.spec = None
    agent = capql.CAPQL(env, net_arch=[8], learning_starts=6, batch_size=4, log=False, seed=0)
    agent.train(18, env, np.array([0.0, -1.0]), num_eval_weights_for_front=2, eval_freq=10_000)
    action = agent.eval(env.reset()[0], np.array([0.5, 0.5], np.float32))
    assert np.shape(action) == env.action_space.shape
