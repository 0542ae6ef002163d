"""NSGA-II over feasible policies: the evolutionary baseline of multi-objective search.

Source: Deb, Pratap, Agarwal & Meyarivan 2002 (IEEE Trans. Evol. Comput. 6): constraint domination (definition 1), fast
non-dominated sorting, crowding distance, binary tournaments; Deb & Agrawal 1995 (Complex Systems 9), simulated binary crossover;
Deb & Goyal 1996, polynomial mutation.

Where we differ and why:
1. A share of the children is scaled to its budget (`ActionSpace.scale_to_budget`), like other agents' candidates; the others are
   only projected, so that the population also spreads below the limit.
2. A generation is handed out at once and judged when all of it is back, in the order in which it was handed out: results depend
   on the seed and not on which worker is faster. At the end of a generation workers wait for the slowest one; with a population
   per budget, the others have their turns then.
3. As long as new policies are found, none is evaluated twice.
4. By default one population serves all budgets: its members are children of one front, and each is scaled to or projected onto
   the next budget in turn. `shared: false` gives every budget a population and an equal share of the evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from secateur.agents.core import Share, fully_scored
from secateur.agents.generations import GenerationSearcher
from secateur.agents.pareto import crowding_distance, non_dominated, violation
from secateur.agents.per_budget import PerBudget
from secateur.agents.random_search import random_sequence
from secateur.cost_models.core import NonNegative, Range, check_fields
from secateur.envs.core import ActionSpace, Budget, Episode


@dataclass(frozen=True)
class Nsga2Config:
    """Options of NSGA-II.

    Attributes:
        population: its size.
        shared: whether all budgets have one population; otherwise each has its own.
        crossover: probability that a pair of parents is crossed.
        crossover_index: eta of simulated binary crossover; larger values keep children nearer to their parents.
        mutation_index: eta of polynomial mutation.
        mutation: expected number of genes that a mutation changes.
        edge: share of the children that are scaled to the budget.
        redraws: how often a policy that was chosen before is made again before it is handed out all the same.
    """

    population: Annotated[int, Range(least=4)] = 20
    shared: bool = True
    crossover: Share = 0.9
    crossover_index: NonNegative = 15.0
    mutation_index: NonNegative = 20.0
    mutation: NonNegative = 1.0
    edge: Share = 0.5
    redraws: Annotated[int, Range(least=0)] = 20

    def __post_init__(self) -> None:
        check_fields(self, "NSGA-II")


@dataclass(frozen=True, eq=False)
class Member:
    """A sequence that was evaluated, its minimized objectives, and the sum of its violated constraints."""

    sequence: np.ndarray
    objectives: np.ndarray
    violation: float


class Nsga2(PerBudget):
    """One `Population` for all budgets, or one per budget; see the module."""

    def __init__(self, config: Nsga2Config, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        if config.shared:
            population = Population(config, space, budgets, rng)
            super().__init__({budget.name: population for budget in budgets})
        else:
            own_rngs = rng.spawn(len(budgets))
            super().__init__(
                {
                    budget.name: Population(config, space, [budget], own_rng)
                    for budget, own_rng in zip(budgets, own_rngs, strict=True)
                }
            )


class Population(GenerationSearcher):
    """The members of one front; its budgets take turns."""

    def __init__(self, config: Nsga2Config, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        super().__init__(space, *budgets)
        self.config, self.rng = config, rng
        self.members: list[Member] = []
        self._children: list[np.ndarray] = []

    def generation(self) -> list[np.ndarray]:
        """Return the next children; random sequences in the first generation."""
        tickets = range(self.handed_out, self.handed_out + self.config.population)
        self._children = [self.choose(self._repaired_child(self.budget_of(ticket))) for ticket in tickets]
        return list(self._children)

    def select(self, episodes: Sequence[Episode]) -> None:
        """Keep the best of members and children."""
        children = [self._judge(*child) for child in zip(self._children, episodes, strict=True)]
        self.members = survivors(self.members + children, self.config.population)

    def _judge(self, sequence: np.ndarray, episode: Episode) -> Member:
        """Return what a child scored as a member."""
        if not fully_scored(episode):
            return Member(sequence, np.full(len(self.space.objectives), np.inf), np.inf)
        executed = sequence if episode.actions is None else np.asarray(episode.actions, float)
        return Member(executed, -np.asarray(episode.reward, float), violation(episode.constraints))

    def _repaired_child(self, budget: Budget) -> np.ndarray:
        """Return an executed sequence whose policy is new, if some draws find one."""
        repair = self.space.scale_to_budget if self.rng.random() < self.config.edge else self.space.execute
        for attempt in range(self.config.redraws + 1):
            wanted = self._child() if self.members else random_sequence(self.space, self.rng)
            if attempt > self.config.redraws // 2:  # the neighborhood is used up
                wanted = random_sequence(self.space, self.rng)
            sequence = repair(wanted, budget)
            if not self.chosen(sequence):
                break
        return sequence

    def _child(self) -> np.ndarray:
        """Return a crossed and mutated sequence, before repair."""
        used = self.space.used
        first, second = self._parent().sequence[used], self._parent().sequence[used]
        if self.rng.random() < self.config.crossover:
            first = simulated_binary_crossover(first, second, self.config.crossover_index, self.rng)
        sequence = np.zeros(used.shape)
        rate = min(self.config.mutation / len(first), 1.0)
        sequence[used] = polynomial_mutation(first, self.config.mutation_index, rate, self.rng)
        return sequence

    def _parent(self) -> Member:
        """Return the better of two random members: `survivors` keeps them in the order of the crowded comparison."""
        return self.members[self.rng.integers(len(self.members), size=2).min()]


def survivors(members: Sequence[Member], count: int) -> list[Member]:
    """Return the best `count` members by constraint domination rank, then crowding distance; best first."""
    left = sorted(range(len(members)), key=lambda i: members[i].violation)
    chosen: list[int] = []
    while left and len(chosen) < count:
        # Constraint domination: members with equal violations share fronts, smaller violations come first.
        level = [i for i in left if members[i].violation == members[left[0]].violation]
        points = np.stack([members[i].objectives for i in level])
        keep = non_dominated(points) if np.isfinite(points).all() else np.ones(len(level), bool)
        front = [i for i, kept in zip(level, keep, strict=True) if kept]
        points = points[keep]
        distance = crowding_distance(points) if np.isfinite(points).all() else np.zeros(len(front))
        order = np.argsort(-distance, kind="stable")
        chosen += [front[i] for i in order]
        left = [i for i in left if i not in set(front)]
    return [members[i] for i in chosen[:count]]


def simulated_binary_crossover(first: np.ndarray, second: np.ndarray, index: float, rng: np.random.Generator) -> np.ndarray:
    """Return one child of two parents in [0, 1]; each gene is crossed with probability 1/2."""
    u = rng.random(first.shape)
    # beta: spread of the children divided by that of the parents
    beta = np.where(u <= 0.5, (2 * u) ** (1 / (index + 1)), (1 / (2 * (1 - u))) ** (1 / (index + 1)))
    sign = np.where(rng.random(first.shape) < 0.5, 1, -1)
    crossed = 0.5 * (first + second + sign * beta * (first - second))
    return np.clip(np.where(rng.random(first.shape) < 0.5, crossed, first), 0, 1)


def polynomial_mutation(genes: np.ndarray, index: float, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Return genes in [0, 1] of which a share `rate` has moved."""
    u = rng.random(genes.shape)
    down = (2 * u + (1 - 2 * u) * (1 - genes) ** (index + 1)) ** (1 / (index + 1)) - 1
    up = 1 - (2 * (1 - u) + 2 * (u - 0.5) * genes ** (index + 1)) ** (1 / (index + 1))
    moved = genes + np.where(u < 0.5, down, up)
    return np.clip(np.where(rng.random(genes.shape) < rate, moved, genes), 0, 1)
