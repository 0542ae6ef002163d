"""SPDY: dynamic programming over sensitivities, with coefficients that are searched by CMA-ES.

Every policy is the solution of

    minimize  sum over i of c_i h_i(x_i)  within the budget,  h_i = sensitivity of choice i ** power,             (1)

and the search looks for the coefficients c_i > 0 whose solution scores best. With additive costs t_i that are rounded up to
1 / buckets of what the limit leaves, dynamic programming solves (1):

    D_i(t) = min over levels a of  D_{i-1}(t - t_i(a)) + c_i h_i(a).                                              (2)

Source: Frantar & Alistarh 2022 (SPDY), arXiv:2201.13096, eqs. (2) to (4) and section 3.2, for one latency; Hansen 2016 (CMA-ES),
arXiv:1604.00772; Ros & Hansen 2008 (separable CMA-ES), through the library `cmaes`.

Where we differ and why:
1. h_i are measured sensitivities (envs/sensitivity.py). SPDY assumes a quadratic in the sparsity, and searches its coefficients
   from random ones. Here all coefficients are one in the first policy, which is near greedy's.
2. CMA-ES searches log c_i instead of the random draws and local search of SPDY. It only compares scores, so their scale is
   irrelevant. A mean of zero is its start, `spread` its first standard deviation. From `separable_from` choices on, the
   covariance is diagonal: a full one needs more evaluations than there are.
3. Several limits are combined to one cost, the sum of lambda_k cost_k / limit_k (a surrogate relaxation, Glover 1968). The
   multipliers lambda of limits that the solution exceeds grow for a few rounds.
4. Costs need not be additive: those of single changes of the best policy so far take their place, for a few rounds from the
   greedy policy on (`LevelProblem.solve`). Exact costs then move the solution to the edge of the budget, which also uses what
   the rounding in (2) leaves. Other coefficients start from the solution with coefficients of one.
5. A policy that was chosen before is drawn again. After some draws it is evaluated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from secateur.agents.allocation import LevelProblem, level_harms, measured_sensitivities
from secateur.agents.generations import GenerationSearcher, quality
from secateur.agents.per_budget import PerBudget
from secateur.cost_models.core import Count, Positive, Range, check_fields
from secateur.envs.core import ActionSpace, Budget, Episode


@dataclass(frozen=True)
class SpdyConfig:
    """Options of SPDY.

    Attributes:
        power: exponent of the sensitivities.
        buckets: number of steps of the discretized cost.
        rounds: number of linear problems of the first policy.
        later_rounds: number of linear problems of every other policy.
        multiplier_rounds: how often the multipliers of several limits are adapted in each linear problem.
        spread: first standard deviation of the log coefficients.
        population: policies per generation; 0: 4 + 3 log(choices), the default of CMA-ES.
        separable_from: number of choices from which on the covariance is diagonal.
        redraws: how often a policy that was chosen before is drawn again before it is handed out all the same.
    """

    power: Positive = 0.75
    buckets: Annotated[int, Range(least=10)] = 1000
    rounds: Count = 4
    later_rounds: Count = 1
    multiplier_rounds: Count = 6
    spread: Positive = 0.5
    population: Annotated[int, Range(least=0)] = 0
    separable_from: Count = 50
    redraws: Annotated[int, Range(least=0)] = 5

    needs_sensitivities: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, "SPDY")


class Spdy(PerBudget):
    """One `CoefficientSearch` per budget; evaluations are shared evenly. See the module."""

    def __init__(self, config: SpdyConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        harms = level_harms(space, measured_sensitivities(space, "SPDY"), config.power)
        own_rngs = rng.spawn(len(budgets))
        super().__init__(
            {
                budget.name: CoefficientSearch(config, space, budget, harms, own)
                for budget, own in zip(budgets, own_rngs, strict=True)
            }
        )


class CoefficientSearch(GenerationSearcher):
    """The coefficients of one budget.

    Attributes:
        first: levels of the solution whose coefficients are all one, (entries,).
    """

    def __init__(self, config: SpdyConfig, space: ActionSpace, budget: Budget, harms: np.ndarray, rng: np.random.Generator):
        from cmaes import CMA, SepCMA  # takes a second, and only this agent needs it

        super().__init__(space, budget)
        self.config, self.harms, self.rng = config, harms, rng
        self.problem = LevelProblem(space, budget)
        greedy = self.problem.to_edge(np.zeros_like(self.problem.last), harms)
        self.first = self.problem.solve(harms, self._solve, greedy, config.rounds)
        optimizer = SepCMA if len(harms) >= max(config.separable_from, 2) else CMA
        size = config.population or None
        self._optimizer = optimizer(np.zeros(max(len(harms), 2)), config.spread, population_size=size and max(size, 2))
        self._members: list[np.ndarray] = []

    def generation(self) -> list[np.ndarray]:
        """Return the policies of a population of coefficients; those of coefficients of one are the first of all."""
        # The optimizer's own generator is lost when it is pickled.
        self._optimizer.reseed_rng(int(self.rng.integers(2**31)))
        self._members, sequences = [], []
        if self.handed_out == 0:
            self._members.append(np.zeros(self._optimizer.dim))
            sequences.append(self.choose(self.problem.executed(self.first)))
        while len(sequences) < self._optimizer.population_size:
            for _ in range(self.config.redraws + 1):
                member = self._optimizer.ask()
                sequence = self.problem.executed(self.solution(np.exp(member[: len(self.harms)])))
                if not self.chosen(sequence):
                    break
            self._members.append(member)
            sequences.append(self.choose(sequence))
        return sequences

    def select(self, episodes: Sequence[Episode]) -> None:
        """Adapt the distribution of the coefficients to the order of the scores."""
        scores = np.array([quality(episode) for episode in episodes])
        if np.isfinite(scores).any():
            self._optimizer.tell([(member, float(-score)) for member, score in zip(self._members, scores, strict=True)])

    def solution(self, coefficients: np.ndarray) -> np.ndarray:
        """Return the levels, (entries,), that solve eq. (1) with these coefficients, (entries,)."""
        return self.problem.solve(coefficients[:, None] * self.harms, self._solve, self.first, self.config.later_rounds)

    def _solve(self, harms: np.ndarray, costs: np.ndarray, room: np.ndarray) -> np.ndarray:
        return solve_combined(harms, costs, room, self.config.buckets, self.config.multiplier_rounds)


def solve_combined(harms: np.ndarray, costs: np.ndarray, room: np.ndarray, buckets: int, rounds: int) -> np.ndarray:
    """Return levels with little harm under several linear limits, (entries,): a `LinearSolver` (agents/allocation.py).

    The limits are combined to one with multipliers on the simplex. Of the solutions that meet all limits, the one with the least
    harm is returned; if there is none, the one with the least excess.

    Args:
        harms: (entries, levels), infinite where a level must not be chosen.
        costs: (limits, entries, levels).
        room: what the costs together may use, (limits,).
        buckets: of the combined cost.
        rounds: how often the multipliers are adapted.
    """
    entries = np.arange(len(harms))
    multipliers = np.full(len(room), 1 / max(len(room), 1))
    best, best_key = np.zeros(len(harms), int), (np.inf, np.inf)
    for number in range(rounds if len(room) > 1 else 1):
        levels = solve_single(harms, np.tensordot(multipliers, costs, 1), float(multipliers @ room), buckets)
        over = costs[:, entries, levels].sum(axis=1) - room
        key = float(np.maximum(over - 1e-9, 0).sum()), float(harms[entries, levels].sum())
        if key < best_key:
            best, best_key = levels, key
        # Exponentiated subgradient with decreasing steps, in units of the largest difference.
        multipliers = multipliers * np.exp(over / max(np.abs(over).max(initial=0), 1e-12) / (1 + number / 2))
        multipliers /= multipliers.sum()
    return best


def solve_single(harms: np.ndarray, costs: np.ndarray, room: float, buckets: int) -> np.ndarray:
    """Return the levels of eq. (2), (entries,).

    Args:
        harms: (entries, levels), infinite where a level must not be chosen.
        costs: (entries, levels), of any sign.
        room: what the costs together may use. If it is too little, the levels of least cost are returned.
        buckets: number of steps of the cost; costs are rounded up to them.
    """
    costs = np.where(np.isfinite(harms), costs, np.inf)
    least = costs.min(axis=1, keepdims=True)
    left = room - least.sum()
    if left <= 0:
        return np.lexsort((harms, costs), axis=1)[:, 0]
    steps = np.minimum(np.ceil((costs - least) / left * buckets - 1e-6), buckets + 1).astype(int)
    total = np.zeros(buckets + 1)  # D of eq. (2): least harm of the entries so far that use at most t steps
    taken = np.zeros((len(harms), buckets + 1), int)
    for entry, (harm, step) in enumerate(zip(harms, steps, strict=True)):
        offers = np.full((len(harm), buckets + 1), np.inf)
        for level in np.flatnonzero(step <= buckets):
            offers[level, step[level] :] = total[: buckets + 1 - step[level]] + harm[level]
        taken[entry] = offers.argmin(axis=0)
        total = offers[taken[entry], np.arange(buckets + 1)]
    levels, place = np.zeros(len(harms), int), buckets
    for entry in reversed(range(len(harms))):
        levels[entry] = taken[entry, place]
        place -= steps[entry, levels[entry]]
    return levels
