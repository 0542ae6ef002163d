"""Integer program: the levels of least harm under all limits at once, by branch and bound.

With z_ia in {0, 1} for each level a of each choice i,

    minimize   sum over i, a of h_i(a) z_ia,  h_i = sensitivity of choice i ** power                              (1)
    such that  sum over a of z_ia = 1                            for every choice i                               (2)
               sum over i, a of t_kia z_ia <= limit_k            for every limited cost k.                        (3)

Source: Yao et al. 2021 (HAWQ-v3), arXiv:2011.10680, section 3.3: bit-widths under limits of size, BOPS and latency, each the sum
over the layers. Solved by HiGHS (Huangfu & Hall 2018) through `scipy.optimize.milp`.

Where we differ and why:
1. Widths are chosen too. Costs are then not additive: t_kia are those of single changes of the best policy so far, for a few
   rounds from the greedy policy on (`LevelProblem.solve`). The solution is moved to the edge of the budget by exact costs.
2. h_i are measured sensitivities (envs/sensitivity.py) instead of traces of the Hessian times squared rounding errors.
3. A small power makes only the order of the sensitivities count, a large one only the largest of them. The powers of the greedy
   baseline are tried in turn, one policy per budget each.
4. HiGHS stops by a gap and a number of nodes, not by time, so that results do not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from secateur.agents.allocation import LevelProblem, level_harms, measured_sensitivities
from secateur.agents.fixed import FixedPolicies
from secateur.agents.greedy import GreedyConfig
from secateur.cost_models.core import Count, Range, check_fields
from secateur.envs.core import ActionSpace, Budget, InputError


@dataclass(frozen=True)
class IntegerProgramConfig:
    """Options of the integer program.

    Attributes:
        powers: of the sensitivities in eq. (1), one policy per budget each.
        rounds: number of programs of each policy; one is exact if costs are additive.
        gap: relative distance to the optimum at which the solver stops.
        nodes: of its branch and bound, at most.
    """

    powers: Annotated[tuple[float, ...], Range(above=0)] = GreedyConfig.powers
    rounds: Count = 4
    gap: Annotated[float, Range(least=0, most=1)] = 1e-4
    nodes: Count = 1000

    needs_sensitivities: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, "the integer program")
        if not self.powers:
            raise InputError("`powers` of the integer program must be at least one number, but got none.")


class IntegerProgram(FixedPolicies):
    """The programs' policies of every budget; see the module. It draws nothing at random."""

    def __init__(self, config: IntegerProgramConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        self.config = config
        self._sensitivities = measured_sensitivities(space, "The integer program")
        super().__init__(space, budgets, config.powers)

    def sequence(self, recipe: float, budget: Budget) -> np.ndarray:
        """Return the solution with this power of the sensitivities, executed."""
        problem, harms = LevelProblem(self.space, budget), level_harms(self.space, self._sensitivities, recipe)
        greedy = problem.to_edge(np.zeros_like(problem.last), harms)
        return problem.executed(problem.solve(harms, self._solve, greedy, self.config.rounds))

    def _solve(self, harms: np.ndarray, costs: np.ndarray, room: np.ndarray) -> np.ndarray | None:
        return solve_program(harms, costs, room, self.config.gap, self.config.nodes)


def solve_program(
    harms: np.ndarray, costs: np.ndarray, room: np.ndarray, gap: float = 0.0, nodes: int = 100_000
) -> np.ndarray | None:
    """Return the levels of eqs. (1) to (3), (entries,): a `LinearSolver` (agents/allocation.py); None: none was found.

    Args:
        harms: (entries, levels), infinite where a level must not be chosen.
        costs: (limits, entries, levels).
        room: what the costs together may use, (limits,).
        gap: relative distance to the optimum at which the solver stops.
        nodes: of its branch and bound, at most.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes a third of a second, and only this agent needs it
    from scipy.sparse import csr_array

    entries, levels = np.nonzero(np.isfinite(harms))
    count, objective = len(entries), harms[entries, levels]
    constraints = [LinearConstraint(csr_array((np.ones(count), (entries, np.arange(count)))), 1, 1)]  # eq. (2)
    if len(room):
        constraints.append(LinearConstraint(costs[:, entries, levels], -np.inf, room))  # eq. (3)
    found = milp(
        objective / max(objective.max(), 1e-12),
        integrality=np.ones(count, int),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": gap, "node_limit": nodes},
    )
    if found.x is None:
        return None
    shares = np.full(harms.shape, -1.0)
    shares[entries, levels] = found.x
    return shares.argmax(axis=1)
