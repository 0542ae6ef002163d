"""Random search over feasible policies: the baseline that every agent has to beat at equal evaluations.

It is made as strong as blind search can be:

1. Every sequence is bent to the edge of its budget by `ActionSpace.scale_to_budget`. Uniform draws would mostly miss the budget;
   drawn behind the wall alone, they would leave the repair to the last layers. The edge is where accuracy is highest:
   no evaluation is spent on more compression than was asked for.
2. Half of the draws are independent in every entry, the other half lean towards a common strength per kind of choice
   (`random_sequence`). With many entries independent draws are all alike on average, so they never try more pruning and
   milder bits or the reverse: on a made-up task with 139 entries of three kinds, 200 evaluations found 70 % top-1 with
   independent draws alone, 81 % with both; with one kind of choice it makes no difference.
3. A policy that was handed out before is drawn again.
4. Budgets take turns.

Source: random search, Bergstra & Bengio 2012 (JMLR 13). That a random *feasible* policy comes close to learned ones was
observed by Intel's Distiller for AMC on ResNet-20.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateur.agents.core import SequenceActor
from secateur.envs.core import ActionSpace, Actor, Budget, CompressionPolicy, Episode, InputError


@dataclass(frozen=True)
class RandomConfig:
    """Options of random search.

    Attributes:
        redraws: how often a policy that is known already is drawn again before it is handed out all the same.
    """

    redraws: int = 20

    def __post_init__(self):
        if self.redraws < 0:
            raise InputError(f"`redraws` of random search must be 0 or more, but got {self.redraws}.")


class RandomSearch:
    """Draws feasible policies and learns nothing; see the module."""

    def __init__(self, config: RandomConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        self.config = config
        self.space = space
        self.budgets = tuple(budgets)
        self.rng = rng
        self._asked = 0
        self._known: set[tuple[str, CompressionPolicy]] = set()

    def ask(self, count: int) -> list[Actor]:
        """Return `count` actors."""
        return [self._draw() for _ in range(count)]

    def tell(self, results: Sequence[tuple[Actor, Episode]]) -> None:
        """Ignore the episodes: that is what makes it the baseline."""

    def _draw(self) -> SequenceActor:
        budget = self.budgets[self._asked % len(self.budgets)]
        for attempt in range(self.config.redraws + 1):
            wanted = random_sequence(self.space, self.rng)
            # Where the whole edge is known (a loose budget has a single policy there) look below it.
            repair = self.space.scale_to_budget if 2 * attempt <= self.config.redraws else self.space.execute
            sequence = repair(wanted, budget)
            key = budget.name, self.space.decode(sequence)
            if key not in self._known:
                break
        self._known.add(key)
        self._asked += 1
        return SequenceActor(budget, sequence, self._asked - 1)


def random_sequence(space: ActionSpace, rng: np.random.Generator) -> np.ndarray:
    """Return a sequence of random actions, (num_steps, action_dim) in [0, 1]; 0 in entries that are not used.

    Half of the sequences are independent, U(0, 1) in every entry. The others are a blend, in a random proportion, of such a
    sequence with one U(0, 1) strength for each kind of choice (each column).
    """
    actions = rng.random(space.used.shape)
    if rng.random() < 0.5:
        common = rng.random()
        actions = common * rng.random(space.action_dim) + (1 - common) * actions
    return np.where(space.used, actions, 0.0)
