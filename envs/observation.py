"""What an actor observes: the layer of the step, and how far the budget reaches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.envs.core import Budget
from secateur.envs.costs import PolicyCosts
from secateur.envs.policy_space import PolicySpace

LAYER_FEATURES = (
    "position", "is_linear", "is_depthwise", "in_channels", "out_channels", "kernel", "stride", "output_size",
    "macs_share", "weights_share",
)  # fmt: skip


class Observer:
    """Computes observations, (n, observation_dim) float32 in [0, 1]; `names` names their entries (see `CompressionEnv`)."""

    def __init__(self, costs: PolicyCosts):
        self._costs, self._space = costs, costs.policy_space
        self._static = _step_features(self._space)
        self.names = (
            *LAYER_FEATURES,
            *(f"chooses_{kind}" for kind in self._space.kinds),
            *(f"last_{kind}" for kind in self._space.kinds),
            *(f"{what}_{cost}" for cost in costs.models for what in ("reachable", "spent", "limit")),
        )
        self._limit_columns = [index for index, name in enumerate(self.names) if name.startswith("limit_")]

    def observe(self, step: int, decision: int, levels: np.ndarray, last: np.ndarray, limits: np.ndarray) -> np.ndarray:
        """Return the observations of n episodes at the same step, (n, observation_dim).

        Args:
            step: 0..num_steps; num_steps is the end of the episode.
            decision: number of decisions that are executed already.
            levels: (n, decisions) whose first `decision` entries are executed.
            last: (n, action_dim) executed action of the step before.
            limits: (n, costs), see `limits`.
        """
        rows = len(levels)
        ends = np.repeat([self._space.strongest, self._space.weakest], rows, axis=0)
        ends[:, :decision] = np.tile(levels[:, :decision], (2, 1))
        costs = self._costs.of_levels(ends)
        static = np.tile(self._static[min(step, self._space.num_steps - 1)], (rows, 1))
        reach = [
            column
            for index, (name, dense) in enumerate(self._costs.dense.items())
            for column in (*(costs[name] / dense).reshape(2, rows), limits[:, index])
        ]
        return np.clip(np.hstack([static, last, np.stack(reach, axis=1)]), 0, 1).astype(np.float32)

    def limits(self, budgets: Sequence[Budget]) -> np.ndarray:
        """Return every limit as a share of the dense cost, (n, costs); 1 without a limit."""
        dense = self._costs.dense
        shares = {b: [b.limits.get(name, value) / value for name, value in dense.items()] for b in dict.fromkeys(budgets)}
        return np.array([shares[budget] for budget in budgets])

    def with_limits(self, observations: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
        """Return the observations, (n, observation_dim), of the same states under other budgets, one each."""
        changed = np.array(observations, np.float32)
        changed[..., self._limit_columns] = np.clip(self.limits(budgets), 0, 1)
        return changed


def _step_features(space: PolicySpace) -> np.ndarray:
    """Return what the policy does not change, (num_steps, LAYER_FEATURES + kinds)."""
    layers = space.geometry.layers
    weights = space.geometry.shapes().weights[0]
    macs = weights * space.geometry.macs_per_weight
    widest = np.log2(1 + max(max(layer.in_channels, layer.out_channels) for layer in layers))
    largest = max(max(layer.out_hw) for layer in layers)
    rows = []
    for step, index in enumerate(space.step_layers):
        layer = layers[index]
        features = [
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
        ]
        rows.append([*features, *space.used[step]])
    return np.array(rows, float)
