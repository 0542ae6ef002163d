"""The vocabulary of the search: policies, evaluations, budgets, episodes, actors, and what agents may know.

Dataclasses and protocols only. Everything is frozen: no step of the search changes what an earlier one returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from secateur.cost_models.core import InputError

__all__ = [
    "Act", "ActionSpace", "Actor", "Budget", "CompressionPolicy", "Episode", "Evaluation", "InputError", "Simulation",
]  # fmt: skip

Act = Callable[[np.ndarray, np.ndarray, int, np.ndarray], np.ndarray]
"""Actions of n episodes at the same step, (n, action_dim) in [0, 1]. Arguments: their observations, (n, observation_dim);
their executed sequences, (n, num_steps, action_dim), zero from this step on; the step; their row numbers, (n,)."""


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
        score: in the unit of its metric (`secateur.envs.metric`).
        costs: value of every cost model, by name.
        fidelity: "proxy" (the search's score), "validation" (the metric on the validation split after the finalists' recovery)
            or "final" (test split, likewise). They never share a front.
        images: number of images, or other samples, behind the score.
        seconds: wall time of the evaluation.
        stopped: whether the score is that of the first images only, because the policy was clearly worse than another one
            (envs/racing.py). Such a policy is on no front.
        correct: which images were classified correctly, as packed bits in the evaluator's own order; None: not kept.
        quality: the score on the scale that agents see (`Metric.quality`), higher is better; None: the score itself.
        note: what the user should know about the evaluation, in one sentence, or "".
    """

    score: float
    costs: Mapping[str, float]
    fidelity: str = "proxy"
    images: int = 0
    seconds: float = 0.0
    stopped: bool = False
    correct: bytes | None = field(default=None, compare=False, repr=False)
    quality: float = None  # type: ignore[assignment]
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.quality is None:
            object.__setattr__(self, "quality", self.score)


@dataclass(frozen=True)
class Budget:
    """What a device allows. All limits are hard.

    Attributes:
        name: e.g. "phone".
        limits: absolute upper limit of each named cost; the environment keeps every episode within them.
        metric_drop: largest allowed loss of the metric against the dense model, in the metric's unit (percent as a fraction);
            None = no limit. It is known only after the evaluation, so it is a constraint on the result and not part of the
            feasibility projection.
    """

    name: str
    limits: Mapping[str, float]
    metric_drop: float | None = None

    def __hash__(self) -> int:
        """Hash of everything that `==` compares, so that budgets key dicts."""
        return hash((self.name, frozenset(self.limits.items()), self.metric_drop))


def without_drop(budget: Budget) -> Budget:
    """Return the budget without a limit of the metric's loss."""
    return replace(budget, metric_drop=None)


