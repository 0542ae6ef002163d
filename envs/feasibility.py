"""The wall: budgets that hold by construction, for any number of cost models, additive or not, monotone or not.

Costs are deterministic functions of the policy, so they are computed and never learned. At each decision the wall finds the
least compression, not below what was asked, that still leaves every limit reachable: when all later decisions are those of
one policy that is known to fit, the budget's completion. It is the strongest compression where costs are monotone. Measured
latencies are not: a narrower layer may fall off a kernel's fast path, and integers may be slower than floats.
Source: the action wall of AMC (He et al. 2018, arXiv:1802.03494, algorithm 1), there for one additive cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.cost_models.core import CostModel, InputError
from secateur.envs.core import Act, Budget, CompressionPolicy, Sensitivities, Simulation
from secateur.envs.policy_space import PolicySpace

_BETTER = 1e-9  # what a slack must fall by to count: sums of costs differ by rounding from call to call
_SAMPLE = 1024  # policies to start from when the strongest compression leads to none that fits
_BENDS = 48  # exponents tried at once by `fit`; two rounds narrow the edge to 1 part in 2,000


class FeasibleSpace:
    """A policy space behind its wall: an `ActionSpace` (envs/core.py) for any budget over the given costs.

    Args:
        space: the decisions.
        cost_models: {name: model}; a budget may limit any of them.
        objectives: names of the reward's components, "top1" first, then costs.
        dense_top1: top-1 of the untouched model on the validation split.
        observation_dim: of the environment that this space belongs to.

    `unit_magnitudes` (see `ActionSpace`) are all alike until they are set, and `sensitivities` None: costs need no weights.
    """

    def __init__(
        self,
        policy_space: PolicySpace,
        cost_models: Mapping[str, CostModel],
        objectives: Sequence[str],
        dense_top1: float,
        observation_dim: int,
    ):
        self.policy_space = policy_space
        self.cost_models = dict(cost_models)
        self.objectives = tuple(objectives)
        self.dense_top1 = dense_top1
        self.observation_dim = observation_dim
        self.num_steps, self.action_dim, self.used = policy_space.num_steps, policy_space.action_dim, policy_space.used
        geometry = policy_space.geometry
        self.level_actions = tuple(decision.actions for decision in policy_space.decisions)
        self.unit_magnitudes = tuple(np.ones(units) for units in geometry.group_units)
        self.sensitivities: Sensitivities | None = None
        macs = geometry.shapes().weights[0] * geometry.macs_per_weight
        produces = geometry.out_per_unit > 0
        self.producer_macs = produces @ macs / np.maximum(produces.sum(axis=1), 1)
        self.dense_costs = {name: float(model.total(geometry.shapes())[0]) for name, model in self.cost_models.items()}
        self._completions: dict[tuple[tuple[str, float], ...], np.ndarray] = {}
        self._least: dict[str, np.ndarray] = {}

    def costs(self, levels: np.ndarray, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Return {cost: (population,)} of levels (population, decisions)."""
        shapes = self.policy_space.shapes(levels)
        return {name: self.cost_models[name].total(shapes) for name in names or self.cost_models}

    def policy_costs(self, policy: CompressionPolicy) -> dict[str, float]:
        """Return the value of every cost model for one policy."""
        shapes = self.policy_space.geometry.shapes(policy.widths, policy.weight_bits, policy.activation_bits)
        return {name: float(model.total(shapes)[0]) for name, model in self.cost_models.items()}

    def slack(self, levels: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the largest value / limit - 1 over the budget's costs, (population,); feasible when <= 0."""
        if not budget.limits:
            return np.full(len(levels), -1.0)
        costs = self.costs(levels, list(budget.limits))
        return np.max([costs[name] / limit - 1 for name, limit in budget.limits.items()], axis=0)

    def completion(self, budget: Budget) -> np.ndarray:
        """Return the levels, (decisions,), of the policy that the wall relies on; see the module.

        It is the strongest compression or, if that leaves more room, the policy with the least of one of the limited costs:
        of monotone costs the strongest compression again. If none of them fits, the best is improved under all limits
        together, and so is the best of a sample of policies.
        """
        limits = tuple(budget.limits.items())
        if limits not in self._completions:
            levels, slack = self._best([self.policy_space.strongest, *map(self._with_least, budget.limits)], budget)
            if slack > 0:
                sample = np.random.default_rng(0).integers(self.policy_space.num_levels, size=(_SAMPLE, len(levels)))
                starts = [levels, self._best(sample, budget)[0]]
                levels, _ = self._best([levels, *(self._improved(start, budget) for start in starts)], budget)
            self._completions[limits] = levels
        return self._completions[limits]

    def _best(self, policies: Sequence[np.ndarray], budget: Budget) -> tuple[np.ndarray, float]:
        """Return the levels with the least slack, and their slack; the first ones unless others are better."""
        slacks = self.slack(np.stack(list(policies)), budget)
        best = int(np.flatnonzero(slacks <= slacks.min() + _BETTER)[0])
        return policies[best], slacks[best]

    def _with_least(self, cost: str) -> np.ndarray:
        """Return the levels of the least value of one cost that is found from the strongest compression on."""
        if cost not in self._least:
            self._least[cost] = self._improved(self.policy_space.strongest, Budget(cost, {cost: self.dense_costs[cost]}))
        return self._least[cost]

    def _improved(self, levels: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the levels after one decision after the other has taken the level of least slack, until none lowers it."""
        slack, before = self.slack(levels[None], budget)[0], np.inf
        while slack < before - _BETTER:
            before = slack
            for decision, count in enumerate(self.policy_space.num_levels):
                population = np.tile(levels, (count, 1))
                population[:, decision] = np.arange(count)
                slacks = self.slack(population, budget)
                if slacks.min() < slack - _BETTER:
                    levels, slack = population[slacks.argmin()], slacks.min()
        return levels

    def least(self, cost: str, limit: float) -> float:
        """Return the least value of one cost that is found when `limit` is to be kept; see `completion`."""
        levels = self.completion(Budget(f"least {cost}", {cost: limit}))
        return float(self.costs(levels[None], [cost])[cost][0])

    def check(self, budget: Budget) -> None:
        """Raise InputError if no policy is found that keeps the budget."""
        least = self.costs(self.completion(budget)[None], list(budget.limits))
        for name, limit in budget.limits.items():
            if least[name][0] > limit:
                dense = self.dense_costs[name]
                raise InputError(
                    f"Budget '{budget.name}' cannot be met: it needs at least {100 * least[name][0] / dense:.3g} % of the dense "
                    f"{name} ({_figure(least[name][0])} of {_figure(dense)}), but asks for {100 * limit / dense:.3g} %. Raise "
                    "the limit, or allow stronger compression in `space`."
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
            nearest weaker one that does. Some level always does: the budget's completion, which the step before has left open.
        """
        choices = np.arange(self.policy_space.num_levels[decision])
        population = np.tile(self.completion(budget), (len(choices), 1))
        population[:, :decision] = levels[:decision]
        population[:, decision] = choices
        reachable = self.slack(population, budget) <= 0
        stronger = np.flatnonzero(reachable[wanted:])
        if len(stronger):
            return int(wanted + stronger[0])
        weaker = np.flatnonzero(reachable[:wanted])
        # None at all: the completion meets the limit exactly, and its cost has come out larger by rounding this time.
        return int(weaker[-1] if len(weaker) else self.completion(budget)[decision])

    def walk(self, levels: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the executed levels of a whole episode, (decisions,): `admit` at one decision after the other.

        All decisions up to the next one that the wall changes are checked in one call.
        """
        executed, decisions, completion = np.array(levels), len(levels), self.completion(budget)
        start = 0
        while start < decisions:
            taken = np.arange(decisions) <= np.arange(start, decisions)[:, None]  # row d: decisions 0..d as they are
            blocked = np.flatnonzero(self.slack(np.where(taken, executed, completion), budget) > 0)
            if not len(blocked):
                break
            start += int(blocked[0])
            executed[start] = self.admit(executed, start, int(levels[start]), budget)
            start += 1
        return executed

    def execute(self, sequence: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the sequence that the environment would execute (see `ActionSpace`)."""
        return self.policy_space.sequence(self.walk(self.policy_space.snap(sequence), budget))

    def scale_to_budget(self, sequence: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the sequence bent to the edge of the budget, then executed.

        Every strength s becomes s ** p with one exponent p for all: p > 1 weakens, p < 1 strengthens, and the order of the
        actions is kept. The largest p that is feasible is taken.
        """
        actions = np.clip(sequence, 0.005, 0.995)  # 0 and 1 would not move
        low, high = -7.0, 7.0  # log2 of the exponent
        for _ in range(2):
            exponents = np.linspace(low, high, _BENDS)
            population = self.policy_space.snap(actions[None] ** (2.0**exponents)[:, None, None])
            feasible = np.flatnonzero(self.slack(population, budget) <= 0)
            best = feasible[-1] if len(feasible) else 0
            low, high = exponents[best], exponents[min(best + 1, _BENDS - 1)]
        return self.policy_space.sequence(self.walk(population[best], budget))

    def with_prune_ratios(self, sequence: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        """Return the sequence with the levels nearest to these prune ratios, (groups,); see `ActionSpace`."""
        levels = self.policy_space.snap(sequence)
        for index, decision in enumerate(self.policy_space.decisions):
            if decision.kind == "prune_ratio":
                levels[index] = np.abs(np.array(decision.values) - ratios[decision.target]).argmin()
        return self.policy_space.sequence(levels)

    def decode(self, sequence: np.ndarray) -> CompressionPolicy:
        """Return the policy of an executed sequence."""
        return self.policy_space.policy(self.policy_space.snap(sequence))

    def simulate(
        self, act: Act, budgets: Sequence[Budget], sequences: np.ndarray | None = None, starts: np.ndarray | None = None
    ) -> Simulation:
        """Return what the environment would execute, observe and spend (see `ActionSpace`)."""
        from secateur.envs.planning import simulate

        return simulate(self, act, budgets, sequences, starts)

    def scale_all_to_budgets(self, sequences: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
        """Return `fit` of many sequences, one budget each (see `ActionSpace`)."""
        from secateur.envs.planning import scale_all_to_budgets

        return scale_all_to_budgets(self, sequences, budgets)

    def cost_shares(self, sequences: np.ndarray) -> np.ndarray:
        """Return the costs among the objectives of executed sequences by the dense ones (see `ActionSpace`)."""
        costs = self.costs(self.policy_space.snap(sequences), self.objectives[1:])
        return np.stack([costs[name] / self.dense_costs[name] for name in self.objectives[1:]], axis=1)

    def with_limits(self, observations: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
        """Return the observations of the same states under other budgets (see `ActionSpace`)."""
        from secateur.envs.observation import Observer

        observer = Observer(self)
        columns = [index for index, name in enumerate(observer.names) if name.startswith("limit_")]
        changed = np.array(observations, np.float32)
        changed[..., columns] = np.clip(observer.limits(budgets), 0, 1)
        return changed


def _figure(cost: float) -> str:
    """Return a cost as an error names it: whole multiply-accumulates and bytes, but fractions of milliseconds."""
    return f"{cost:,.0f}" if cost >= 1000 else f"{cost:.4g}"
