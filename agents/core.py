"""What an agent is: it hands out actors and learns from their episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from secateur.envs.core import Actor, Budget, Episode


class Agent(Protocol):
    """A search algorithm. Learning and swarm agents differ only in how they choose.

    The loop calls `ask` and `tell` from one thread. Episodes come back in any order and may have failed. An agent is
    made from (its config, the `ActionSpace`, the budgets, a `numpy.random.Generator`) and pickles at any time.
    """

    def ask(self, count: int) -> list[Actor]:
        """Return at most `count` actors; fewer, or none, while the agent waits for episodes that are still out.

        None with nothing out means that the agent has nothing more to try.
        """
        ...

    def tell(self, results: Sequence[tuple[Actor, Episode]]) -> None:
        """Learn from finished episodes, each with the very actor that `ask` gave out."""
        ...


@dataclass(frozen=True, eq=False)
class SequenceActor:
    """Replays a sequence of actions.

    Attributes:
        budget: of the episode.
        sequence: (num_steps, action_dim) in [0, 1].
        ticket: the agent's own number for it: it outlives pickling, unlike the identity of the object.
    """

    budget: Budget
    sequence: np.ndarray
    ticket: int

    def act(self, observation: np.ndarray, step: int) -> np.ndarray:
        """Return row `step` of the sequence, whatever is observed."""
        return self.sequence[step]


def scored(episode: Episode) -> bool:
    """Whether the episode has a finite reward, even if only the first images were looked at."""
    return episode.evaluation is not None and episode.reward is not None and bool(np.isfinite(episode.reward).all())


def fully_scored(episode: Episode) -> bool:
    """Whether it has one from all images: what was stopped early does not compare with the others."""
    return scored(episode) and not episode.evaluation.stopped
