"""What a search finds, as data: points of a front, finalists, and the checks of winners."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from secateur.envs.core import CompressionPolicy, Evaluation
from secateur.search.export.verification import Verification


@dataclass(frozen=True)
class FrontPoint:
    """A policy that fits at least one budget.

    Attributes:
        number: of the evaluation that found it.
        policy: the policy.
        evaluation: its validation score.
        fits: names of all budgets that it fits.
        affordable: names of the budgets whose cost limits it meets; to fit a budget it must meet its limit of the metric's loss
            too.
    """

    number: int
    policy: CompressionPolicy
    evaluation: Evaluation
    fits: tuple[str, ...]
    affordable: tuple[str, ...]


@dataclass(frozen=True)
class Finalist:
    """A policy that is scored on the test split.

    Attributes:
        budget: name of the budget whose limits it meets.
        policy: the policy.
        proxy: its score in the search.
        validation: its float32 score on the same images after the finalists' recovery, used for selection.
        final: its test score after the same recovery, not used for selection.
    """

    budget: str
    policy: CompressionPolicy
    proxy: Evaluation
    validation: Evaluation
    final: Evaluation


@dataclass(frozen=True)
class Rejected:
    """A finalist whose measured latency violates its budget: predicted and measured milliseconds."""

    finalist: Finalist
    predicted: float
    measured: float


@dataclass
class Outcome:
    """The result of the checks of one budget.

    Attributes:
        budget: its name.
        finalists: the remaining ones, the winner first.
        rejected: in the order in which they were tried.
        folder: of the winner's export; None without a winner.
        verification: of it; None if it could not be checked.
        note: one sentence if the check failed or is missing, else "".
    """

    budget: str
    finalists: list[Finalist]
    rejected: list[Rejected] = field(default_factory=list)
    folder: Path | None = None
    verification: Verification | None = None
    note: str = ""
