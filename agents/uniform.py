"""Uniform compression: the same action everywhere, scaled to the budget. The simplest baseline.

With one kind of choice there is exactly one such policy per budget. With several (prune ratio, weight bits, activation
bits), the division of the compression between the kinds is free, so further evaluations try a fixed family: action
0.5 ** exponent in all entries of a kind, for every combination of exponents whose smallest is 1, most even first. Scaling
to the budget changes all actions together, so each combination stands for one ratio between the kinds. Equal policies are
handed out once. When the family is used up the agent has nothing more to try: `ask` returns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from secateur.agents.fixed import FixedPolicies
from secateur.cost_models.core import Count, check_fields
from secateur.envs.core import ActionSpace, Budget


@dataclass(frozen=True)
class UniformConfig:
    """Options of uniform compression.

    Attributes:
        exponents: number of exponents that each kind of choice tries: 1, sqrt(2), 2 ... The seventh is 8: nearly no compression.
    """

    exponents: Count = 7

    def __post_init__(self) -> None:
        check_fields(self, "the uniform baseline")


class Uniform(FixedPolicies):
    """The uniform policies of every budget; see the module. It draws nothing at random."""

    def __init__(self, config: UniformConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        super().__init__(space, budgets, uniform_family(space, config.exponents))

    def sequence(self, recipe: np.ndarray, budget: Budget) -> np.ndarray:
        """Return a sequence of the family, scaled to the budget."""
        return self.space.scale_to_budget(recipe, budget)


def uniform_family(space: ActionSpace, exponents: int) -> list[np.ndarray]:
    """Return sequences that are constant within each kind of choice, most even first; see the module."""
    kinds = np.flatnonzero(space.used.any(axis=0))
    choices = np.array([c for c in product(range(exponents), repeat=len(kinds)) if min(c) == 0])
    family = []
    for choice in choices[np.argsort(choices.sum(axis=1), kind="stable")]:
        actions = np.zeros(space.action_dim)
        actions[kinds] = 0.5 ** (2 ** (choice / 2))
        family.append(np.where(space.used, actions, 0.0))
    return family
