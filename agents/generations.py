"""Searchers that work in generations: evaluations run in parallel, and their order changes nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from secateur.agents.core import SequenceActor, check_out, fully_scored
from secateur.envs.core import ActionSpace, Budget, CompressionPolicy, Episode


class GenerationSearcher(ABC):
    """A `Searcher` (agents/per_budget.py) that learns when a whole generation is back, in the order in which it was handed out.

    Args:
        space: of the choices.
        budgets: of its policies, which take turns.
    """

    def __init__(self, space: ActionSpace, *budgets: Budget):
        self.space, self.budgets = space, budgets
        self.handed_out = 0
        self._waiting: list[np.ndarray] = []
        self._out: set[int] = set()
        self._back: dict[int, Episode] = {}
        self._chosen: set[CompressionPolicy] = set()

    @abstractmethod
    def generation(self) -> list[np.ndarray]:
        """Return the executed sequences of the next generation, at least one."""

    @abstractmethod
    def select(self, episodes: Sequence[Episode]) -> None:
        """Learn from the episodes of a generation, in the order of its sequences."""

    @property
    def budget(self) -> Budget:
        """The first budget, or the only one."""
        return self.budgets[0]

    def budget_of(self, ticket: int) -> Budget:
        """Return the budget of the policy that is handed out as number `ticket`."""
        return self.budgets[ticket % len(self.budgets)]

    @property
    def ready(self) -> bool:
        """Whether `next` has an actor to give: the generation has members left, or it is over."""
        return bool(self._waiting) or not self._out

    def next(self) -> SequenceActor:
        """Return the next member of the generation."""
        if not self._waiting:
            self._waiting = self.generation()
        actor = SequenceActor(self.budget_of(self.handed_out), self._waiting.pop(0), self.handed_out)
        self._out.add(actor.ticket)
        self.handed_out += 1
        return actor

    def learn(self, actor: SequenceActor, episode: Episode) -> None:
        """Keep an episode; learn from the generation when it is the last one.

        Raises:
            ValueError: if the actor is not out.
        """
        check_out(actor.ticket, self._out)
        self._out.remove(actor.ticket)
        self._back[actor.ticket] = episode
        if not self._waiting and not self._out:
            back, self._back = self._back, {}
            self.select([back[ticket] for ticket in sorted(back)])

    def chosen(self, sequence: np.ndarray) -> bool:
        """Return whether the policy of an executed sequence was chosen before."""
        return self.space.decode(sequence) in self._chosen

    def new_sequence(self, draw: Callable[[], np.ndarray], attempts: int) -> np.ndarray | None:
        """Return the first executed sequence of some draws whose policy was not chosen before; None if all were."""
        for _ in range(attempts):
            sequence = draw()
            if not self.chosen(sequence):
                return sequence
        return None

    def choose(self, sequence: np.ndarray) -> np.ndarray:
        """Return the executed sequence; from now on `new_sequence` avoids its policy."""
        self._chosen.add(self.space.decode(sequence))
        return sequence


def quality(episode: Episode) -> float:
    """Return the first component of the reward; minus infinity if the episode failed or was stopped early."""
    return float(episode.reward[0]) if fully_scored(episode) and episode.reward is not None else -np.inf
