"""EvoPress: an elitist (1 + lambda) evolution of one policy per budget by level switches.

Each generation mutates the parent lambda times. With s the number of switches of a mutation,

    s = min(u_1, u_2),  u_1, u_2 ~ U{1, 2, 3};                                                                    (1)

s choices are compressed by a step, s others are relieved by a step, and the costs stay at the limits. The best of the parent
and its offspring is the next parent.

Source: Sieberling, Kuznedelev, Kurtic & Alistarh 2024 (EvoPress), arXiv:2410.14649: level-switch mutation, eq. (1), elitism.

Where we differ and why:
1. The parent of the first generation is the greedy policy (agents/greedy.py); EvoPress starts at the uniform one. Sensitivities
   are cheap beside evaluations.
2. EvoPress's levels cost the same in all layers, so that a switch keeps the budget exactly. Here costs differ, need not be
   additive, and several are limited at once. They are exact and cheap, so they are computed for batches of levels: compressed
   choices are compressed further, by single levels, until all limits are met. Then single levels are undone where room is left,
   relieved choices first, in random order.
3. A step is a share of a choice's levels: a single width of a wide layer changes nothing that can be measured.
4. Choices of different kinds (prune ratio, bits) may be switched, because the division between them is free. Only choices whose
   compression lowers a limited cost are compressed.
5. No multi-step selection: EvoPress scores all offspring on little data and the best of them on more. An evaluation here has one
   score. Instead several mutations are drawn for each offspring, and the one with the least sum of sensitivities ** power is
   evaluated. `candidates: 1` turns that off.
6. lambda is smaller: tens of evaluations per budget instead of thousands.
7. An offspring that scores as high as its parent replaces it, so that plateaus of a score that counts images are crossed.
8. No policy is evaluated twice while new ones are found; when the neighborhood is used up, a random policy is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from secateur.agents.allocation import LevelProblem, level_harms, measured_sensitivities, single_changes
from secateur.agents.core import Rate
from secateur.agents.generations import GenerationSearcher, quality
from secateur.agents.per_budget import PerBudget
from secateur.agents.random_search import random_sequence
from secateur.cost_models.core import Count, Positive, Range, check_fields
from secateur.envs.core import ActionSpace, Budget, Episode

MOST_SWITCHES = 3
"""Largest u of eq. (1)."""


@dataclass(frozen=True)
class EvoPressConfig:
    """Options of EvoPress.

    Attributes:
        offspring: lambda, per generation and budget.
        step: share of a choice's levels that a switch changes; at least one level.
        candidates: mutations that are drawn for each offspring; the one with the least predicted harm is evaluated.
        power: exponent of the sensitivities, of the first parent and of the predicted harm.
        redraws: how often a policy that was chosen before is drawn again before a random one is tried.
    """

    offspring: Count = 5
    step: Rate = 0.125
    candidates: Count = 4
    power: Positive = 0.75
    redraws: Annotated[int, Range(least=0)] = 20

    needs_sensitivities: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, "EvoPress")


class EvoPress(PerBudget):
    """One `Lineage` per budget; evaluations are shared evenly. See the module."""

    def __init__(self, config: EvoPressConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        harms = level_harms(space, measured_sensitivities(space, "EvoPress"), config.power)
        own_rngs = rng.spawn(len(budgets))
        super().__init__(
            {budget.name: Lineage(config, space, budget, harms, own) for budget, own in zip(budgets, own_rngs, strict=True)}
        )


class Lineage(GenerationSearcher):
    """The parent of one budget and its offspring.

    Attributes:
        parent: its levels, (entries,).
        score: its quality.
    """

    def __init__(self, config: EvoPressConfig, space: ActionSpace, budget: Budget, harms: np.ndarray, rng: np.random.Generator):
        super().__init__(space, budget)
        self.config, self.harms, self.rng = config, harms, rng
        self.problem = LevelProblem(space, budget)
        self.parent = self.problem.to_edge(np.zeros_like(self.problem.last), harms)
        self.score = -np.inf
        self._steps = np.maximum(1, np.round(config.step * self.problem.last)).astype(int)
        self._members: list[np.ndarray] = []

    def generation(self) -> list[np.ndarray]:
        """Return the next offspring; the first generation holds the greedy policy too."""
        first = [self.choose(self.problem.executed(self.parent))] if self.handed_out == 0 else []
        self._members = first + [self.choose(self._offspring()) for _ in range(self.config.offspring - len(first))]
        return list(self._members)

    def select(self, episodes: Sequence[Episode]) -> None:
        """Make the best member the parent if it is not worse."""
        scores = [quality(episode) for episode in episodes]
        best = int(np.argmax(scores))
        if np.isfinite(scores[best]) and scores[best] >= self.score:
            self.parent, self.score = self.problem.levels(self._members[best]), scores[best]

    def _offspring(self) -> np.ndarray:
        """Return the executed sequence of the mutation with the least predicted harm; a random one if no mutation is new."""
        drawn: list[np.ndarray] = []
        for _ in range(self.config.candidates):
            sequence = self.new_sequence(self._mutation, self.config.redraws + 1)
            if sequence is None:
                break
            drawn.append(sequence)
        if not drawn:
            sequence = self.new_sequence(self._random, self.config.redraws + 1)
            return self._random() if sequence is None else sequence
        entries = np.arange(len(self.parent))
        return min(drawn, key=lambda sequence: self.harms[entries, self.problem.levels(sequence)].sum())

    def _mutation(self) -> np.ndarray:
        return self.problem.executed(self.mutate(self.parent))

    def _random(self) -> np.ndarray:
        return self.space.scale_to_budget(random_sequence(self.space, self.rng), self.budget)

    def mutate(self, levels: np.ndarray) -> np.ndarray:
        """Return the levels after some switches, (entries,), at the edge of the budget."""
        count = int(self.rng.integers(1, MOST_SWITCHES, size=2, endpoint=True).min())  # eq. (1)
        raised = self._draw(self._savers(levels), count)
        lowered = self._draw((levels > 0) & ~raised, count)
        moved = np.where(raised, np.minimum(levels + self._steps, self.problem.last), levels)
        moved = np.where(lowered, np.maximum(levels - self._steps, 0), moved)
        moved = self._pay(moved, raised)
        if self.problem.excess(moved[None])[0] > 0:
            moved = self._pay(moved, ~lowered & self._savers(moved))
        if self.problem.excess(moved[None])[0] > 0:
            moved = self._pay(moved, np.ones_like(raised))

        def gains(_: np.ndarray) -> np.ndarray:
            return np.where(raised, -1.0, lowered + self.rng.random(len(levels)))

        return self.problem.undo(moved, gains)

    def _savers(self, levels: np.ndarray) -> np.ndarray:
        """Return which entries lower a limited cost by a step of compression, (entries,) bool; all that can, if none does."""
        stronger = np.minimum(levels + self._steps, self.problem.last)
        change = self.problem.shares(single_changes(levels, stronger)) - self.problem.shares(levels[None])
        saves = (change < -1e-12).any(axis=1)
        return saves if saves.any() else stronger > levels

    def _draw(self, among: np.ndarray, count: int) -> np.ndarray:
        """Return `count` random entries among some, or all of these if they are fewer, (entries,) bool."""
        places = np.flatnonzero(among)
        drawn = np.zeros_like(among)
        drawn[self.rng.choice(places, min(count, len(places)), replace=False)] = True
        return drawn

    def _pay(self, levels: np.ndarray, payers: np.ndarray) -> np.ndarray:
        """Return the levels with single levels of compression added to random payers until the limits are met.

        Args:
            levels: (entries,).
            payers: (entries,) bool; if all are at their strongest, a limit may still be exceeded.
        """
        while self.problem.excess(levels[None])[0] > 0 and (left := payers & (levels < self.problem.last)).any():
            steps = self.rng.choice(np.flatnonzero(left), size=PATH)
            path = np.minimum(levels + np.cumsum(np.eye(len(levels), dtype=int)[steps], axis=0), self.problem.last)
            fits = self.problem.excess(path) <= 0
            levels = path[fits.argmax() if fits.any() else -1]
        return levels


PATH = 16
"""Number of single levels that are added before their costs are computed, all in one call."""
