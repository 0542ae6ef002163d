"""Artificial bee colony over feasible policies: one colony per budget, phases evaluated in parallel.

Papers: Karaboga 2005 (technical report TR06, Erciyes University) and Karaboga & Basturk 2007 (J. Global Optim. 39), the
algorithm and its move

    v = x + phi (x - x_k),  phi in [-1, 1], on some genes of source x, x_k another source;                         (1)

Zhu & Kwong 2010 (Appl. Math. Comput. 217), the guided move

    v = x + phi (x - x_k) + psi (best - x),  psi in [0, 1.5];                                                      (2)

Lin et al. 2020 (ABCPruner, arXiv:2001.08565), the colony as a channel pruner; Deb et al. 2002 (NSGA-II), constraint
domination. Numbers of equations are ours.

A *source* is an action sequence. Each cycle has two phases. *Employed*: each source has a bee that tries one move; the
bee of a source that failed `limit` times in a row becomes a *scout* and draws a new source at random. *Onlooker*: bees
choose among the sources by rank and try moves of their own. A move replaces its source only if it is better.

Where we differ from Karaboga's or Lin's colony, and why:

1. Every candidate is scaled to its budget (`ActionSpace.scale_to_budget`). ABCPruner does not limit the total costs. If
   the preference rewards lower costs, candidates are only projected (`ActionSpace.execute`).
2. All genes can move. ABCPruner's `randint(0, D - 1)` never changes the last layer.
3. Moves are real numbers and the environment rounds to the nearest level, so their mean is zero except for the guidance.
   ABCPruner's `int()` rounds every move towards smaller widths.
4. The genes of a move are drawn without replacement. ABCPruner may draw the same gene twice and lose the first change.
5. A move changes any number of genes, from one to all. With hundreds of evaluations for tens of genes, changing one or
   two at a time is too slow: 41 instead of 49 % top-1 after 200 evaluations on a synthetic task of ResNet-56's size.
6. With several kinds of choices (prune ratio, weight bits, activation bits), every second move also shifts all genes of
   each kind by a common step, because moves of single genes cannot trade pruning against bits. With 139 genes of three
   kinds, 83 instead of 81 % top-1 on a synthetic task (the best uniform policy: 81 %).
7. Scouts cover the whole range, both ends included (ABCPruner's cannot draw the largest level), and every exhausted
   source is drawn again, not just one per cycle. Among the first sources are the uniform sequence and those of `greedy`
   (agents/greedy.py), if the sensitivities of the choices are measured (`sensitivity`).
8. The best source so far is kept apart from the sources, so a scout cannot lose it (ABCPruner resets it after the start).
9. Onlookers choose by rank. With probabilities in proportion to similar accuracies, all sources would be equally likely.
10. Smaller violations win before utility counts (constraint domination). A failed or NaN episode has an infinite
    violation.
11. As long as new policies are found, none is evaluated twice: policies that were chosen before are drawn again, and the
    bee of a source without new neighbors tries a random sequence.
12. A bee draws several moves and tries the one with the best prediction of a ridge regression on all evaluations, expected
    violation first. This uses all evaluations, not just the sources, and reduces the winner's curse, because one lucky
    score changes the regression little. 52 instead of 49 % top-1 on the task of point 5. Sums of the sensitivities are
    among the features, with so little penalty that the first cycle shows how the score follows from them.
13. The winner's curse remains. A score is one noisy measurement on the validation images, the same for all policies
    (common random numbers), and greedy acceptance favors lucky ones; `limit` removes sources whose neighbors do not
    confirm them. Winners are scored again on test images, which never take part in the search. ABCPruner selects and
    reports on the test set.
14. Phases are synchronous: a phase is handed out at once and judged when all of it is back, in the order in which it was
    handed out. Results depend on the seed and not on which worker is faster. While one budget's colony waits, the
    colonies of other budgets have their turns.

Level switches (one gene up, one down; EvoPress, Sieberling et al. 2024) were tried as a second kind of move and did not
help: scaling to the budget already uses all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from secateur.agents.core import Rate, check_preference, scored, simplex
from secateur.agents.generations import GenerationSearcher
from secateur.agents.greedy import GreedyConfig, allocate
from secateur.agents.pareto import violation
from secateur.agents.per_budget import PerBudget
from secateur.agents.random_search import random_sequence
from secateur.cost_models.core import Count, NonNegative, Positive, Range, check_fields
from secateur.envs.core import ActionSpace, Budget, Episode, Sensitivities

OWNER = "the bee colony"
"""How messages call the agent."""


@dataclass(frozen=True)
class BeeColonyConfig:
    """Options of the bee colony; defaults from 200 evaluations of a synthetic noisy task of ResNet-56's size.

    Attributes:
        sources: per budget; each has one employed bee and one onlooker, so that 200 evaluations are ten cycles.
        limit: failed tries after which a source is given up; two tries per cycle make that five cycles.
        genes: largest share of the genes that one move changes; their number is uniform from 1 to that.
        guidance: largest psi, the weight of the best source; Zhu & Kwong take 1.5.
        shift: largest common step of all genes of a kind; a level or two. Unused with one kind of choice.
        pressure: 0 lets onlookers choose evenly, 1 linearly by rank; larger values prefer the best more.
        candidates: moves that a bee compares before it tries one; 1 switches the regression off.
        ridge: penalty of the regression, in units of its number of features, which have variance 1.
        redraws: how often a policy that was chosen before is drawn again before it is handed out all the same.
        preference: weights of the reward's components, the quality first; None: quality alone.
        sensitivity: whether the sensitivity of each choice is measured first (envs/sensitivity.py): greedy's sequences are then
            among the first sources, and the regression knows the sums of the sensitivities.
    """

    sources: Annotated[int, Range(least=2)] = 10
    limit: Count = 10
    genes: Rate = 1.0
    guidance: NonNegative = 1.5
    shift: NonNegative = 0.3
    pressure: NonNegative = 2.0
    candidates: Count = 8
    ridge: Positive = 0.3
    redraws: Annotated[int, Range(least=0)] = 20
    preference: tuple[float, ...] | None = None
    sensitivity: bool = True

    @property
    def needs_sensitivities(self) -> bool:
        """Whether the sensitivities of the choices must be measured first."""
        return self.sensitivity

    def __post_init__(self) -> None:
        check_fields(self, OWNER)
        if self.preference is not None:
            check_preference(OWNER, self.preference)


@dataclass(frozen=True, eq=False)
class Source:
    """A sequence that was evaluated, and its score.

    Attributes:
        sequence: executed actions, (num_steps, action_dim).
        violation: sum of the positive constraints; infinite if the episode failed.
        utility: preference @ reward; minus infinity if the episode failed.
    """

    sequence: np.ndarray
    violation: float
    utility: float

    def better_than(self, other: Source) -> bool:
        """Return whether this source wins: by violation first, then by utility. Equal sources do not win."""
        return self.rank_key < other.rank_key

    @property
    def rank_key(self) -> tuple[float, float]:
        """Sort key, best first."""
        return self.violation, -self.utility


@dataclass(frozen=True, eq=False)
class Visit:
    """What one bee tries.

    Attributes:
        slot: of its source.
        sequence: that is evaluated.
        scout: whether it replaces the source in any case.
    """

    slot: int
    sequence: np.ndarray
    scout: bool


class BeeColony(PerBudget):
    """One `Colony` per budget; evaluations are shared evenly. See the module."""

    def __init__(self, config: BeeColonyConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        preference = simplex(OWNER, config.preference, space.objectives)
        # Each colony has its own generator: the progress of the others must not change its draws.
        own_rngs = rng.spawn(len(budgets))
        super().__init__(
            {
                budget.name: Colony(config, space, budget, preference, own_rng)
                for budget, own_rng in zip(budgets, own_rngs, strict=True)
            }
        )


class Colony(GenerationSearcher):
    """The sources and bees of one budget."""

    def __init__(
        self,
        config: BeeColonyConfig,
        space: ActionSpace,
        budget: Budget,
        preference: np.ndarray,
        rng: np.random.Generator,
    ):
        super().__init__(space, budget)
        self.config, self.preference, self.rng = config, preference, rng
        self.sensitivities = space.sensitivities if config.sensitivity else None
        # More compression than the budget asks for is only of use if a cost is part of the preference.
        self._repair = space.execute if preference[1:].any() else space.scale_to_budget
        nothing = Source(np.zeros(space.used.shape), np.inf, -np.inf)
        self.sources = [nothing] * config.sources
        self.trials = np.full(config.sources, config.limit)  # all exhausted: the first phase is all scouts
        self.best = nothing
        self.evaluated: list[Source] = []
        self._onlookers_next = False
        self._visits: list[Visit] = []

    def generation(self) -> list[np.ndarray]:
        """Return what the bees of the next phase try."""
        self._visits = self.onlookers() if self._onlookers_next else self.employed()
        self._onlookers_next = not self._onlookers_next
        return [visit.sequence for visit in self._visits]

    def _judge(self, visit: Visit, episode: Episode) -> Source:
        """Return what the visit found as a source."""
        if not scored(episode):
            return Source(visit.sequence, np.inf, -np.inf)
        sequence = visit.sequence if episode.actions is None else episode.actions
        utility = float(self.preference @ np.asarray(episode.reward))
        return Source(np.asarray(sequence, float), violation(episode.constraints), utility)

    def select(self, episodes: Sequence[Episode]) -> None:
        """Replace sources by better finds, in the order in which they were handed out."""
        for visit, episode in zip(self._visits, episodes, strict=True):
            found = self._judge(visit, episode)
            if visit.scout or found.better_than(self.sources[visit.slot]):
                self.sources[visit.slot] = found
                # What a failed scout found is given up at once.
                self.trials[visit.slot] = 0 if np.isfinite(found.violation) else self.config.limit
            else:
                self.trials[visit.slot] += 1
            if found.better_than(self.best):
                self.best = found
            if np.isfinite(found.rank_key).all():
                self.evaluated.append(found)

    def employed(self) -> list[Visit]:
        """Return one visit per source: a move, or a scout where it is exhausted."""
        if self.handed_out == 0:
            first = [self._visit(slot, [sequence], scout=True) for slot, sequence in enumerate(self._first_sequences())]
            return [*first, *(self._scout(slot) for slot in range(len(first), self.config.sources))]
        return [self._scout(slot) if trials >= self.config.limit else self.move(slot) for slot, trials in enumerate(self.trials)]

    def _first_sequences(self) -> list[np.ndarray]:
        """Return the uniform sequence, and those of greedy with distinct policies, for at most half of the sources."""
        found = [self.space.scale_to_budget(np.where(self.space.used, 0.5, 0.0), self.budget)]
        if self.sensitivities is not None:
            powers = GreedyConfig.powers[: self.config.sources // 2]
            found += [allocate(self.space, self.sensitivities, self.budget, power) for power in powers]
        return list({self.space.decode(sequence): sequence for sequence in found}.values())

    def onlookers(self) -> list[Visit]:
        """Return as many moves as there are sources, more of those with better ranks."""
        count = self.config.sources
        best_first = sorted(range(count), key=lambda slot: self.sources[slot].rank_key)
        share = (1 - np.arange(count) / count) ** self.config.pressure
        slots = self.rng.choice(best_first, size=count, p=share / share.sum())
        return [self.move(int(slot)) for slot in slots]

    def _scout(self, slot: int) -> Visit:
        return self._visit(slot, self._random_sequences(), scout=True)

    def move(self, slot: int) -> Visit:
        """Return the most promising of some moves of a source; a random sequence if there is no new one."""
        moves = self._new_sequences(lambda: self._neighbor(slot), self._repair, self.config.candidates)
        return self._visit(slot, moves or self._random_sequences(), scout=False)

    def _visit(self, slot: int, sequences: list[np.ndarray], scout: bool) -> Visit:
        """Return a visit that tries the sequence with the best prediction."""
        sequence = sequences[0]
        if len(sequences) > 1 and self.evaluated:
            genes = np.array([source.sequence[self.space.used] for source in self.evaluated])
            scores = np.array([source.rank_key for source in self.evaluated])
            wanted = np.array([sequence[self.space.used] for sequence in sequences])
            violations, losses = regress(genes, scores, wanted, self.config.ridge, self.sensitivities).T
            sequence = sequences[np.lexsort((losses, np.maximum(violations, 0)))[0]]
        return Visit(slot, self.choose(sequence), scout)

    def _neighbor(self, slot: int) -> np.ndarray:
        """Return a sequence near a source, before repair."""
        partner = self.sources[(slot + self.rng.integers(1, self.config.sources)) % self.config.sources]
        ends = self.sources[slot].sequence, partner.sequence, self.best.sequence
        return neighbor(*ends, self.space.used, self.config, self.rng)

    def _random_sequences(self) -> list[np.ndarray]:
        """Return one random sequence: a new one if possible, scaled to the budget, else projected only."""

        def draw() -> np.ndarray:
            return random_sequence(self.space, self.rng)

        return (
            self._new_sequences(draw, self._repair, 1)
            or self._new_sequences(draw, self.space.execute, 1)
            or [self._repair(draw(), self.budget)]
        )

    def _new_sequences(
        self, draw: Callable[[], np.ndarray], repair: Callable[[np.ndarray, Budget], np.ndarray], count: int
    ) -> list[np.ndarray]:
        """Return at most `count` repaired draws whose policies were not chosen before."""
        sequences: list[np.ndarray] = []
        attempts = self.config.redraws + count
        while attempts and len(sequences) < count:
            number = min(attempts, count - len(sequences))
            attempts -= number
            repaired = repair(np.stack([draw() for _ in range(number)]), self.budget)
            sequences += [sequence for sequence in repaired if not self.chosen(sequence)]
        return sequences


def neighbor(
    source: np.ndarray,
    partner: np.ndarray,
    best: np.ndarray,
    used: np.ndarray,
    config: BeeColonyConfig,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return a sequence near a source, (num_steps, action_dim): the move of eq. (2), and a common step of each kind of choice.

    Args:
        source, partner, best: sequences x, x_k and best of eq. (2).
        used: which entries are genes, (num_steps, action_dim).
        config: options of the move.
        rng: every random choice.
    """
    genes = np.argwhere(used)
    count = rng.integers(1, max(1, round(config.genes * len(genes))) + 1)
    chosen = tuple(rng.choice(genes, count, replace=False).T)
    phi, psi = rng.uniform(-1, 1, count), rng.uniform(0, config.guidance, count)
    moved = np.array(source, float)
    moved[chosen] += phi * (source - partner)[chosen] + psi * (best - source)[chosen]
    # With one kind of choice, scaling to the budget would undo a common step.
    if used.any(axis=0).sum() > 1 and rng.random() < 0.5:
        moved += rng.uniform(-config.shift, config.shift, used.shape[1])
    return np.where(used, np.clip(moved, 0, 1), 0.0)


