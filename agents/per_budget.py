"""Agents made of searchers: one for each budget, which share the evaluations evenly, or one for several budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from secateur.agents.core import SequenceActor, fully_scored
from secateur.agents.pareto import Archive
from secateur.envs.core import Actor, Episode


class Searcher(Protocol):
    """Searches one budget, or several at once."""

    handed_out: int
    """Number of actors so far."""

    @property
    def ready(self) -> bool:
        """Whether `next` has an actor to give."""
        ...

    def next(self) -> SequenceActor:
        """Return the next actor."""
        ...

    def learn(self, actor: SequenceActor, episode: Episode) -> None:
        """Take back the episode of an actor, failed or not."""
        ...


class PerBudget:
    """An agent made of searchers; while one waits for its episodes, it is another's turn.

    Args:
        searchers: by the names of the budgets; the same one may serve several.
    """

    def __init__(self, searchers: Mapping[str, Searcher]):
        self.searchers = dict(searchers)
        self.archive = Archive()
        """The Pareto set of all feasible episodes, objectives = -reward."""

    def ask(self, count: int) -> list[Actor]:
        """Return at most `count` actors; fewer while every searcher waits for the rest of what it has out."""
        actors: list[Actor] = []
        while len(actors) < count and (ready := [one for one in self.searchers.values() if one.ready]):
            actors.append(min(ready, key=lambda searcher: searcher.handed_out).next())
        return actors

    def tell(self, results: Sequence[tuple[Actor, Episode]]) -> None:
        """Hand each episode to its searcher; failed ones are infinitely bad."""
        for actor, episode in results:
            self.searchers[actor.budget.name].learn(actor, episode)
            if episode.feasible and fully_scored(episode):
                self.archive.add(episode.policy, -np.asarray(episode.reward, float))
