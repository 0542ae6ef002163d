"""Artificial bee colony over feasible policies: one colony per budget, phases evaluated in parallel.

Papers: Karaboga 2005 (technical report TR06, Erciyes University) and Karaboga & Basturk 2007 (J. Global Optim. 39), the
algorithm and its move

    v = x + phi (x - x_k),  phi in [-1, 1], on some genes of source x, x_k another source;                         (1)

Zhu & Kwong 2010 (Appl. Math. Comput. 217), the guided move

    v = x + phi (x - x_k) + psi (best - x),  psi in [0, 1.5];                                                      (2)

Lin et al. 2020 (ABCPruner, arXiv:2001.08565), the colony as a channel pruner; Deb et al. 2002 (NSGA-II), constraint
domination. Numbers of equations are ours.

A *source* is a sequence of actions. Each cycle has two phases. *Employed*: every source is visited by its bee, which
tries a move; the bee of a source that failed `limit` times in a row becomes a *scout* and draws a new one.
*Onlooker*: bees choose among the sources by rank and try moves of their own. A move replaces its source only if it is
better.

Where we differ from Karaboga's or Lin's colony, and why:

1. Every candidate is bent to the edge of its budget (`ActionSpace.scale_to_budget`): ABCPruner has no constraint on the total,
   its costs fall where they fall. If the preference rewards lower costs, the wall alone (`ActionSpace.execute`)
   repairs instead.
2. All genes can move. ABCPruner's `randint(0, D - 1)` never touches the last layer.
3. Moves are real numbers and the environment rounds to the nearest level, so their mean is zero but for the guidance.
   ABCPruner's `int()` rounds every move towards smaller widths.
4. The genes of a move are drawn without replacement. ABCPruner may draw the same gene twice and lose the first
   change.
5. A move changes any number of genes, from one to all. With hundreds of evaluations for tens of genes, one or two at
   a time do not get far: 41 instead of 49 % top-1 after 200 evaluations on a made-up task of ResNet-56's size.
6. Where there are several kinds of choices (prune ratio, weight bits, activation bits), every second move also shifts
   all genes of each kind by a common step: trading pruning against bits is out of reach for moves of single genes. With
   139 genes of three kinds, 83 instead of 81 % top-1 on a made-up task (the best uniform policy: 81 %).
7. Scouts cover the whole range, both ends included (ABCPruner's cannot draw the strongest level), and every exhausted
   source is drawn anew, not just one per cycle. The uniform sequence is among the first sources.
8. The best source so far is remembered apart from the sources and is never reset (ABCPruner resets it after the
   start); a scout cannot lose it.
9. Onlookers choose by rank: with probabilities in proportion to the scores all sources are alike when accuracies are.
10. Smaller violations win before utility counts (constraint domination). A failed or NaN episode is an infinite
    violation.
11. As long as new policies are found, none is evaluated twice: what is known is drawn again, and a source without new
    neighbors sends its bee to a random sequence.
12. A bee looks at several moves and tries the one that a ridge regression over everything evaluated so far rates best,
    expected violation first. This uses all evaluations, not just the sources, and so also tempers the winner's curse:
    one lucky score moves the regression little. 52 instead of 49 % top-1 on the task of point 5.
13. The curse remains. A score is one noisy measurement on the validation images, the same for all policies (common
    random numbers), and greedy acceptance favors lucky ones; `limit` removes a source that nothing near it confirms.
    The archive keeps the scores as measured, and winners are scored again on test images, which never take part in
    the search. ABCPruner selects and reports on the test set.
14. Phases are synchronous: a phase is handed out at once and judged when all of it is back, in the order it was
    handed out. Results depend on the seed and not on which worker is faster. With several budgets, one colony's wait
    is another's turn.

Level switches (one gene up, one down; EvoPress, Sieberling et al. 2024) were tried as a second kind of move and did
not help: bending to the edge already keeps the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.agents.core import SequenceActor, scored
from secateur.agents.pareto import violation
from secateur.agents.per_budget import PerBudget
from secateur.agents.random_search import random_sequence
from secateur.envs.core import ActionSpace, Budget, CompressionPolicy, Episode, InputError


@dataclass(frozen=True)
class BeeColonyConfig:
    """Options of the bee colony; defaults from 200 evaluations of a made-up noisy task of ResNet-56's size.

    Attributes:
        sources: per budget, at least 2; each employs one bee and one onlooker, so that 200 evaluations are ten cycles.
        limit: failed tries after which a source is given up; two tries per cycle make that five cycles.
        genes: largest share of the genes that one move changes, in (0, 1]; their number is uniform from 1 to that.
        guidance: largest psi, the pull towards the best source; Zhu & Kwong take 1.5.
        shift: largest step of all genes of a kind together; a level or two. Unused with one kind of choice.
        pressure: 0 lets onlookers choose evenly, 1 linearly by rank, more prefers the best more.
        candidates: moves that a bee looks at before it tries one; 1 switches the regression off.
        ridge: penalty of the regression, above 0, in units of its number of features, which have variance 1.
        redraws: how often a known policy is drawn again before it is handed out all the same.
        preference: weights of the reward's components, "top1" first; None: top-1 alone.
    """

    sources: int = 10
    limit: int = 10
    genes: float = 1.0
    guidance: float = 1.5
    shift: float = 0.3
    pressure: float = 2.0
    candidates: int = 8
    ridge: float = 0.3
    redraws: int = 20
    preference: tuple[float, ...] | None = None

    def __post_init__(self):
        least = {"sources": 2, "limit": 1, "guidance": 0, "shift": 0, "pressure": 0, "candidates": 1, "redraws": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"`{name}` of the bee colony must be at least {value}, but got {getattr(self, name)}.")
        if not 0 < self.genes <= 1:
            raise InputError(f"`genes` of the bee colony must be a share in (0, 1], but got {self.genes}.")
        if not self.ridge > 0:
            raise InputError(f"`ridge` of the bee colony must be above 0, but got {self.ridge}.")
        if self.preference is not None and not (min(self.preference, default=0) >= 0 and sum(self.preference) > 0):
            raise InputError(
                f"`preference` of the bee colony must be weights >= 0, not all zero, but got {list(self.preference)}."
            )


@dataclass(frozen=True, eq=False)
class Source:
    """A sequence that was tried, and how good it is.

    Attributes:
        sequence: executed actions, (num_steps, action_dim).
        violation: sum of the positive constraints; infinite if the episode failed.
        utility: preference @ reward; minus infinity if the episode failed.
    """

    sequence: np.ndarray
    violation: float
    utility: float

    def better_than(self, other: Source) -> bool:
        """Return whether this source wins: by violation first, then by utility. Equals do not."""
        return self.rank_key < other.rank_key

    @property
    def rank_key(self) -> tuple[float, float]:
        """Sorts the best first."""
        return self.violation, -self.utility


@dataclass(frozen=True, eq=False)
class Flight:
    """One bee on its way: the slot of its source, the sequence it tries, and whether it replaces the source unseen."""

    slot: int
    sequence: np.ndarray
    scout: bool


class BeeColony(PerBudget):
    """One `Colony` per budget; evaluations are shared evenly. See the module."""

    def __init__(self, config: BeeColonyConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        preference = np.eye(len(space.objectives))[0] if config.preference is None else np.array(config.preference, float)
        if len(preference) != len(space.objectives):
            raise InputError(
                f"`preference` of the bee colony must have one weight for each of {', '.join(space.objectives)}, "
                f"but got {len(preference)}."
            )
        # A generator of its own per colony: how far the others are must not change what it draws.
        own_rngs = rng.spawn(len(budgets))
        super().__init__(
            {
                budget.name: Colony(config, space, budget, preference, own_rng)
                for budget, own_rng in zip(budgets, own_rngs, strict=True)
            }
        )


class Colony:
    """The sources and bees of one budget."""

    def __init__(
        self,
        config: BeeColonyConfig,
        space: ActionSpace,
        budget: Budget,
        preference: np.ndarray,
        rng: np.random.Generator,
    ):
        self.config, self.space, self.budget, self.preference, self.rng = config, space, budget, preference, rng
        # More compression than the edge of the budget asks for only pays if a cost is part of the preference.
        self._repair = space.execute if preference[1:].any() else space.scale_to_budget
        nothing = Source(np.zeros(space.used.shape), np.inf, -np.inf)
        self.sources = [nothing] * config.sources
        self.trials = np.full(config.sources, config.limit)  # all exhausted: the first phase is all scouts
        self.best = nothing
        self.evaluated: list[Source] = []
        self.handed_out = 0
        self._onlookers_next = False
        self._waiting: list[Flight] = []
        self._out: dict[int, Flight] = {}
        self._back: dict[int, tuple[Flight, Source]] = {}
        self._known: set[CompressionPolicy] = set()

    @property
    def ready(self) -> bool:
        """Whether `next` has an actor to give: the phase has bees left, or it is over and the next can begin."""
        return bool(self._waiting) or not self._out

    def next(self) -> SequenceActor:
        """Return the next bee of the phase."""
        if not self._waiting:
            self._waiting = self._onlookers() if self._onlookers_next else self._employed()
            self._onlookers_next = not self._onlookers_next
        flight = self._waiting.pop(0)
        actor = SequenceActor(self.budget, flight.sequence, self.handed_out)
        self._out[actor.ticket] = flight
        self.handed_out += 1
        return actor

    def learn(self, actor: SequenceActor, episode: Episode) -> None:
        """Keep what a bee found; judge the phase when it is the last.

        Raises:
            ValueError: if the actor is not out.
        """
        if actor.ticket not in self._out:
            raise ValueError(
                f"Episodes must come back once, with the actor that `ask` gave out, but ticket {actor.ticket} of "
                f"budget '{self.budget.name}' is not out. Was it told twice?"
            )
        flight = self._out.pop(actor.ticket)
        self._back[actor.ticket] = flight, self._judge(flight, episode)
        if not self._waiting and not self._out:
            self._select()

    def _judge(self, flight: Flight, episode: Episode) -> Source:
        if not scored(episode):
            return Source(flight.sequence, np.inf, -np.inf)
        sequence = flight.sequence if episode.actions is None else episode.actions
        return Source(np.asarray(sequence, float), violation(episode.constraints), float(self.preference @ episode.reward))

    def _select(self) -> None:
        """Replace sources by better finds, in the order in which the bees left."""
        for ticket in sorted(self._back):
            flight, found = self._back[ticket]
            if flight.scout or found.better_than(self.sources[flight.slot]):
                self.sources[flight.slot] = found
                # A scout that failed has found nothing to stay for.
                self.trials[flight.slot] = 0 if np.isfinite(found.violation) else self.config.limit
            else:
                self.trials[flight.slot] += 1
            if found.better_than(self.best):
                self.best = found
            if np.isfinite(found.rank_key).all():
                self.evaluated.append(found)
        self._back = {}

    def _employed(self) -> list[Flight]:
        if self.handed_out == 0:
            uniform = self._fly(0, [self.space.scale_to_budget(np.where(self.space.used, 0.5, 0.0), self.budget)], scout=True)
            return [uniform, *(self._scout(slot) for slot in range(1, self.config.sources))]
        return [self._scout(slot) if trials >= self.config.limit else self._move(slot) for slot, trials in enumerate(self.trials)]

    def _onlookers(self) -> list[Flight]:
        count = self.config.sources
        best_first = sorted(range(count), key=lambda slot: self.sources[slot].rank_key)
        share = (1 - np.arange(count) / count) ** self.config.pressure
        slots = self.rng.choice(best_first, size=count, p=share / share.sum())
        return [self._move(int(slot)) for slot in slots]

    def _scout(self, slot: int) -> Flight:
        return self._fly(slot, self._random_tables(), scout=True)

    def _move(self, slot: int) -> Flight:
        moves = self._new_tables(lambda: self._neighbor(slot), self._repair, self.config.candidates)
        return self._fly(slot, moves or self._random_tables(), scout=False)

    def _fly(self, slot: int, sequences: list[np.ndarray], scout: bool) -> Flight:
        """Return the flight to the sequence that promises most."""
        sequence = sequences[0]
        if len(sequences) > 1 and self.evaluated:
            genes = np.array([source.sequence[self.space.used] for source in self.evaluated])
            scores = np.array([source.rank_key for source in self.evaluated])
            wanted = np.array([sequence[self.space.used] for sequence in sequences])
            violations, losses = regress(genes, scores, wanted, self.config.ridge).T
            sequence = sequences[np.lexsort((losses, np.maximum(violations, 0)))[0]]
        self._known.add(self.space.decode(sequence))
        return Flight(slot, sequence, scout)

    def _neighbor(self, slot: int) -> np.ndarray:
        """Return a sequence near a source, before repair."""
        x = self.sources[slot].sequence
        partner = self.sources[(slot + self.rng.integers(1, self.config.sources)) % self.config.sources].sequence
        genes = np.argwhere(self.space.used)
        count = self.rng.integers(1, max(1, round(self.config.genes * len(genes))) + 1)
        chosen = tuple(self.rng.choice(genes, count, replace=False).T)
        phi, psi = self.rng.uniform(-1, 1, count), self.rng.uniform(0, self.config.guidance, count)
        moved = np.array(x, float)
        # eq. (2)
        moved[chosen] += phi * (x - partner)[chosen] + psi * (self.best.sequence - x)[chosen]
        # With one kind of choice the bend to the budget's edge would undo a common shift.
        if self.space.used.any(axis=0).sum() > 1 and self.rng.random() < 0.5:
            moved += self.rng.uniform(-self.config.shift, self.config.shift, self.space.action_dim)
        return np.where(self.space.used, np.clip(moved, 0, 1), 0.0)

    def _random_tables(self) -> list[np.ndarray]:
        """Return one random sequence: new if possible, then below the edge of the budget if need be."""

        def draw() -> np.ndarray:
            return random_sequence(self.space, self.rng)

        return (
            self._new_tables(draw, self._repair, 1)
            or self._new_tables(draw, self.space.execute, 1)
            or [self._repair(draw(), self.budget)]
        )

    def _new_tables(
        self, draw: Callable[[], np.ndarray], repair: Callable[[np.ndarray, Budget], np.ndarray], count: int
    ) -> list[np.ndarray]:
        """Return at most `count` repaired draws whose policies are not known."""
        sequences: list[np.ndarray] = []
        for _ in range(self.config.redraws + count):
            sequence = repair(draw(), self.budget)
            if self.space.decode(sequence) not in self._known:
                sequences.append(sequence)
                if len(sequences) == count:
                    break
        return sequences


def regress(genes: np.ndarray, scores: np.ndarray, wanted: np.ndarray, ridge: float) -> np.ndarray:
    """Return the scores that a ridge regression on genes and their squares expects, (m, num_scores).

    Args:
        genes: what was evaluated, (n, num_genes).
        scores: how it scored, (n, num_scores).
        wanted: what is asked, (m, num_genes).
        ridge: penalty, in units of the number of features.
    """

    def features(points: np.ndarray) -> np.ndarray:
        return np.hstack([points, points**2])

    known = features(genes)
    center, scale = known.mean(axis=0), known.std() + 1e-9
    known = (known - center) / scale
    size = known.shape[1]
    mean = scores.mean(axis=0)
    weights = np.linalg.solve(known.T @ known + ridge * size * np.eye(size), known.T @ (scores - mean))
    return (features(wanted) - center) / scale @ weights + mean
