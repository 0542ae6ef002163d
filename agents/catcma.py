"""CatCMA with margin: an evolution strategy with one distribution over continuous, integer and categorical choices.

Of every budget, members are drawn from a joint distribution: a Gaussian for ordered choices, probabilities for the others.
Each member is scaled to the budget (`ActionSpace.scale_to_budget`) and evaluated; the distribution then moves towards the better
half. A margin keeps the probability of leaving a level above a bound, so that no choice is fixed while others still improve.

Source: Hamano et al. 2025 (CatCMA with Margin), arXiv:2504.07884, through the library `cmaes`; Hamano et al. 2022 (CMA-ES with
Margin), arXiv:2205.13482; Hansen 2016 (CMA-ES), arXiv:1604.00772.

Where we differ and why:
1. The first distribution is centered on greedy's policy (agents/greedy.py), which is evaluated first, with the standard deviation
   `spread` in every ordered choice and the probability `certainty` of greedy's level in the others. Without sensitivities the
   center is 1/2, and levels are equally likely.
2. Choices with two levels are categorical, as the library recommends. Choices with more than `MOST_LEVELS` levels are continuous:
   the environment rounds them, and a margin of single levels would be tiny. The others are integers. The library pads integers
   with fewer levels than others, which breaks its margin at the strongest level, so these are continuous too.
3. The library is told ranks instead of scores. Its selection only compares members, but its penalty for continuous values outside
   [0, 1] has the scale of the scores and is undefined if they are infinite or all alike. Failed and early stopped members rank
   last. A generation without any score is not told.
4. The members are told as they were drawn, not as they were scaled.
5. A policy that was chosen before is drawn again. After some draws it is evaluated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from secateur.agents.core import Rate
from secateur.agents.generations import GenerationSearcher, quality
from secateur.agents.greedy import GreedyConfig, allocate
from secateur.agents.per_budget import PerBudget
from secateur.cost_models.core import Positive, Range, check_fields
from secateur.envs.core import ActionSpace, Budget, Episode, Sensitivities

if TYPE_CHECKING:
    from cmaes import CatCMAwM

MOST_LEVELS = 8
"""Choices with more levels are continuous."""

LEAST_POPULATION = 4
"""Smallest population for which the rates of the update are defined."""


@dataclass(frozen=True)
class CatCmaConfig:
    """Options of CatCMA.

    Attributes:
        spread: first standard deviation of the actions of continuous and integer choices.
        certainty: first probability of greedy's level of choices with two levels.
        population: policies per generation; 0: 4 + 3 log(choices), the default of CMA-ES. At least 4 are used.
        redraws: how often a policy that was chosen before is drawn again before it is handed out all the same.
        sensitivity: whether the sensitivity of each choice is measured first (envs/sensitivity.py), for greedy's policy.
    """

    spread: Positive = 0.15
    certainty: Rate = 0.75
    population: Annotated[int, Range(least=0)] = 0
    redraws: Annotated[int, Range(least=0)] = 5
    sensitivity: bool = True

    @property
    def needs_sensitivities(self) -> bool:
        """Whether the sensitivities of the choices must be measured first."""
        return self.sensitivity

    def __post_init__(self) -> None:
        check_fields(self, "CatCMA")


class CatCma(PerBudget):
    """One `DistributionSearch` per budget; evaluations are shared evenly. See the module."""

    def __init__(self, config: CatCmaConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        own_rngs = rng.spawn(len(budgets))
        super().__init__(
            {budget.name: DistributionSearch(config, space, budget, own) for budget, own in zip(budgets, own_rngs, strict=True)}
        )


class DistributionSearch(GenerationSearcher):
    """The distribution of one budget.

    Attributes:
        first: greedy's executed sequence, or None without sensitivities.
    """

    def __init__(self, config: CatCmaConfig, space: ActionSpace, budget: Budget, rng: np.random.Generator):
        super().__init__(space, budget)
        self.config, self.rng, self.kinds = config, rng, Kinds(space.level_actions)
        known = space.sensitivities if config.sensitivity else None
        self.first = None if known is None else _greedy(space, known, budget)
        center = None if self.first is None else self.first[space.used]
        self._optimizer = make_optimizer(config, self.kinds, center)
        self._members: list[CatCMAwM.Solution] = []

    def generation(self) -> list[np.ndarray]:
        """Return the policies of a population; greedy's is the first of all."""
        self._optimizer.reseed_rng(int(self.rng.integers(2**31)))
        first = [] if self.first is None or self.handed_out else [self.choose(self.first)]
        self._members, sequences = [], []
        for _ in range(self._optimizer.population_size):
            for _ in range(self.config.redraws + 1):
                member = self._optimizer.ask()
                sequence = self._executed(member)
                if not self.chosen(sequence):
                    break
            self._members.append(member)
            sequences.append(self.choose(sequence))
        return first + sequences

    def _executed(self, member: CatCMAwM.Solution) -> np.ndarray:
        wanted = np.zeros(self.space.used.shape)
        wanted[self.space.used] = self.kinds.actions(member)
        return self.space.scale_to_budget(wanted, self.budget)

    def select(self, episodes: Sequence[Episode]) -> None:
        """Move the distribution towards the better members; greedy's policy is none of them."""
        scores = np.array([quality(episode) for episode in episodes[-len(self._members) :]])
        if not np.isfinite(scores).any():
            return
        ranks = np.argsort(np.argsort(-scores, kind="stable"), kind="stable")
        self._optimizer.tell([(member, float(rank)) for member, rank in zip(self._members, ranks, strict=True)])


