"""What an agent is: it hands out actors and learns from their episodes."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import numpy as np

from secateur.cost_models.core import Range
from secateur.envs.core import ActionSpace, Actor, Budget, Episode, InputError

Share = Annotated[float, Range(least=0, most=1)]
"""The type of a field that is a share."""

Rate = Annotated[float, Range(above=0, most=1)]
"""The type of a field that is a rate or a factor in (0, 1]."""


class Agent(Protocol):
    """A search algorithm. Learning and swarm agents differ only in how they choose.

    The loop calls `ask` and `tell` from one thread. Episodes come back in any order and may have failed. An agent is
    made from (its config, the `ActionSpace`, the budgets, a `numpy.random.Generator`) and pickles at any time.
    What only some agents can do is declared by the protocols below.
    """

    def ask(self, count: int) -> Sequence[Actor]:
        """Return at most `count` actors; fewer, or none, while the agent waits for episodes that are still out.

        None with nothing out means that the agent has nothing more to try.
        """
        ...

    def tell(self, results: Sequence[tuple[Actor, Episode]]) -> None:
        """Learn from finished episodes, each with the very actor that `ask` gave out."""
        ...


@runtime_checkable
class UsesSensitivities(Protocol):
    """The configuration of an agent that may need `ActionSpace.sensitivities` to be measured before it is made."""

    @property
    def needs_sensitivities(self) -> bool:
        """Whether they must be measured."""
        ...


@runtime_checkable
class Saving(Protocol):
    """An agent that can be stored after a search."""

    def save(self, folder: Path) -> None:
        """Write the agent to a new folder."""
        ...


class Queryable(Protocol):
    """An agent that proposes policies for any budget and preference without any evaluation.

    Attributes:
        space: in which it searched.
        preference: that of its search, (num_objectives,) on the simplex.
        rng: every random choice; reset it to get the same proposals again.
    """

    space: ActionSpace
    preference: np.ndarray
    rng: np.random.Generator

    @property
    def learned(self) -> int:
        """Number of evaluations that it has learned from."""
        ...

    def propose(
        self, budget: Budget, preference: np.ndarray | None = None, count: int = 3, rollouts: int = 256
    ) -> list[np.ndarray]:
        """Return at most `count` different executed sequences, best first.

        Args:
            budget: satisfiable; its limits need not be any that the agent has seen.
            preference: (num_objectives,) on the simplex; None: that of the search.
            count: how many.
            rollouts: how many candidates are compared.
        """
        ...

    def predict_quality(self, sequences: np.ndarray) -> np.ndarray:
        """Return the quality that the agent expects of executed sequences, (n,) of (n, num_steps, action_dim)."""
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
    """Return whether the episode has a finite reward, even if only the first images were looked at."""
    return episode.evaluation is not None and episode.reward is not None and bool(np.isfinite(episode.reward).all())


def fully_scored(episode: Episode) -> bool:
    """Return whether the episode has a finite reward from all images: early stopped scores do not compare with the others."""
    return scored(episode) and episode.evaluation is not None and not episode.evaluation.stopped


def needs_sensitivities(config: object) -> bool:
    """Return whether the agent of this configuration needs measured sensitivities."""
    return isinstance(config, UsesSensitivities) and config.needs_sensitivities


def check_out(ticket: int, out: Container[int]) -> None:
    """Check that an episode that came back is one of those that are out.

    Raises:
        ValueError: if it is not.
    """
    if ticket not in out:
        raise ValueError(
            f"Episodes must come back once, with the actor that `ask` gave out, but ticket {ticket} is not out. Was it told "
            "twice?"
        )


def check_preference(owner: str, preference: Sequence[float]) -> None:
    """Check that a preference is made of weights >= 0 which are not all zero.

    Raises:
        InputError: if it is not.
    """
    if not (min(preference, default=0) >= 0 and 0 < sum(preference) < np.inf):
        shown = [float(weight) for weight in preference]
        raise InputError(f"`preference` of {owner} must be weights >= 0, not all zero, but got {shown}.")


def simplex(owner: str, preference: Sequence[float] | None, objectives: Sequence[str]) -> np.ndarray:
    """Return a preference scaled to a sum of 1, (num_objectives,); None: quality alone.

    Raises:
        InputError: if there is not one weight for each objective, or a weight is wrong.
    """
    weights = np.eye(len(objectives))[0] if preference is None else np.asarray(preference, float)
    if weights.shape != (len(objectives),):
        raise InputError(
            f"`preference` of {owner} must have one weight for each of {', '.join(objectives)}, but got {weights.size}."
        )
    check_preference(owner, weights.tolist())
    return weights / weights.sum()
