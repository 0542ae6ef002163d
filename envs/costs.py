"""Costs of policies: what every cost model says of the levels, or the policies, of one policy space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from secateur.cost_models.core import CostModel
from secateur.envs.core import CompressionPolicy
from secateur.envs.policy_space import PolicySpace


class PolicyCosts:
    """Computes the costs of policies.

    Args:
        policy_space: the decisions.
        cost_models: {name: model}.
    """

    def __init__(self, policy_space: PolicySpace, cost_models: Mapping[str, CostModel]):
        self.policy_space = policy_space
        self.models = dict(cost_models)

    @cached_property
    def dense(self) -> dict[str, float]:
        """{cost: value} of the dense network."""
        shapes = self.policy_space.geometry.shapes()
        return {name: float(model.total(shapes)[0]) for name, model in self.models.items()}

    def of_levels(self, levels: np.ndarray, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Return {cost: (population,)} of levels (population, decisions); `names`: which costs, default all."""
        shapes = self.policy_space.shapes(levels)
        return {name: self.models[name].total(shapes) for name in (self.models if names is None else names)}

    def of_policy(self, policy: CompressionPolicy) -> dict[str, float]:
        """Return {cost: value} of one policy."""
        widths, *bits = (np.array([column]) for column in (policy.widths, policy.weight_bits, policy.activation_bits))
        shapes = self.policy_space.geometry.shapes(widths, *bits)
        return {name: float(model.total(shapes)[0]) for name, model in self.models.items()}
