"""Vector rewards and constraints: the one place where a minimized cost becomes a maximized reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.envs.core import Budget, Evaluation


def reward_vector(evaluation: Evaluation, objectives: Sequence[str], dense_costs: Mapping[str, float]) -> np.ndarray:
    """Return the reward, (num_objectives,) float32: top1 as a fraction, every cost as minus its share of the dense cost."""
    return np.array(
        [evaluation.top1 if name == "top1" else -evaluation.costs[name] / dense_costs[name] for name in objectives],
        np.float32,
    )


def constraints(evaluation: Evaluation, budget: Budget, dense_top1: float) -> dict[str, float]:
    """Return {name: value / limit - 1} over everything the budget limits; feasible when all are <= 0."""
    slacks = {name: evaluation.costs[name] / limit - 1 for name, limit in budget.limits.items()}
    if budget.top1_drop is not None:
        # An allowed drop of zero has no share to divide by; the drop itself then is the slack.
        drop = dense_top1 - evaluation.top1
        slacks["top1_drop"] = drop / budget.top1_drop - 1 if budget.top1_drop else drop
    return slacks
