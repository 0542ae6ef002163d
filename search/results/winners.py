"""The winners of a search: exported, and checked from their files by another process.

The search predicts latencies with a table. If the table was measured on this machine, the check measures the export, and a policy
whose measured latency violates a limit of its budget is rejected. The measurement then corrects the predictions for the other
policies of the budget, all by the same factor, and the best policy that keeps the limit after the correction is tried.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from secateur.envs.core import Budget, CompressionPolicy, InputError
from secateur.search.export.verification import LimitCheck, Verification
from secateur.search.export.verify import verify_in_fresh_process
from secateur.search.export.write import write_export
from secateur.search.problem import Problem
from secateur.search.profiling.runtimes import PyTorch
from secateur.search.results.finalize import Finalist, score_finalist
from secateur.search.results.front import Front

log = logging.getLogger(__name__)

EXPORTS = "exports"
LATENCY = "latency_ms"
MOST_REJECTED = 5
"""Policies of one budget that are tried before the budget is left without a winner."""


@dataclass(frozen=True)
class Rejected:
    """A finalist that is too slow on the device, with its predicted and measured milliseconds."""

    finalist: Finalist
    predicted: float
    measured: float


@dataclass
class Outcome:
    """The result of the checks of one budget.

    Attributes:
        budget: its name.
        finalists: those that were not rejected, the winner first.
        rejected: in the order in which they were tried.
        folder: of the winner's export; None without a winner.
        verification: of the winner; None if it could not be checked.
        note: one sentence if there is no winner or no check, else "".
    """

    budget: str
    finalists: list[Finalist]
    rejected: list[Rejected] = field(default_factory=list)
    folder: Path | None = None
    verification: Verification | None = None
    note: str = ""


def winner_folder(run: Path, budget: Budget) -> Path:
    """Return where the winner of a budget is exported to."""
    return run / EXPORTS / budget.name


def verify_winners(
    problem: Problem,
    front: Front,
    finalists: Sequence[Finalist],
    run: Path,
    status: Callable[[str], None] = log.info,
    verify: Callable[..., Verification] = verify_in_fresh_process,
) -> list[Outcome]:
    """Export the winner of every budget to `run`/exports/<budget>, and check it; see the module.

    Args:
        problem: the search.
        front: the policies that it found.
        finalists: of all budgets, the winner of each first.
        run: its folder.
        status: called with each stage, in a few words.
        verify: checks a folder; called with the runtime and the number of threads.
    """
    return [
        _Trials(problem, front, budget, run, status, verify).run([f for f in finalists if f.budget == budget.name])
        for budget in problem.budgets
    ]


@dataclass
class _Trials:
    """Finds the winner of one budget; `factor` is the largest ratio of a measured to a predicted latency so far."""

    problem: Problem
    front: Front
    budget: Budget
    folder: Path
    status: Callable[[str], None]
    verify: Callable[..., Verification]
    factor: float = 1.0

    def run(self, waiting: list[Finalist]) -> Outcome:
        """Try one finalist after the other until one keeps the budget on the device."""
        outcome = Outcome(self.budget.name, [])
        tried: set[CompressionPolicy] = set()
        while waiting:
            finalist = waiting[0]
            tried.add(finalist.policy)
            self._check(finalist, outcome)
            broken = _broken_latency(outcome.verification)
            if broken is None:
                outcome.finalists = waiting
                return outcome
            predicted = finalist.validation.costs[LATENCY]
            outcome.rejected.append(Rejected(finalist, predicted, broken.found))
            # Both relative to their limits: the measured limit of a share of the dense latency follows the machine's load.
            self.factor = max(self.factor, (broken.found / broken.limit) / (predicted / self.budget.limits[LATENCY]))
            shutil.rmtree(outcome.folder)
            outcome.folder = outcome.verification = None
            waiting = [later for later in waiting[1:] if self._keeps(later.validation.costs)]
            if len(outcome.rejected) == MOST_REJECTED:
                break
            if not waiting:
                waiting = self._next(tried | {rejected.finalist.policy for rejected in outcome.rejected})
        if outcome.rejected:
            outcome.note = (
                f"No policy keeps {LATENCY} of budget '{self.budget.name}' on the device: {len(outcome.rejected)} were "
                f"measured, up to {self.factor:.2f} times slower than predicted. Profile the device again, or search longer."
            )
        return outcome

    def _check(self, finalist: Finalist, outcome: Outcome) -> None:
        folder = winner_folder(self.folder, self.budget)
        self.status(f"exporting and checking the winner of {self.budget.name}")
        try:
            write_export(folder, self.problem, finalist.policy, self.budget, finalist.validation, finalist.final)
            outcome.folder = folder
            device = self.problem.device
            table = None if device is None else device.table
            profiled = table is not None and table.runtime != PyTorch.name  # which executes no ONNX files
            where = {"runtime": table.runtime, "threads": table.threads} if profiled else {}
            outcome.verification = self.verify(folder, **where)
        except (InputError, RuntimeError) as error:
            # A search of hours must not end with nothing because a winner cannot be exported or checked.
            log.info("checking the winner of %s failed", self.budget.name, exc_info=True)
            outcome.note = f"The winner of budget '{self.budget.name}' was not checked: {error}"

    def _keeps(self, costs) -> bool:
        return costs[LATENCY] * self.factor <= self.budget.limits[LATENCY]

    def _next(self, tried: set[CompressionPolicy]) -> list[Finalist]:
        """Return the best policy of the search that keeps the limit by the corrected table, repaired and scored."""
        for candidate in self.front.best(self.budget.name, self.front.evaluations):
            if candidate.policy not in tried and self._keeps(candidate.evaluation.costs):
                self.status(f"repairing another policy for {self.budget.name}")
                finalist = score_finalist(self.problem, self.budget, candidate)
                if finalist is not None:
                    return [finalist]
                tried.add(candidate.policy)
        return []


def _broken_latency(verification: Verification | None) -> LimitCheck | None:
    """Return the latency limit if the measurement violates it; None if it is kept, or was not measured."""
    limits = () if verification is None else verification.limits
    return next((limit for limit in limits if limit.name == LATENCY and limit.kept is False), None)
