"""The wall: budgets that hold by construction, for any number of cost models, additive or not.

Costs are deterministic functions of the policy, so they are computed and never learned. At each decision the wall finds the
least compression, not below what was asked, that still leaves every limit reachable when all later decisions are at their
strongest. Source: the action wall of AMC (He et al. 2018, arXiv:1802.03494, algorithm 1), there for one additive cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cost_models.core import CostModel, InputError
from envs.core import Budget, CompressionPolicy
from envs.policy_space import PolicySpace

_BENDS = 48  # exponents tried at once by `fit`; two rounds narrow the edge to 1 part in 2,000


class FeasibleSpace:
    """A policy space behind its wall: an `ActionSpace` (envs/core.py) for any budget over the given costs.

    Args:
        space: the decisions.
        cost_models: {name: model}; a budget may limit any of them.
        objectives: names of the reward's components, "top1" first, then costs.
        dense_top1: top-1 of the untouched model on the validation split.
        observation_dim: of the environment that this space belongs to.

    `unit_magnitudes` (see `ActionSpace`) are all alike until they are set: costs need no weights.
    """

    def __init__(
        self,
        space: PolicySpace,
        cost_models: Mapping[str, CostModel],
        objectives: Sequence[str],
        dense_top1: float,
        observation_dim: int,
    ):
        self.space = space
        self.cost_models = dict(cost_models)
        self.objectives = tuple(objectives)
        self.dense_top1 = dense_top1
        self.observation_dim = observation_dim
        self.num_steps, self.action_dim, self.used = space.num_steps, space.action_dim, space.used
        geometry = space.geometry
        self.unit_magnitudes = tuple(np.ones(units) for units in geometry.group_units)
        macs = geometry.shapes().weights[0] * [layer.macs_per_weight for layer in geometry.layers]
        produces = geometry.out_per_unit > 0
        self.producer_macs = produces @ macs / np.maximum(produces.sum(axis=1), 1)
        self.dense_costs = {
            name: float(model.total(space.geometry.shapes())[0]) for name, model in self.cost_models.items()
        }

    def costs(self, levels: np.ndarray, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Return {cost: (population,)} of levels (population, decisions)."""
        shapes = self.space.shapes(levels)
        return {name: self.cost_models[name].total(shapes) for name in names or self.cost_models}

    def policy_costs(self, policy: CompressionPolicy) -> dict[str, float]:
        """Return the value of every cost model for one policy."""
        shapes = self.space.geometry.shapes(policy.widths, policy.weight_bits, policy.activation_bits)
        return {name: float(model.total(shapes)[0]) for name, model in self.cost_models.items()}

    def slack(self, levels: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the largest value / limit - 1 over the budget's costs, (population,); feasible when <= 0."""
        if not budget.limits:
            return np.full(len(levels), -1.0)
        costs = self.costs(levels, list(budget.limits))
        return np.max([costs[name] / limit - 1 for name, limit in budget.limits.items()], axis=0)

    def check(self, budget: Budget) -> None:
        """Raise InputError if even the strongest compression breaks the budget."""
        least = self.costs(self.space.strongest[None], list(budget.limits))
        for name, limit in budget.limits.items():
            if least[name][0] > limit:
                dense = self.dense_costs[name]
                raise InputError(
                    f"Budget '{budget.name}' cannot be met: it needs at least {100 * least[name][0] / dense:.3g} % of the dense "
                    f"{name} ({least[name][0]:,.0f} of {dense:,.0f}), but asks for {100 * limit / dense:.3g} %. Raise the limit, "
                    "or allow stronger compression in `space`."
                )

    def admit(self, levels: np.ndarray, decision: int, wanted: int, budget: Budget) -> int:
        """Return the level that is executed.

        Args:
            levels: (decisions,); entries before `decision` are executed already, the others are ignored.
            decision: index of the decision at hand.
            wanted: the level asked for.
            budget: must be satisfiable (`check`).
        Returns:
            The least level >= wanted that keeps every limit reachable; if there is none (a cost that is not monotone), the
            nearest weaker one that does. Some level always does: the strongest completion of the step before is among them.
        """
        choices = np.arange(self.space.num_levels[decision])
        population = np.tile(self.space.strongest, (len(choices), 1))
        population[:, :decision] = levels[:decision]
        population[:, decision] = choices
        reachable = self.slack(population, budget) <= 0
        stronger = np.flatnonzero(reachable[wanted:])
        if len(stronger):
            return int(wanted + stronger[0])
        weaker = np.flatnonzero(reachable[:wanted])
        assert len(weaker), "the wall let an unreachable budget through"
        return int(weaker[-1])

    def walk(self, levels: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the executed levels of a whole episode, (decisions,): `admit` at one decision after the other.

        All decisions up to the next one that the wall changes are checked in one call.
        """
        executed, decisions = np.array(levels), len(levels)
        start = 0
        while start < decisions:
            taken = np.arange(decisions) <= np.arange(start, decisions)[:, None]  # row d: decisions 0..d as they are
            blocked = np.flatnonzero(self.slack(np.where(taken, executed, self.space.strongest), budget) > 0)
            if not len(blocked):
                break
            start += int(blocked[0])
            executed[start] = self.admit(executed, start, int(levels[start]), budget)
            start += 1
        return executed

    def execute(self, table: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the table that the environment would execute (see `ActionSpace`)."""
        return self.space.table(self.walk(self.space.snap(table), budget))

    def fit(self, table: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the table bent to the edge of the budget, then executed.

        Every strength s becomes s ** p with one exponent p for all: p > 1 weakens, p < 1 strengthens, and the order of the
        strengths is kept. The largest p that is feasible is taken.
        """
        strengths = np.clip(table, 0.005, 0.995)  # 0 and 1 would not move
        low, high = -7.0, 7.0  # log2 of the exponent
        for _ in range(2):
            exponents = np.linspace(low, high, _BENDS)
            population = self.space.snap(strengths[None] ** (2.0 ** exponents)[:, None, None])
            feasible = np.flatnonzero(self.slack(population, budget) <= 0)
            best = feasible[-1] if len(feasible) else 0
            low, high = exponents[best], exponents[min(best + 1, _BENDS - 1)]
        return self.space.table(self.walk(population[best], budget))

    def with_prune_ratios(self, table: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        """Return the table with the levels nearest to these prune ratios, (groups,); see `ActionSpace`."""
        levels = self.space.snap(table)
        for index, decision in enumerate(self.space.decisions):
            if decision.kind == "prune_ratio":
                levels[index] = np.abs(np.array(decision.values) - ratios[decision.target]).argmin()
        return self.space.table(levels)

    def decode(self, table: np.ndarray) -> CompressionPolicy:
        """Return the policy of an executed table."""
        return self.space.policy(self.space.snap(table))
