"""Greedy allocation by sensitivities: every step of compression is the one with the least harm per saving.

Let d_i(a) be the divergence of the outputs when choice i alone has action a (envs/sensitivity.py). Start without compression and

    take the step of one choice with the least  (d_i(a') ** p - d_i(a) ** p) / saving,                             (1)

where the saving is the reduction of the costs that still exceed the budget, each as a share of its limit. When all limits are
met, single levels are undone where that helps most, as long as the limits are still met.

Source: marginal analysis, Fox 1966 (Operations Research 14), on sensitivities that are added up as in ZeroQ (Cai et al. 2020) and
HAWQ-V2 (Dong et al. 2020), for costs that need not be additive: they are computed again after each step. A small p makes only
the order of the d_i count, a large p only the largest of them: 0.75 predicts top-1 best, other powers are tried after it. Nothing
is learned from evaluations: a baseline for agents that learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from secateur.agents.allocation import LevelProblem, level_harms, measured_sensitivities
from secateur.agents.fixed import FixedPolicies
from secateur.cost_models.core import Range, check_fields
from secateur.envs.core import ActionSpace, Budget, InputError, Sensitivities


@dataclass(frozen=True)
class GreedyConfig:
    """Options of the greedy allocation.

    Attributes:
        powers: p of eq. (1), one policy per budget each.
    """

    powers: Annotated[tuple[float, ...], Range(above=0)] = (0.75, 1.0, 0.5, 0.85, 0.65, 1.5)

    needs_sensitivities: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, "the greedy baseline")
        if not self.powers:
            raise InputError("`powers` of the greedy baseline must be at least one number, but got none.")


class Greedy(FixedPolicies):
    """The greedy policies of every budget; see the module. It draws nothing at random."""

    def __init__(self, config: GreedyConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        self._sensitivities = measured_sensitivities(space, "The greedy allocation")
        super().__init__(space, budgets, config.powers)

    def sequence(self, recipe: float, budget: Budget) -> np.ndarray:
        """Return the greedy sequence with this power of the divergences."""
        return allocate(self.space, self._sensitivities, budget, recipe)


def allocate(space: ActionSpace, sensitivities: Sensitivities, budget: Budget, power: float) -> np.ndarray:
    """Return the greedy sequence, (num_steps, action_dim), executed; see the module.

    Args:
        space: of the choices.
        sensitivities: of all choices.
        budget: satisfiable; costs that are not among the objectives are left to the feasibility projection.
        power: of the divergences.
    """
    problem, harms = LevelProblem(space, budget), level_harms(space, sensitivities, power)
    return problem.executed(problem.to_edge(np.zeros_like(problem.last), harms))
