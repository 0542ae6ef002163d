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
        policy: what it is.
        evaluation: its validation score.
        fits: names of the budgets that it fits, whichever it was asked for.
        affordable: names of the budgets whose cost limits it meets; it fits those whose `top1_drop` it meets as well.
    """

    number: int
    policy: CompressionPolicy
    evaluation: Evaluation
    fits: tuple[str, ...]
    affordable: tuple[str, ...]


@dataclass(frozen=True)
class Finalist:
    """A policy that made it to the test split.

    Attributes:
        budget: whose limits it meets.
        policy: what it is.
        proxy: its score in the search, which made it a finalist.
        validation: its float32 score on the same images after the finalists' recovery, which chooses the winner.
        final: its test score after the same recovery, which chose nothing.
    """

    budget: str
    policy: CompressionPolicy
    proxy: Evaluation
    validation: Evaluation
    final: Evaluation


@dataclass(frozen=True)
class Rejected:
    """A finalist that the device proved too slow: predicted and measured milliseconds."""

    finalist: Finalist
    predicted: float
    measured: float


@dataclass
class Outcome:
    """What the checks of one budget came to.

    Attributes:
        budget: its name.
        finalists: those that are left, the winner first.
        rejected: in the order in which they were tried.
        folder: of the winner's export; None without a winner.
        verification: of it; None if it could not be checked.
        note: one sentence if something is missing, else "".
    """

    budget: str
    finalists: list[Finalist]
    rejected: list[Rejected] = field(default_factory=list)
    folder: Path | None = None
    verification: Verification | None = None
    note: str = ""
