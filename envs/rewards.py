"""Vector rewards and constraints: the one place where a minimized cost becomes a maximized reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.envs.core import Budget, Evaluation
from secateur.envs.metric import Metric, drop_name


def reward_vector(evaluation: Evaluation, objectives: Sequence[str], dense_costs: Mapping[str, float]) -> np.ndarray:
    """Return the reward, (num_objectives,) float32: the quality, then every cost as minus its share of the dense cost.

    Args:
        evaluation: of one policy.
        objectives: name of the metric, then of the costs.
        dense_costs: costs of the dense model.
    """
    return np.array([evaluation.quality, *(-evaluation.costs[name] / dense_costs[name] for name in objectives[1:])], np.float32)


def constraints(evaluation: Evaluation, budget: Budget, metric: Metric, dense_score: float) -> dict[str, float]:
    """Return {name: value / limit - 1} over everything the budget limits; feasible when all are <= 0."""
    slacks = {name: evaluation.costs[name] / limit - 1 for name, limit in budget.limits.items()}
    if budget.metric_drop is not None:
        # An allowed drop of zero has no share to divide by; the drop itself then is the slack.
        drop = metric.drop(evaluation.score, dense_score)
        slacks[drop_name(metric)] = drop / budget.metric_drop - 1 if budget.metric_drop else drop
    return slacks
