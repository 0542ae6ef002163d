"""What the agent remembers: finished episodes, the budgets that it practices, and planned transitions with their targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.envs.core import ActionSpace, Budget


@dataclass(frozen=True, eq=False)
class Memory:
    """A finished episode.

    Attributes:
        sequence: executed actions, (num_steps, action_dim).
        observations: (num_steps + 1, observation_dim), under its own budget.
        reward: (num_objectives,), raw.
        budgets: indices of the training budgets under which the environment would have executed the same; its own is the first.
        preference: (num_objectives,) for which it was chosen.
        feasible: whether it met all constraints of its own budget.
    """

    sequence: np.ndarray
    observations: np.ndarray
    reward: np.ndarray
    budgets: np.ndarray
    preference: np.ndarray
    feasible: bool = True


@dataclass(frozen=True, eq=False)
class Choice:
    """What is evaluated, and for what.

    Attributes:
        budget: index of the named budget of its episode.
        preference: for which it was chosen, (num_objectives,) on the simplex.
        sequence: (num_steps, action_dim) in [0, 1].
    """

    budget: int
    preference: np.ndarray
    sequence: np.ndarray


def sample_preferences(rng: np.random.Generator, count: int, objectives: int) -> np.ndarray:
    """Return preferences, (count, objectives): |z| / |z|_1 with z normal (Yang et al. 2019)."""
    drawn = np.abs(rng.normal(size=(count, objectives)))
    return drawn / drawn.sum(axis=1, keepdims=True)


def tighter_budgets(space: ActionSpace, budgets: Sequence[Budget], count: int, rng: np.random.Generator) -> list[Budget]:
    """Return `count` budgets per given one, with every limit somewhere between the least cost and the given limit.

    The policy with the most compression that is feasible meets all of them, so they are satisfiable. Half of them tighten all
    limits by the same share.
    """
    strongest = space.simulate(lambda observations, *_: np.ones((len(observations), space.action_dim)), budgets)
    found = []
    for budget, costs in zip(budgets, strongest.costs, strict=True):
        least = dict(zip(space.objectives[1:], costs, strict=True))
        for i in range(count):
            # Policies near the least cost are of little use, so the upper part is drawn more often.
            share = 1 - 0.9 * rng.random(len(budget.limits)) ** 1.5
            if i % 2:
                share[:] = share[:1]
            limits = {}
            for (name, limit), s in zip(budget.limits.items(), share, strict=True):
                low = min(least[name] * space.dense_costs[name] * (1 + 1e-9), limit) if name in least else limit
                limits[name] = float(low + s * (limit - low))
            found.append(Budget(budget.name, limits))
    return found


def meets(space: ActionSpace, reward: np.ndarray, budget: Budget) -> bool:
    """Return whether a policy with this reward meets the budget, as far as the budget limits objectives."""
    shares = dict(zip(space.objectives[1:], -reward[1:], strict=True))
    return all(shares.get(name, 0.0) * space.dense_costs[name] <= limit for name, limit in budget.limits.items())


def executes_unchanged(space: ActionSpace, sequence: np.ndarray, budget: Budget) -> bool:
    """Return whether the environment would execute this sequence under the budget: it is an episode of that budget too."""
    return np.array_equal(np.asarray(space.execute(sequence, budget), np.float32), np.asarray(sequence, np.float32))


class Pool:
    """A ring of planned transitions: tensors with a row for each; the oldest go first."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def add(self, **columns: Tensor) -> None:
        """Append rows."""
        for name, values in columns.items():
            old = self.columns.get(name)
            self.columns[name] = (values if old is None else torch.cat([old, values]))[-self.capacity :].clone()

    def sample(self, rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        """Return `count` random rows."""
        chosen = torch.from_numpy(rng.integers(len(self), size=count))
        return {name: values[chosen] for name, values in self.columns.items()}