def _greedy(space: ActionSpace, sensitivities: Sensitivities, budget: Budget) -> np.ndarray:
    return allocate(space, sensitivities, budget, GreedyConfig().powers[0])


class Kinds:
    """Which entries of `np.nonzero(space.used)` are continuous, integer and categorical.

    Args:
        level_actions: of every entry (`ActionSpace.level_actions`).

    Attributes:
        continuous, integer, categorical: numbers of the entries.
    """

    def __init__(self, level_actions: Sequence[np.ndarray]):
        self.level_actions = tuple(level_actions)
        lengths = np.array([len(actions) for actions in level_actions])
        few = (lengths > 2) & (lengths <= MOST_LEVELS)
        longest = lengths == lengths[few].max(initial=0)
        self.categorical = np.flatnonzero(lengths == 2)
        self.integer = np.flatnonzero(few & longest)
        self.continuous = np.flatnonzero((lengths != 2) & ~(few & longest))

    @property
    def ordered(self) -> np.ndarray:
        """Numbers of the entries in the order of the optimizer's Gaussian."""
        return np.concatenate([self.continuous, self.integer])

    def actions(self, member: CatCMAwM.Solution) -> np.ndarray:
        """Return the actions of a member, (entries,)."""
        actions = np.zeros(len(self.level_actions))
        if member.x is not None:
            actions[self.continuous] = member.x
        if member.z is not None:
            actions[self.integer] = member.z
        if member.c is not None:
            levels = member.c.argmax(axis=1)
            actions[self.categorical] = [self.level_actions[i][level] for i, level in zip(self.categorical, levels, strict=True)]
        return actions


def make_optimizer(config: CatCmaConfig, kinds: Kinds, center: np.ndarray | None) -> CatCMAwM:
    """Return the optimizer with its first distribution.

    Args:
        config: options.
        kinds: of the entries.
        center: actions, (entries,); None: no actions are preferred.
    """
    from cmaes import CatCMAwM  # takes a second, and only few agents need it

    ordered = len(kinds.ordered)
    entries = len(kinds.level_actions)
    population = max(config.population, LEAST_POPULATION) if config.population else 4 + int(3 * np.log(entries))
    shares = np.full((len(kinds.categorical), 2), 0.5)
    if center is not None:
        strong = np.array([center[i] > kinds.level_actions[i].mean() for i in kinds.categorical], dtype=int)
        shares = np.where(np.arange(2) == strong[:, None], config.certainty, 1 - config.certainty)
    return CatCMAwM(
        x_space=[[0.0, 1.0]] * len(kinds.continuous) or None,
        z_space=[kinds.level_actions[i].tolist() for i in kinds.integer] or None,
        c_space=[2] * len(kinds.categorical) or None,
        population_size=population,
        mean=np.full(ordered, 0.5) if center is None else center[kinds.ordered].astype(float),
        sigma=config.spread,
        cov=np.eye(ordered),
        cat_param=shares if len(kinds.categorical) else None,
    )
