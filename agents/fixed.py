"""Agents whose policies are fixed before the search: each is handed out once, and nothing is learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from secateur.agents.core import SequenceActor
from secateur.envs.core import ActionSpace, Actor, Budget, CompressionPolicy, Episode


class FixedPolicies(ABC):
    """Hands out one policy per recipe and budget, budgets in turn; equal policies once.

    Args:
        space: of the choices.
        budgets: of the search.
        recipes: from which `sequence` makes policies, best first.
    """

    def __init__(self, space: ActionSpace, budgets: Sequence[Budget], recipes: Iterable[Any]):
        self.space = space
        self._waiting = [(budget, recipe) for recipe in recipes for budget in budgets]
        self._asked = 0
        self._chosen: set[tuple[str, CompressionPolicy]] = set()

    @abstractmethod
    def sequence(self, recipe: Any, budget: Budget) -> np.ndarray:
        """Return the executed sequence of a recipe, (num_steps, action_dim)."""

    def ask(self, count: int) -> list[SequenceActor]:
        """Return at most `count` actors; none when the recipes are used up."""
        actors: list[SequenceActor] = []
        while self._waiting and len(actors) < count:
            budget, recipe = self._waiting.pop(0)
            sequence = self.sequence(recipe, budget)
            key = budget.name, self.space.decode(sequence)
            if key not in self._chosen:
                self._chosen.add(key)
                actors.append(SequenceActor(budget, sequence, self._asked))
                self._asked += 1
        return actors

    def tell(self, results: Sequence[tuple[Actor, Episode]]) -> None:
        """Ignore the episodes."""
        return
