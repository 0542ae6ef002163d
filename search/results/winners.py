"""The winners of a search: exported, and verified by a new process that reads only their files.

A latency table predicts. If it was measured on this machine, verification measures the latency as well. A policy whose measured
latency violates its budget is rejected; the predictions of the budget's other policies are corrected by the same factor, and the
best policy that meets the limit after the correction is tried next.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.envs.core import Budget, CompressionPolicy, InputError
from secateur.search.export.verification import Verification
from secateur.search.export.verify import verify_export, verify_in_fresh_process
from secateur.search.export.write import write_export
from secateur.search.named_code import modules_of
from secateur.search.problem import Problem
from secateur.search.profiling.runtimes import PyTorch
from secateur.search.results.core import Finalist, Outcome, Rejected
from secateur.search.results.finalize import score_finalist
from secateur.search.results.front import Front

log = logging.getLogger(__name__)

EXPORTS = "exports"
LATENCY = "latency_ms"
MOST_REJECTED = 5
"""Largest number of rejected policies of one budget; after that the budget has no winner."""


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
        status: status callback.
        verify: verifies a folder; takes the arguments of `verify_in_fresh_process`.
    """
    return [
        _Trials(problem, front, budget, run, status, verify).run([f for f in finalists if f.budget == budget.name])
        for budget in problem.budgets
    ]


def check_export(problem: Problem, folder: Path, verify: Callable[..., Verification] = verify_in_fresh_process) -> Verification:
    """Verify an export with the runtime of the problem's device: in a fresh process, or here if model and metric are Python
    objects, which no other process has.

    Raises:
        InputError, RuntimeError: as `verify_in_fresh_process` does.
    """
    where: dict[str, Any] = {}
    table = None if problem.device is None else problem.device.table
    # PyTorch executes no ONNX files.
    if table is not None and table.runtime != PyTorch.name:
        where = {"runtime": table.runtime, "threads": table.threads}
    given, config = problem.given, problem.config
    if given is not None:
        return verify_export(folder, factory=given.model, task=given.task, **where)
    return verify(folder, trust=modules_of(config), **where)


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
            violated = _violated_latency(outcome.verification)
            if violated is None:
                outcome.finalists = waiting
                return outcome
            predicted = finalist.validation.costs[LATENCY]
            measured, limit = violated
            outcome.rejected.append(Rejected(finalist, predicted, measured))
            # Both relative to their limits: the measured limit of a share of the dense latency follows the machine's load.
            self.factor = max(self.factor, (measured / limit) / (predicted / self.budget.limits[LATENCY]))
            if outcome.folder is not None:
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
            outcome.verification = check_export(self.problem, folder, self.verify)
        except (InputError, RuntimeError) as error:
            # A long search must not lose its results because a winner cannot be exported or verified.
            log.info("checking the winner of %s failed", self.budget.name, exc_info=True)
            outcome.note = f"The winner of budget '{self.budget.name}' was not checked: {error}"

    def _keeps(self, costs: Mapping[str, float]) -> bool:
        return costs[LATENCY] * self.factor <= self.budget.limits[LATENCY]

    def _next(self, tried: set[CompressionPolicy]) -> list[Finalist]:
        """Return the best policy of the search that meets the corrected limit, as a scored finalist; empty if there is none."""
        for candidate in self.front.best(self.budget.name, self.front.evaluations):
            if candidate.policy not in tried and self._keeps(candidate.evaluation.costs):
                self.status(f"repairing another policy for {self.budget.name}")
                finalist = score_finalist(self.problem, self.budget, candidate)
                if finalist is not None:
                    return [finalist]
                tried.add(candidate.policy)
        return []


def _violated_latency(verification: Verification | None) -> tuple[float, float] | None:
    """Return the measured latency and its limit if it violates the limit; None if it is met, or was not measured."""
    limits = () if verification is None else verification.limits
    violated = next((limit for limit in limits if limit.name == LATENCY and limit.kept is False), None)
    return None if violated is None or violated.found is None else (violated.found, violated.limit)
