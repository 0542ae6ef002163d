"""Agents made of searchers: one for each budget, which share the evaluations evenly, or one for all budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from secateur.agents.core import SequenceActor
from secateur.envs.core import Actor, Episode


class Searcher(Protocol):
    """Searches one budget, or several at once."""

    handed_out: int
    """Number of actors that it gave out."""

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
    """An agent made of searchers: while one waits for its episodes, others have their turns.

    Args:
        searchers: by the names of the budgets; the same one may serve several.
    """

    def __init__(self, searchers: Mapping[str, Searcher]):
        self.searchers = dict(searchers)

    def ask(self, count: int) -> list[SequenceActor]:
        """Return at most `count` actors; fewer while every searcher waits for episodes that are out."""
        actors: list[SequenceActor] = []
        while len(actors) < count and (ready := [one for one in self.searchers.values() if one.ready]):
            actors.append(min(ready, key=lambda searcher: searcher.handed_out).next())
        return actors

    def tell(self, results: Sequence[tuple[Actor, Episode]]) -> None:
        """Hand each episode to the searcher that chose it."""
        for actor, episode in results:
            assert isinstance(actor, SequenceActor)
            self.searchers[actor.budget.name].learn(actor, episode)
