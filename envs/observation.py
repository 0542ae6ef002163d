"""What an actor sees: the layer at hand, and how far the budget reaches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.envs.core import Budget
from secateur.envs.feasibility import FeasibleSpace

LAYER_FEATURES = (
    "position", "is_linear", "is_depthwise", "in_channels", "out_channels", "kernel", "stride", "output_size",
    "macs_share", "weights_share",
)  # fmt: skip


def observation_names(kinds: tuple[str, ...], costs: tuple[str, ...]) -> tuple[str, ...]:
    """Return the name of every entry of an observation (see `CompressionEnv`)."""
    return (
        *LAYER_FEATURES,
        *(f"chooses_{kind}" for kind in kinds),
        *(f"last_{kind}" for kind in kinds),
        *(f"{what}_{cost}" for cost in costs for what in ("reachable", "spent", "limit")),
    )


class Observer:
    """Computes observations, (observation_dim,) float32 in [0, 1]."""

    def __init__(self, space: FeasibleSpace):
        self.space = space
        self.costs = tuple(space.cost_models)
        self.names = observation_names(space.policy_space.kinds, self.costs)
        self._static = _layer_features(space)

    def __call__(self, step: int, decision: int, levels: np.ndarray, last: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the observation before `step`.

        Args:
            step: 0..num_steps; num_steps is the end of the episode.
            decision: how many decisions are executed already.
            levels: (decisions,) whose first `decision` entries are executed.
            last: (action_dim,) the previous step's executed action.
            budget: the episode's budget.
        """
        return self.rows(step, decision, levels[None], last[None], self.limits([budget]))[0]

    def rows(self, step: int, decision: int, levels: np.ndarray, last: np.ndarray, limits: np.ndarray) -> np.ndarray:
        """Return the observations of many episodes at the same step, (n, observation_dim).

        Args:
            step, decision: as in `__call__`, the same for all.
            levels, last: a row for each.
            limits: theirs, as `limits` returns them, (n, costs).
        """
        rows = len(levels)
        ends = np.repeat([self.space.policy_space.strongest, self.space.policy_space.weakest], rows, axis=0)
        ends[:, :decision] = np.tile(levels[:, :decision], (2, 1))
        costs = self.space.costs(ends)
        static = np.tile(self._static[min(step, self.space.num_steps - 1)], (rows, 1))
        reach = [
            column
            for index, name in enumerate(self.costs)
            for column in (*(costs[name] / self.space.dense_costs[name]).reshape(2, rows), limits[:, index])
        ]
        return np.clip(np.hstack([static, last, np.stack(reach, axis=1)]), 0, 1).astype(np.float32)

    def limits(self, budgets: Sequence[Budget]) -> np.ndarray:
        """Return every limit as a share of the dense cost, (n, costs); 1 without a limit."""
        known: dict[int, list[float]] = {}
        for budget in budgets:
            if id(budget) not in known:
                known[id(budget)] = [
                    budget.limits.get(name, self.space.dense_costs[name]) / self.space.dense_costs[name] for name in self.costs
                ]
        return np.array([known[id(budget)] for budget in budgets])


def _layer_features(space: FeasibleSpace) -> np.ndarray:
    """(num_steps, LAYER_FEATURES + kinds): everything that the policy does not change."""
    layers = space.policy_space.geometry.layers
    weights = space.policy_space.geometry.shapes().weights[0]
    macs = weights * space.policy_space.geometry.macs_per_weight
    widest = np.log2(1 + max(max(layer.in_channels, layer.out_channels) for layer in layers))
    largest = max(max(layer.out_hw) for layer in layers)
    rows = []
    for step, index in enumerate(space.policy_space.step_layers):
        layer = layers[index]
        rows.append(
            [
                step / space.num_steps,
                layer.kind == "linear",
                layer.depthwise,
                np.log2(1 + layer.in_channels) / widest,
                np.log2(1 + layer.out_channels) / widest,
                max(layer.kernel) / 7,
                max(layer.stride) / 4,
                max(layer.out_hw) / largest,
                macs[index] / max(macs.max(), 1),
                weights[index] / weights.max(),
                *space.used[step],
            ]
        )
    return np.array(rows, float)
