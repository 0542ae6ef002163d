"""Random search over feasible policies: the baseline that every agent has to beat at equal evaluations.

It is made as strong as a search without learning can be:

1. Every sequence is scaled to its budget by `ActionSpace.scale_to_budget`. Uniform draws would mostly miss the budget; the
   feasibility projection alone would leave the repair to the last layers. Accuracy is highest at the edge of the budget: no
   evaluation is spent on more compression than the budget asks for.
2. Half of the draws are independent in every entry, the other half lean towards a common action per kind of choice
   (`random_sequence`). With many entries, the means of independent draws are all alike, so they never try more pruning with
   milder bits or the reverse: on a synthetic task with 139 entries of three kinds, 200 evaluations found 70 % top-1 with
   independent draws alone, 81 % with both; with one kind of choice there is no difference.
3. A policy that was chosen before is drawn again.
4. Budgets take turns.

Source: random search, Bergstra & Bengio 2012 (JMLR 13). Intel's Distiller observed for AMC on ResNet-20 that a random
*feasible* policy comes close to learned ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from secateur.agents.core import SequenceActor
from secateur.cost_models.core import Range, check_fields
from secateur.envs.core import ActionSpace, Actor, Budget, CompressionPolicy, Episode


@dataclass(frozen=True)
class RandomConfig:
    """Options of random search.

    Attributes:
        redraws: how often a policy that was chosen before is drawn again before it is handed out all the same.
    """

    redraws: Annotated[int, Range(least=0)] = 20

    def __post_init__(self) -> None:
        check_fields(self, "random search")


class RandomSearch:
    """Draws feasible policies and learns nothing; see the module."""

    def __init__(self, config: RandomConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        self.config = config
        self.space = space
        self.budgets = tuple(budgets)
        self.rng = rng
        self._asked = 0
        self._chosen: set[tuple[str, CompressionPolicy]] = set()

    def ask(self, count: int) -> list[SequenceActor]:
        """Return `count` actors."""
        return [self._draw() for _ in range(count)]

    def tell(self, results: Sequence[tuple[Actor, Episode]]) -> None:
        """Ignore the episodes: it learns nothing."""

    def _draw(self) -> SequenceActor:
        """Return the actor of a new feasible sequence."""
        budget = self.budgets[self._asked % len(self.budgets)]
        for attempt in range(self.config.redraws + 1):
            wanted = random_sequence(self.space, self.rng)
            # A loose budget has a single policy at its edge: when scaling finds nothing new, project only.
            repair = self.space.scale_to_budget if 2 * attempt <= self.config.redraws else self.space.execute
            sequence = repair(wanted, budget)
            key = budget.name, self.space.decode(sequence)
            if key not in self._chosen:
                break
        self._chosen.add(key)
        self._asked += 1
        return SequenceActor(budget, sequence, self._asked - 1)


def random_sequence(space: ActionSpace, rng: np.random.Generator) -> np.ndarray:
    """Return a sequence of random actions, (num_steps, action_dim) in [0, 1]; 0 in entries that are not used.

    Half of the sequences are independent, U(0, 1) in every entry. The others blend such a sequence, in a random proportion, with
    one U(0, 1) action for each kind of choice (each column).
    """
    actions = rng.random(space.used.shape)
    if rng.random() < 0.5:
        common = rng.random()
        actions = common * rng.random(space.action_dim) + (1 - common) * actions
    return np.where(space.used, actions, 0.0)