@dataclass(frozen=True)
class Episode:
    """What happened when an actor walked through the environment.

    Attributes:
        budget: name of the budget that the episode was conditioned on.
        policy: the executed policy; None if the walk itself failed.
        evaluation: its scores; None when `failure` says why there are none.
        constraints: {name: value / limit - 1} of the episode's budget; feasible when all are <= 0.
        observations: (steps + 1, observation_dim) float32.
        actions: (steps, action_dim) float32 in [0, 1]: what was *executed*, after rounding and projection.
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


class KnownFailure(RuntimeError):
    """A policy that has failed before is not evaluated again; the text is the failure of the first time."""


def failure_text(error: Exception | SystemExit) -> str:
    """Return the failure of an episode that this error has ended."""
    return str(error) if isinstance(error, KnownFailure) else f"{type(error).__name__}: {error}"


class Actor(Protocol):
    """Chooses the actions of one episode. Pure and picklable: it travels to a worker, and only its episode comes back."""

    @property
    def budget(self) -> Budget:
        """The budget of the episode."""
        ...

    def act(self, observation: np.ndarray, step: int) -> np.ndarray:
        """Return the action, (action_dim,) in [0, 1]: 0 = least compression, 1 = strongest."""
        ...


@dataclass(frozen=True, eq=False)
class Simulation:
    """What n episodes would execute and spend; nothing was evaluated.

    Attributes:
        observations: (n, num_steps + 1, observation_dim) float32; zeros at steps whose actions were given.
        sequences: executed actions, (n, num_steps, action_dim) float32.
        costs: (n, num_objectives - 1): every cost among the objectives as a share of the dense one.
    """

    observations: np.ndarray
    sequences: np.ndarray
    costs: np.ndarray


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """Effect of each choice alone on the outputs of the model (envs/sensitivity.py).

    Attributes:
        curves: (entries, points) divergence in nats at evenly spaced actions from 0 to 1; entries as in `np.nonzero(used)`.
        seconds: duration of the measurement.
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
    """What an agent may know about the environment besides its episodes; everything is read-only.

    An *action sequence* holds the actions of one episode, (num_steps, action_dim) in [0, 1]; entries where `used` is False have
    no effect. Methods that take `sequences` take one sequence or a batch of them, and return the same shape; `budgets` is one
    budget for all of them or one per sequence.
    """

    @property
    def num_steps(self) -> int:
        """Steps per episode."""
        ...

    @property
    def action_dim(self) -> int:
        """Entries of one action."""
        ...

    @property
    def observation_dim(self) -> int:
        """Entries of one observation."""
        ...

    @property
    def used(self) -> np.ndarray:
        """(num_steps, action_dim) bool: which entries of a sequence choose something."""
        ...

    @property
    def level_actions(self) -> Sequence[np.ndarray]:
        """Of each entry of `np.nonzero(used)`: the actions that mean its levels, increasing in [0, 1]."""
        ...

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the reward's components; the first is that of the metric."""
        ...

    @property
    def dense_quality(self) -> float:
        """Quality of the untouched model on the validation split: its score on the scale of the reward."""
        ...

    @property
    def dense_costs(self) -> Mapping[str, float]:
        """{cost: value} of the untouched model."""
        ...

    @property
    def unit_magnitudes(self) -> Sequence[np.ndarray]:
        """Per group (units,): mean |w| of the weights that produce each unit."""
        ...

    @property
    def producer_macs(self) -> np.ndarray:
        """(groups,) multiply-accumulates of the dense layer that produces a group; the mean, if there are several."""
        ...

    @property
    def sensitivities(self) -> Sensitivities | None:
        """Effect of each choice alone on the model's outputs; None: not measured."""
        ...

    def check(self, budget: Budget) -> None:
        """Raise InputError if no policy is found that keeps the budget."""
        ...

    def execute(self, sequences: np.ndarray, budgets: Budget | Sequence[Budget]) -> np.ndarray:
        """Return what the environment would execute: rounded to real levels, and projected onto the budget."""
        ...

    def scale_to_budget(self, sequences: np.ndarray, budgets: Budget | Sequence[Budget]) -> np.ndarray:
        """Return the sequences scaled to the edge of the budget and executed: the least compression of their kind that fits.

        Scaling keeps the order of a sequence's entries.
        """
        ...

    def with_prune_ratios(self, sequence: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        """Return one sequence with the levels nearest to these prune ratios, (groups,), wherever a prune ratio is chosen."""
        ...

    def decode(self, sequence: np.ndarray) -> CompressionPolicy:
        """Return the policy of one executed sequence."""
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
            act: chooses the actions; it is not called for steps that are given.
            budgets: one per row; satisfiable.
            sequences: (n, num_steps, action_dim) executed actions of the steps before `starts`, which are taken as they are.
            starts: (n,) first step that `act` chooses; default: 0.
        """
        ...

    def cost_shares(self, sequences: np.ndarray) -> np.ndarray:
        """Return every cost among the objectives by the dense one, (n, num_objectives - 1), of executed sequences, a batch."""
        ...

    def with_limits(self, observations: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
        """Return the observations, (n, observation_dim), of the same states under other budgets, one each."""
        ...
