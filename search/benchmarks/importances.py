"""Which importance keeps the most accuracy at one budget, and how much of that depends on allocation and recovery."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from secateur.envs.core import Budget, CompressionPolicy, Evaluation, InputError
from secateur.envs.evaluator import top1
from secateur.envs.pruning.importance import IMPORTANCES
from secateur.envs.pruning.importance.core import DenseModel
from secateur.search.benchmarks.records import Records
from secateur.search.benchmarks.recovered import with_recoveries
from secateur.search.build import build_agent, build_front, build_plugin, open_runner, prepare
from secateur.search.config import PluginEntry
from secateur.search.loop import Runner, run_loop
from secateur.search.problem import Problem

GRADES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "least_squares": ("least_squares",),
    "sequential": ("sequential",),
}
"""Recoveries that the chosen policies are scored under, by the heading of their column."""

ALLOCATING_AGENTS = ("uniform", "clr_rnf", "bee_colony")
"""Who allocates the widths unless others are asked for; those that are not registered are left out."""

SEARCHED_WITH = "least_squares"
"""The recovery behind the validation scores that choose."""


def choose_budget(problem: Problem, name: str | None) -> Budget:
    """Return the budget of that name, or the only one.

    Raises:
        InputError: if there is none of that name, or several and no name.
    """
    budgets = {budget.name: budget for budget in problem.budgets}
    if name is None and len(budgets) == 1:
        return problem.budgets[0]
    if name not in budgets:
        asked = f"There is no budget `{name}`" if name else "There are several budgets"
        raise InputError(f"{asked}; choose one with --budget: {', '.join(budgets)}.")
    return budgets[name]


def compare_importances(
    problem: Problem,
    budget: Budget,
    importances: Sequence[str],
    agents: Sequence[str],
    evaluations: int,
    records: Records,
    on_row: Callable[[str], None],
) -> None:
    """Add a row to `records` for every importance and agent, except those that are there already.

    An agent allocates the widths: it has `evaluations` evaluations on validation images under least squares, and its best
    policy is scored on test images under every grade of recovery. `uniform` needs and takes a single one.

    Args:
        problem: from `calibrated_problem`.
        budget: one of its budgets.
        importances, agents: by name; with default options.
        evaluations: of each agent.
        records: the rows.
        on_row: told each row in one line.
    """
    images, labels = problem.data.tensors(problem.data.calibration)
    for name in importances:
        missing = [agent for agent in agents if records.find(importance=name, agent=agent) is None]
        if not missing:
            continue
        start = time.perf_counter()
        scores = _scores(problem, name, images, labels)
        seconds = time.perf_counter() - start
        assembler = with_recoveries(problem.assembler, GRADES[SEARCHED_WITH], scores=scores)
        task = replace(problem, assembler=assembler, budgets=(budget,))
        runner = open_runner(task)
        try:
            for agent in missing:
                found = _allocate(task, runner, agent, evaluations)
                row = records.add(importance=name, agent=agent, importance_seconds=seconds, **_row(task, *found))
                on_row(_line(row))
        finally:
            runner.close()


def _scores(problem: Problem, name: str, images, labels) -> tuple[np.ndarray, ...]:
    """Return the scores of an importance; each has the same generator, so that their order does not matter."""
    rng = np.random.default_rng(problem.config.search.seed)
    dense = DenseModel(problem.assembler.model, problem.graph, problem.assembler.calibration, images, labels, rng)
    return tuple(build_plugin(IMPORTANCES, PluginEntry(name=name)).scores(dense))


def _allocate(
    task: Problem, runner: Runner, agent: str, evaluations: int
) -> tuple[CompressionPolicy | None, Evaluation | None, int]:
    """Return the agent's best policy, its validation score, and how many episodes were run."""
    front = build_front(task)
    task = prepare(task, agent, {})
    chosen = build_agent(task, agent, {}, task.config.search.seed)
    done = run_loop(chosen, runner, evaluations, lambda actor, episode: front.add(episode))
    best = front.best(task.budgets[0].name, 1)
    return (best[0].policy, best[0].evaluation, done) if best else (None, None, done)


def _row(task: Problem, policy: CompressionPolicy | None, validation: Evaluation | None, evaluations: int) -> dict[str, Any]:
    if policy is None:
        return {"evaluations": evaluations, "validation_top1": None, "test_top1": {}, "macs": None, "widths": None}
    images, labels = task.data.tensors(task.data.test)
    return {
        "evaluations": evaluations,
        "validation_top1": validation.top1,
        "test_top1": {
            grade: top1(with_recoveries(task.assembler, names).assemble(policy), images, labels)
            for grade, names in GRADES.items()
        },
        "macs": validation.costs["macs"] / task.space.dense_costs["macs"],
        "widths": policy.widths,
    }


def _line(row: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{grade} {_percent(score)}" for grade, score in row["test_top1"].items())
    return f"{row['importance']}, {row['agent']}, {row['evaluations']} evaluations: {scores or 'nothing fits'}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def importance_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as Markdown: top-1 in percent, best under the strongest recovery first within each agent."""
    head = ["allocation", "importance", "evaluations", "MACs left %", "validation", *(f"test, {grade}" for grade in GRADES)]
    table = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    agents = list(dict.fromkeys(row["agent"] for row in rows))
    strongest = list(GRADES)[-1]
    for row in sorted(rows, key=lambda row: (agents.index(row["agent"]), -row["test_top1"].get(strongest, 0.0))):
        scores = [_percent(row["test_top1"].get(grade)) for grade in GRADES]
        cells = [row["agent"], row["importance"], str(row["evaluations"]), _percent(row["macs"])]
        table.append(f"| {' | '.join([*cells, _percent(row['validation_top1']), *scores])} |")
    return "\n".join(table)


def importance_report(problem: Problem, budget: Budget, dense_top1: float, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table with what it was measured on; `dense_top1` is the dense model's on the test split."""
    limits = ", ".join(
        f"{cost} <= {100 * limit / problem.space.dense_costs[cost]:g} % of dense" for cost, limit in budget.limits.items()
    )
    notes = (
        f"Budget: {limits}. Top-1 in percent, no fine-tuning. Validation: {problem.dense.images} images, under "
        f"{SEARCHED_WITH}; its best policy is scored on {len(problem.data.test)} test images in float32 under each "
        f"recovery. Dense: {_percent(problem.dense.top1)} on validation, {_percent(dense_top1)} on test. "
        f"Seed {problem.config.search.seed}. {problem.data.source}"
    )
    return f"{importance_table(rows)}\n\n{notes}\n"
