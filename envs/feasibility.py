"""A policy space whose budgets hold by construction: what agents see, and what the environment steps through."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from secateur.envs.core import Act, Budget, CompressionPolicy, Sensitivities, Simulation
from secateur.envs.costs import PolicyCosts
from secateur.envs.episodes import EpisodeBatch
from secateur.envs.metric import Metric
from secateur.envs.observation import Observer
from secateur.envs.policy_space import PolicySpace
from secateur.envs.projection import FeasibilityProjection

_EXPONENTS, _ROUNDS = 12, 3  # of `scale_to_budget`: the edge is found to 14 / 12 ** 3 of log2 of the exponent
_WIDEST = 7.0  # largest |log2| of an exponent


class FeasibleSpace:
    """An `ActionSpace` (envs/core.py) for any budget over the given costs; complete when made, never changed.

    Args:
        costs: of the policies; a budget may limit any of them.
        objectives: names of the reward's components, the metric's first, then costs.
        metric: of the task.
        dense_score: score of the untouched model on the validation split.
        unit_magnitudes: per group (units,): mean |w| of the weights that produce each unit; default: all alike.
        sensitivities: effect of each choice alone on the outputs; None: not measured.
    """

    def __init__(
        self,
        costs: PolicyCosts,
        objectives: Sequence[str],
        metric: Metric,
        dense_score: float,
        unit_magnitudes: Sequence[np.ndarray] | None = None,
        sensitivities: Sensitivities | None = None,
    ):
        self.costs = costs
        self.objectives = tuple(objectives)
        self.metric, self.dense_score = metric, dense_score
        self.dense_quality = metric.quality(dense_score, dense_score)
        units = costs.policy_space.geometry.group_units
        self.unit_magnitudes = tuple(np.ones(count) for count in units) if unit_magnitudes is None else tuple(unit_magnitudes)
        self.sensitivities = sensitivities
        self.projection = FeasibilityProjection(costs)
        self.observer = Observer(costs)
        self.check = self.projection.check

    def with_sensitivities(self, sensitivities: Sensitivities) -> FeasibleSpace:
        """Return the same space with these sensitivities."""
        changed = copy.copy(self)
        changed.sensitivities = sensitivities
        return changed

    @property
    def policy_space(self) -> PolicySpace:
        """The decisions, and the encodings of their policies."""
        return self.costs.policy_space

    @property
    def num_steps(self) -> int:
        """Steps per episode."""
        return self.policy_space.num_steps

    @property
    def action_dim(self) -> int:
        """Entries of one action."""
        return self.policy_space.action_dim

    @property
    def observation_dim(self) -> int:
        """Entries of one observation."""
        return len(self.observer.names)

    @property
    def used(self) -> np.ndarray:
        """(num_steps, action_dim) bool."""
        return self.policy_space.used

    @property
    def level_actions(self) -> Sequence[np.ndarray]:
        """Of each decision: the actions that mean its levels."""
        return self.policy_space.level_actions

    @property
    def dense_costs(self) -> Mapping[str, float]:
        """{cost: value} of the untouched model."""
        return self.costs.dense

    @cached_property
    def producer_macs(self) -> np.ndarray:
        """(groups,) multiply-accumulates of the dense layers that produce a group, their mean."""
        geometry = self.policy_space.geometry
        macs = geometry.shapes().weights[0] * geometry.macs_per_weight
        produces = geometry.out_per_unit > 0
        means: np.ndarray = produces @ macs / np.maximum(produces.sum(axis=1), 1)
        return means

    def episodes(self, budgets: Sequence[Budget]) -> EpisodeBatch:
        """Return episodes before their first step, one per budget."""
        return EpisodeBatch(self.projection, self.observer, budgets)

    def execute(self, sequences: np.ndarray, budgets: Budget | Sequence[Budget]) -> np.ndarray:
        """Return the sequences that the environment would execute; see `ActionSpace`."""
        levels = self.policy_space.sequence_to_levels(sequences)
        batch = np.atleast_2d(levels)
        executed = self.projection.rows(_one_per_row(budgets, len(batch))).project(batch)
        return self.policy_space.levels_to_sequence(executed.reshape(levels.shape))

    def scale_to_budget(self, sequences: np.ndarray, budgets: Budget | Sequence[Budget]) -> np.ndarray:
        """Return the sequences scaled to the edge of the budget, then executed; see `ActionSpace`.

        Every entry s becomes s ** p with one exponent p per sequence: p > 1 compresses less, p < 1 more. The largest p of the
        grid that is feasible is taken, and the grid is refined around it.
        """
        batch = np.clip(sequences, 0.005, 0.995).reshape(-1, self.num_steps, self.action_dim)  # 0 and 1 would not move
        count = len(batch)
        rows = self.projection.rows(_one_per_row(budgets, count))
        every, repeated = np.arange(count), np.repeat(np.arange(count), _EXPONENTS)
        low, high = np.full(count, -_WIDEST), np.full(count, _WIDEST)
        for _ in range(_ROUNDS):
            exponents = np.linspace(low, high, _EXPONENTS, axis=1)
            levels = self.policy_space.sequence_to_levels(batch[:, None] ** (2.0**exponents)[..., None, None])
            fits = rows.slack(levels.reshape(count * _EXPONENTS, -1), repeated).reshape(count, _EXPONENTS) <= 0
            best = np.where(fits.any(axis=1), _EXPONENTS - 1 - fits[:, ::-1].argmax(axis=1), 0)
            low, high = exponents[every, best], exponents[every, np.minimum(best + 1, _EXPONENTS - 1)]
        executed = rows.project(levels[every, best])
        return self.policy_space.levels_to_sequence(executed).reshape(np.shape(sequences))

    def with_prune_ratios(self, sequence: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        """Return the sequence with the levels nearest to these prune ratios, (groups,); see `ActionSpace`."""
        levels = self.policy_space.sequence_to_levels(sequence)
        for index, decision in enumerate(self.policy_space.decisions):
            if decision.kind == "prune_ratio":
                levels[index] = np.abs(np.array(decision.values) - ratios[decision.target]).argmin()
        return self.policy_space.levels_to_sequence(levels)

    def decode(self, sequence: np.ndarray) -> CompressionPolicy:
        """Return the policy of an executed sequence."""
        return self.policy_space.levels_to_policy(self.policy_space.sequence_to_levels(sequence))

    def simulate(
        self, act: Act, budgets: Sequence[Budget], sequences: np.ndarray | None = None, starts: np.ndarray | None = None
    ) -> Simulation:
        """Return what the environment would execute, observe and spend; see `ActionSpace`."""
        batch, rows = self.episodes(budgets), len(budgets)
        starts = np.zeros(rows, int) if starts is None else np.asarray(starts)
        observations = np.zeros((rows, self.num_steps + 1, self.observation_dim), np.float32)
        for step in range(self.num_steps):
            actions = np.zeros((rows, self.action_dim)) if sequences is None else np.array(sequences[:, step], float)
            free = np.flatnonzero(starts <= step)
            if len(free):
                observations[free, step] = batch.observe(free)
                actions[free] = act(observations[free, step], batch.sequences[free], step, free)
            batch.advance(actions, free)
        observations[:, -1] = batch.observe(np.arange(rows))
        return Simulation(observations, batch.sequences, self.cost_shares(batch.sequences))

    def cost_shares(self, sequences: np.ndarray) -> np.ndarray:
        """Return the costs among the objectives of executed sequences by the dense ones; see `ActionSpace`."""
        names = self.objectives[1:]
        costs = self.costs.of_levels(self.policy_space.sequence_to_levels(sequences), names)
        return np.stack([costs[name] / self.dense_costs[name] for name in names], axis=1)

    def with_limits(self, observations: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
        """Return the observations of the same states under other budgets; see `ActionSpace`."""
        return self.observer.with_limits(observations, budgets)


def _one_per_row(budgets: Budget | Sequence[Budget], rows: int) -> Sequence[Budget]:
    return [budgets] * rows if isinstance(budgets, Budget) else budgets