def regress(
    genes: np.ndarray, scores: np.ndarray, wanted: np.ndarray, ridge: float, sensitivities: Sensitivities | None = None
) -> np.ndarray:
    """Return the scores that a ridge regression expects, (m, num_scores).

    Features: genes and their squares; with sensitivities also the sums of these to the powers 0.5, 0.75 and 1.

    Args:
        genes: of evaluated sequences, (n, num_genes).
        scores: of these sequences, (n, num_scores).
        wanted: genes of the sequences to predict, (m, num_genes).
        ridge: penalty, in units of the number of features.
        sensitivities: of the genes; None: not measured.
    """

    def features(points: np.ndarray) -> np.ndarray:
        if sensitivities is None:
            return np.hstack([points, points**2])
        single = sensitivities(points)
        return np.hstack([points, points**2, *((single**power).sum(axis=1, keepdims=True) for power in (0.5, 0.75, 1))])

    seen, own = features(genes), 2 * genes.shape[1]
    size = seen.shape[1]
    center, scale = seen.mean(axis=0), np.full(size, seen[:, :own].std() + 1e-9)
    scale[own:] = (seen[:, own:].std(axis=0) + 1e-9) / np.sqrt(own)  # sums vary as much as all single features together
    seen = (seen - center) / scale
    mean = scores.mean(axis=0)
    weights = np.linalg.solve(seen.T @ seen + ridge * size * np.eye(size), seen.T @ (scores - mean))
    return (features(wanted) - center) / scale @ weights + mean
