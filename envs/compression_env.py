"""The environment: one episode compresses one network, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from secateur.envs.core import Budget, CompressionPolicy, InputError
from secateur.envs.evaluator import Evaluator
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.rewards import constraints, reward_vector

_ONLY = np.zeros(1, int)  # the environment steps a batch of one episode


class CompressionEnv(gym.Env):
    """Chooses prune ratios and bit-widths layer by layer; the last step evaluates the compressed network.

    **Observation**: float32 vector in [0, 1], named entry by entry in `observation_names`:

    | entries | meaning |
    |---|---|
    | position | step / number of steps |
    | is_linear, is_depthwise | kind of the step's layer |
    | in_channels, out_channels | log2(1 + dense channels), by the network's largest |
    | kernel, stride, output_size | largest side, by 7, 4 and the network's largest output |
    | macs_share, weights_share | by the network's largest layer |
    | chooses_KIND | whether this step chooses a prune ratio, weight bits, activation bits |
    | last_KIND | executed action of the step before |
    | reachable_COST | share of the dense cost if all later choices were the strongest compression |
    | spent_COST | the same if all later choices were the least compression |
    | limit_COST | the budget's limit by the dense cost; 1 without a limit |

    **Action**: float vector in [0, 1], one entry per kind of choice (prune_ratio, weight_bits, activation_bits; kinds without
    any choice have no entry): 0 = least compression, 1 = strongest. What is *executed* may be stronger: widths and bits are
    rounded to real ones, and the feasibility projection keeps every limit reachable. `info["action"]` is the executed action.

    **Reward**: vector, MO-Gymnasium's convention: zero until the last step, then the quality, and minus each cost by its
    dense value.

    **Episode**: one step per layer that has a choice (further coupled groups that begin at the same layer take further steps).
    `reset(options={"budget": name or Budget})` conditions it; default: the first budget. The last `info` holds "policy",
    "evaluation" and "constraints". An evaluation that fails raises; `secateur.envs.rollout` turns that into a failed episode.

    Args:
        space: decisions, costs and feasibility projection.
        evaluator: scores a policy.
        budgets: the named budgets.
    """

    metadata = {"render_modes": []}

    def __init__(self, space: FeasibleSpace, evaluator: Evaluator, budgets: Sequence[Budget]):
        self.space, self.evaluator = space, evaluator
        self.budgets = {budget.name: budget for budget in budgets}
        self.observation_names = space.observer.names
        self.observation_space = gym.spaces.Box(0, 1, (len(self.observation_names),), np.float32)
        self.action_space = gym.spaces.Box(0, 1, (space.action_dim,), np.float32)
        # A cost may exceed the dense one by what quantization adds (scales), never by more than its own size again.
        costs = len(space.objectives) - 1
        self.reward_space = gym.spaces.Box(
            np.array([0.0] + [-2.0] * costs, np.float32), np.array([1.0] + [0.0] * costs, np.float32)
        )
        self.reward_dim = len(space.objectives)
        self.policy: CompressionPolicy | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; see the class for `options`."""
        super().reset(seed=seed)
        self.policy = None
        self._budget = self._find_budget((options or {}).get("budget"))
        self._episode = self.space.episodes([self._budget])
        return self._observation(), {"budget": self._budget.name}

    def _find_budget(self, budget: str | Budget | None) -> Budget:
        if isinstance(budget, Budget):
            self.space.check(budget)
            return budget
        if budget is None:
            return next(iter(self.budgets.values()))
        if budget not in self.budgets:
            raise InputError(f"There is no budget '{budget}'; the budgets are {', '.join(self.budgets)}.")
        return self.budgets[budget]

    def _observation(self) -> np.ndarray:
        observation: np.ndarray = self._episode.observe(_ONLY)[0]
        return observation

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Execute the choices of one step; see the class."""
        step = self._episode.step
        self._episode.advance(np.asarray(action)[None], _ONLY)
        info: dict[str, Any] = {"action": self._episode.sequences[0, step].copy()}
        reward = np.zeros(self.reward_dim, np.float32)
        terminated = self._episode.step == self.space.num_steps
        if terminated:
            self.policy = self.space.policy_space.levels_to_policy(self._episode.levels[0])
            evaluation = self.evaluator.evaluate(self.policy)
            reward = reward_vector(evaluation, self.space.objectives, self.space.dense_costs)
            slacks = constraints(evaluation, self._budget, self.space.metric, self.space.dense_score)
            info |= {"policy": self.policy, "evaluation": evaluation, "constraints": slacks}
        return self._observation(), reward, terminated, False, info


gym.register("secateur/Compression-v0", entry_point="secateur.envs.compression_env:CompressionEnv")
