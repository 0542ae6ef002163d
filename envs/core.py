"""The vocabulary of the search: what we choose, what it scored, what happened, and who acts.

Dataclasses and protocols only. Everything is frozen: no step of the search changes what an earlier one returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from secateur.cost_models.core import InputError

__all__ = [
    "Act", "ActionSpace", "Actor", "Budget", "CompressionPolicy", "Episode", "Evaluation", "InputError", "Simulation",
]  # fmt: skip

Act = Callable[[np.ndarray, np.ndarray, int, np.ndarray], np.ndarray]
"""Actions of many episodes at once, (n, action_dim) in [0, 1], from observations, (n, observation_dim), the sequences that they
have executed so far, (n, num_steps, action_dim), zero ahead, the step, and which rows they are, (n,)."""


@dataclass(frozen=True)
class CompressionPolicy:
    """What we choose. Hashable, so that a policy is evaluated once.

    Attributes:
        widths: kept units of each coupled group, in the order of `NetworkGeometry.group_names`.
        weight_bits, activation_bits: of each layer, in the order of `NetworkGeometry.layers`; 32 = untouched.
    """

    widths: tuple[int, ...]
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]


@dataclass(frozen=True)
class Evaluation:
    """What a policy scored.

    Attributes:
        top1: fraction of images classified correctly, in [0, 1].
        costs: value of every cost model, by name.
        fidelity: "proxy" (validation split, used by the search), "validation" (the same after the finalists' recovery) or
            "final" (test split, likewise). They never share a front.
        images: number of images behind `top1`.
        seconds: wall time of the evaluation.
        stopped: whether the score is that of the first images only, because the policy was clearly worse than another one
            (envs/racing.py). Such a policy is on no front.
        correct: which images were classified correctly, as packed bits in the evaluator's own order; None: not kept.
    """

    top1: float
    costs: Mapping[str, float]
    fidelity: str = "proxy"
    images: int = 0
    seconds: float = 0.0
    stopped: bool = False
    correct: bytes | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Budget:
    """What a device allows. All limits are hard.

    Attributes:
        name: e.g. "phone".
        limits: absolute upper limit of each named cost; the environment keeps every episode below them.
        top1_drop: largest allowed loss of top-1 against the dense model, as a fraction; None = no limit. Known only
            after the evaluation, so it is a constraint on the result and not part of the wall.
    """

    name: str
    limits: Mapping[str, float]
    top1_drop: float | None = None


@dataclass(frozen=True)
class Episode:
    """What happened when an actor walked through the environment.

    Attributes:
        budget: name of the budget that the episode was conditioned on.
        policy: the executed policy; None if the walk itself failed.
        evaluation: its scores; None when `failure` says why there are none.
        constraints: {name: value / limit - 1} of the episode's budget; feasible when all are <= 0.
        observations: (steps + 1, observation_dim) float32.
        actions: (steps, action_dim) float32 in [0, 1]: what was *executed*, after the wall and the rounding.
        reward: (num_objectives,) the vector reward of the last step; zero before it.
        failure: one sentence, or None.
    """

    budget: str
    policy: CompressionPolicy | None
    evaluation: Evaluation | None
    constraints: Mapping[str, float] = field(default_factory=dict)
    observations: np.ndarray | None = None
    actions: np.ndarray | None = None
    reward: np.ndarray | None = None
    failure: str | None = None

    @property
    def feasible(self) -> bool:
        """Whether the policy was scored and breaks no constraint of its budget."""
        return self.evaluation is not None and all(value <= 0 for value in self.constraints.values())


class Actor(Protocol):
    """Acts for one episode. Pure and picklable: it travels to a worker, and only its episode comes back."""

    budget: Budget

    def act(self, observation: np.ndarray, step: int) -> np.ndarray:
        """Return the action, (action_dim,) in [0, 1]: 0 = least compression, 1 = strongest."""
        ...


@dataclass(frozen=True, eq=False)
class Simulation:
    """What n episodes would execute and spend; nothing of it was evaluated.

    Attributes:
        observations: (n, num_steps + 1, observation_dim) float32; zeros at steps that were given.
        sequences: executed actions, (n, num_steps, action_dim) float32.
        costs: (n, num_objectives - 1): every cost among the objectives as a share of the dense one.
    """

    observations: np.ndarray
    sequences: np.ndarray
    costs: np.ndarray


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """How far each choice by itself moves the outputs of the model (envs/sensitivity.py).

    Attributes:
        curves: (entries, points) divergence in nats at even actions from 0 to 1; entries in the order of `np.nonzero(used)`.
        seconds: how long the measurement took.
    """

    curves: np.ndarray
    seconds: float = 0.0

    def __call__(self, actions: np.ndarray) -> np.ndarray:
        """Return the divergence of each entry alone, in the shape of its actions, (..., entries) in [0, 1]."""
        points = self.curves.shape[1]
        place = np.clip(actions, 0, 1) * (points - 1)
        low = np.minimum(place.astype(int), points - 2)
        share, rows = place - low, np.arange(len(self.curves))
        return (1 - share) * self.curves[rows, low] + share * self.curves[rows, low + 1]


class ActionSpace(Protocol):
    """What an agent may know about the environment besides its episodes.

    A *sequence* is a whole episode's actions, (num_steps, action_dim) in [0, 1]; entries where `used` is False have no effect.
    """

    num_steps: int
    action_dim: int
    observation_dim: int
    used: np.ndarray  # (num_steps, action_dim) bool
    level_actions: tuple[np.ndarray, ...]  # of each entry of `np.nonzero(used)`: the actions that mean its levels, increasing
    objectives: tuple[str, ...]  # names of the reward's components; the first is "top1"
    dense_top1: float
    dense_costs: Mapping[str, float]
    unit_magnitudes: tuple[np.ndarray, ...]  # per group (units,): mean |w| of what produces each unit
    producer_macs: np.ndarray  # (groups,) multiply-accumulates of the dense layer that produces a group; of several, the mean
    sensitivities: Sensitivities | None  # what every choice by itself does to the outputs; None: not measured

    def execute(self, sequence: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the sequence that the environment would execute: behind the wall of the budget, rounded to real levels."""
        ...

    def scale_to_budget(self, sequence: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the sequence scaled to the edge of the budget, then executed: as little compression as fits."""
        ...

    def with_prune_ratios(self, sequence: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        """Return the sequence with the levels nearest to these prune ratios, (groups,), wherever a prune ratio is chosen."""
        ...

    def decode(self, sequence: np.ndarray) -> CompressionPolicy:
        """Return the policy of an executed sequence."""
        ...

    def simulate(
        self,
        act: Act,
        budgets: Sequence[Budget],
        sequences: np.ndarray | None = None,
        starts: np.ndarray | None = None,
    ) -> Simulation:
        """Return what the environment would execute, observe and spend in one episode per budget, without any evaluation.

        Args:
            act: chooses; it is not asked for the steps that are given.
            budgets: one per row; satisfiable.
            sequences: (n, num_steps, action_dim) executed actions of the steps before `starts`, which are taken as they are.
            starts: (n,) first step that `act` chooses; default: 0.
        """
        ...

    def scale_all_to_budgets(self, sequences: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
        """Return `scale_to_budget` of many sequences, (n, num_steps, action_dim), one budget each."""
        ...

    def cost_shares(self, sequences: np.ndarray) -> np.ndarray:
        """Return every cost among the objectives by the dense one, (n, num_objectives - 1), of executed sequences."""
        ...

    def with_limits(self, observations: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
        """Return the observations, (n, observation_dim), of the same states under other budgets, one each."""
        ...
