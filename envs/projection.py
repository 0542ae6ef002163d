"""The feasibility projection: budgets that hold by construction, for any number of cost models, additive or not, monotone or not.

Costs are deterministic functions of the policy, so they are computed and never learned. At each decision the projection takes the
least compression, not below the requested level, that keeps every limit reachable: all later decisions are assumed to be those of
one policy that is feasible, the budget's *completion*. Where costs are monotone, the completion is the strongest compression.
Measured latencies are not monotone: a narrower layer may leave a kernel's fast path, and integers may be slower than floats.

Source: the action bound of AMC (He et al. 2018, arXiv:1802.03494, algorithm 1), there for one additive cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.cost_models.core import MEMORY_COSTS, InputError
from secateur.envs.core import Budget
from secateur.envs.costs import PolicyCosts

_BETTER = 1e-9  # least decrease of a slack that counts: sums of costs differ by rounding from call to call
_SAMPLE = 1024  # random policies to start from when the strongest compression leads to no feasible one
_CHOICES = 8  # levels that are tried at once where the requested level is infeasible
_AHEAD = 128  # policies of one call that looks ahead


class FeasibilityProjection:
    """Projects policies of a space onto the feasible ones of a budget.

    Args:
        costs: of the policies; a budget may limit any of them.
    """

    def __init__(self, costs: PolicyCosts):
        self.costs = costs
        self._completions: dict[Budget, np.ndarray] = {}
        self._least: dict[str, np.ndarray] = {}

    def rows(self, budgets: Sequence[Budget]) -> ProjectedRows:
        """Return the projection of a batch of policies, one per budget; every budget must be satisfiable (`check`)."""
        return ProjectedRows(self, budgets)

    def slack(self, levels: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the largest value / limit - 1 over the budget's costs, (population,); feasible when <= 0."""
        return _Limits([budget]).slack(self.costs, levels, np.zeros(len(levels), int))

    def completion(self, budget: Budget) -> np.ndarray:
        """Return the levels, (decisions,), of the policy that the projection relies on; see the module.

        It is the strongest compression or, if that leaves more room, the policy with the least of one of the limited costs
        (again the strongest compression where that cost is monotone). If none of them fits, the best of them and the best of a
        random sample are improved under all limits together, and the better one is taken.
        """
        if budget not in self._completions:
            levels, slack = self._best([self._strongest, *map(self._with_least, budget.limits)], budget)
            if slack > 0:
                sample = np.random.default_rng(0).integers(self.costs.policy_space.num_levels, size=(_SAMPLE, len(levels)))
                starts = [levels, self._best(sample, budget)[0]]
                levels, _ = self._best([levels, *(self._improved(start, budget) for start in starts)], budget)
            self._completions[budget] = levels
        return self._completions[budget]

    @property
    def _strongest(self) -> np.ndarray:
        return self.costs.policy_space.strongest

    def _best(self, policies: Sequence[np.ndarray] | np.ndarray, budget: Budget) -> tuple[np.ndarray, float]:
        """Return the levels with the least slack, and their slack; of equal ones the first."""
        slacks = self.slack(np.stack(list(policies)), budget)
        best = int(np.flatnonzero(slacks <= slacks.min() + _BETTER)[0])
        return policies[best], float(slacks[best])

    def _with_least(self, cost: str) -> np.ndarray:
        """Return the levels of the least value of one cost that is found from the strongest compression on."""
        if cost not in self._least:
            self._least[cost] = self._improved(self._strongest, Budget(cost, {cost: self.costs.dense[cost]}))
        return self._least[cost]

    def _improved(self, levels: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the levels after coordinate descent on the slack: one decision after the other, until none lowers it."""
        slack, before = float(self.slack(levels[None], budget)[0]), np.inf
        while slack < before - _BETTER:
            before = slack
            for decision, count in enumerate(self.costs.policy_space.num_levels):
                population = np.tile(levels, (count, 1))
                population[:, decision] = np.arange(count)
                slacks = self.slack(population, budget)
                if slacks.min() < slack - _BETTER:
                    levels, slack = population[slacks.argmin()], float(slacks.min())
        return levels

    def least(self, cost: str, limit: float) -> float:
        """Return the least value of one cost that is found under the limit `limit`; see `completion`."""
        levels = self.completion(Budget(f"least {cost}", {cost: limit}))
        return float(self.costs.of_levels(levels[None], [cost])[cost][0])

    def check(self, budget: Budget) -> None:
        """Raise InputError if no policy is found that keeps the budget, or if one of its costs cannot be computed."""
        uncounted = self.costs.policy_space.geometry.uncounted
        for name in budget.limits:
            if uncounted and name not in MEMORY_COSTS:
                raise InputError(
                    f"Budget '{budget.name}' limits {name}, but the multiply-accumulates of {uncounted[0]} are not known. "
                    f"Limit only {' and '.join(MEMORY_COSTS)}, or replace the operator in the model."
                )
        least = self.costs.of_levels(self.completion(budget)[None], list(budget.limits))
        for name, limit in budget.limits.items():
            if least[name][0] > limit:
                dense = self.costs.dense[name]
                raise InputError(
                    f"Budget '{budget.name}' cannot be met: it needs at least {100 * least[name][0] / dense:.3g} % of the dense "
                    f"{name} ({_figure(least[name][0])} of {_figure(dense)}), but the limit is {100 * limit / dense:.3g} %. "
                    "Raise the limit, or allow stronger compression in `space`."
                )


class ProjectedRows:
    """The projection of a batch: each row is the policy of one episode, under a budget of its own.

    Only costs that some budget limits are computed.

    Args:
        projection: of the space.
        budgets: one per row; satisfiable.
    """

    def __init__(self, projection: FeasibilityProjection, budgets: Sequence[Budget]):
        self._costs = projection.costs
        self._limits = _Limits(budgets)
        self._completions = np.array([projection.completion(budget) for budget in self._limits.distinct])

    def slack(self, levels: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return `FeasibilityProjection.slack` of levels (n, decisions), each under the budget of its row, (n,)."""
        return self._limits.slack(self._costs, levels, rows)

    def admit(self, levels: np.ndarray, decision: int, wanted: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the levels that are executed at one decision, (n,).

        Args:
            levels: (n, decisions); entries before `decision` are executed already, the others are ignored.
            decision: index of the decision.
            wanted: (n,) the requested levels.
            rows: (n,) row indices, which name the budgets.
        Returns:
            The least level >= wanted that keeps every limit reachable; if there is none (a cost that is not monotone), the
            nearest weaker one that does. The budget's completion always does: the step before has left it reachable.
        """
        admitted, start = wanted.copy(), wanted.copy()
        pending = np.arange(len(rows))
        last, chunk = self._costs.policy_space.num_levels[decision] - 1, 1
        while len(pending):  # first the requested level, then the stronger ones, a few at a time
            offered = start[pending, None] + np.arange(chunk)
            reachable = (offered <= last) & self._reachable(levels, decision, np.minimum(offered, last), rows, pending)
            found = reachable.any(axis=1)
            admitted[pending[found]] = (start[pending] + reachable.argmax(axis=1))[found]
            start += chunk
            exhausted = pending[~found & (start[pending] > last)]
            if len(exhausted):
                admitted[exhausted] = self._weaker(levels, decision, wanted, rows, exhausted)
            pending = pending[~found & (start[pending] <= last)]
            chunk = _CHOICES
        return admitted

    def _weaker(self, levels: np.ndarray, decision: int, wanted: np.ndarray, rows: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Return the nearest reachable weaker level of rows that have no stronger one, (len(which),); see `admit`."""
        offered = np.tile(np.arange(self._costs.policy_space.num_levels[decision]), (len(which), 1))
        reachable = self._reachable(levels, decision, offered, rows, which) & (offered < wanted[which, None])
        weaker = offered.shape[1] - 1 - reachable[:, ::-1].argmax(axis=1)
        # No level is left where the completion meets a limit exactly and its cost is larger by rounding this time.
        return np.where(reachable.any(axis=1), weaker, self._completions[self._limits.of_row[rows[which]], decision])

    def _reachable(
        self, levels: np.ndarray, decision: int, offered: np.ndarray, rows: np.ndarray, which: np.ndarray
    ) -> np.ndarray:
        """Return whether the limits can still be kept with each offered level, (len(which), choices) bool."""
        count, choices = offered.shape
        population = np.repeat(self._completions[self._limits.of_row[rows[which]]], choices, axis=0)
        population[:, :decision] = np.repeat(levels[which, :decision], choices, axis=0)
        population[:, decision] = offered.ravel()
        return self.slack(population, np.repeat(rows[which], choices)).reshape(count, choices) <= 0

    def project(self, levels: np.ndarray) -> np.ndarray:
        """Return the executed levels of whole episodes, (rows, decisions): `admit` at one decision after the other.

        Several decisions ahead are checked in one call, and only rows that are infeasible there are changed.
        """
        executed, rows = levels.copy(), np.arange(len(levels))
        decision, decisions = 0, levels.shape[1]
        while decision < decisions:
            ahead = min(max(_AHEAD // len(rows), 1), decisions - decision)
            infeasible = self._infeasible_ahead(executed, decision, ahead)
            if not infeasible.any():
                decision += ahead
                continue
            first = int(infeasible.any(axis=0).argmax())
            decision += first
            changed = rows[infeasible[:, first]]
            executed[changed, decision] = self.admit(executed[changed], decision, levels[changed, decision], changed)
            decision += 1
        return executed

    def _infeasible_ahead(self, levels: np.ndarray, decision: int, ahead: int) -> np.ndarray:
        """Return whether a limit is out of reach after each of the next `ahead` decisions as requested, (rows, ahead) bool."""
        count, decisions = levels.shape
        taken = np.arange(decisions) <= np.arange(decision, decision + ahead)[:, None]
        population = np.where(taken, levels[:, None], self._completions[self._limits.of_row][:, None])
        return self.slack(population.reshape(-1, decisions), np.repeat(np.arange(count), ahead)).reshape(count, ahead) > 0


class _Limits:
    """The limits of a batch of budgets as arrays; equal budgets are kept once."""

    def __init__(self, budgets: Sequence[Budget]):
        index = {budget: place for place, budget in enumerate(dict.fromkeys(budgets))}
        self.distinct = tuple(index)
        self.of_row = np.array([index[budget] for budget in budgets], int)
        self.names = tuple(dict.fromkeys(name for budget in index for name in budget.limits))
        self.values = np.array([[budget.limits.get(name, np.inf) for name in self.names] for budget in index])

    def slack(self, costs: PolicyCosts, levels: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the slack of levels (n, decisions), each under the budget of its row, (n,); -1 without limits."""
        if not self.names:
            return np.full(len(levels), -1.0)
        found = costs.of_levels(levels, self.names)
        limits = self.values[self.of_row[rows]]
        slacks: np.ndarray = np.max([found[name] / limits[:, i] - 1 for i, name in enumerate(self.names)], axis=0)
        return slacks


def _figure(cost: float) -> str:
    """Return a cost for an error text: whole multiply-accumulates and bytes, but fractions of milliseconds."""
    return f"{cost:,.0f}" if cost >= 1000 else f"{cost:.4g}"
