"""`secateur benchmark importances`: which importance keeps the most accuracy at one budget.

Agents allocate the widths, so that the table also shows how much depends on the allocation and on the recovery.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from secateur.agents import AGENTS
from secateur.envs.core import Budget
from secateur.envs.pruning.importance import IMPORTANCES
from secateur.envs.pruning.importance.core import DenseModel
from secateur.envs.tasks.core import all_samples
from secateur.search.benchmarks.policies import allocate, check_agents, choose_budget
from secateur.search.benchmarks.records import Records, Row, config_record
from secateur.search.benchmarks.recovery_settings import RECOVERY_SETTINGS, calibrated_problem, with_recoveries
from secateur.search.benchmarks.scaffold import ROWS, markdown_table, percent, show_progress, write_results
from secateur.search.benchmarks.timing import timed
from secateur.search.build import build_plugin, open_runner
from secateur.search.config import PluginEntry, SearchConfig, parse_config
from secateur.search.problem import Problem
from secateur.search.results.core import FrontPoint
from secateur.search.results.finalize import dense_test_score

TESTED_WITH = ("none", "least_squares", "sequential")
"""Recovery settings of the test scores, weakest first."""

SEARCHED_WITH = "least_squares"
"""The recovery setting of the validation scores, which choose the policy."""

ALLOCATING_AGENTS = ("uniform", "clr_rnf", "bee_colony")
"""Agents that allocate the widths by default."""


def run_importances(
    config: SearchConfig,
    budget_name: str | None,
    evaluations: int,
    importances: Sequence[str] | None,
    agents: Sequence[str] | None,
    output: Path,
) -> None:
    """Measure and report; see `compare_importances`.

    Args:
        config: its recovery is not used.
        budget_name: may be None if the configuration has only one budget.
        evaluations: of each agent, for each importance.
        importances, agents: names; None: all importances, and `ALLOCATING_AGENTS`.
        output: folder of the results.
    Raises:
        InputError: if a name is unknown, or the folder holds the results of another configuration.
    """
    names = list(importances or IMPORTANCES)
    allocating = list(agents or (name for name in ALLOCATING_AGENTS if name in AGENTS))
    _check_names(config, names, allocating)
    with show_progress() as progress:
        problem = calibrated_problem(config, progress.status)
        budget = choose_budget(problem, budget_name)
        header = {"benchmark": "importances", "config": config_record(config), "budget": budget.name, "evaluations": evaluations}
        records = Records(output / ROWS, header)
        dense = dense_test_score(problem).score
        progress.stop()
        lines = compare_importances(problem, budget, names, allocating, evaluations, records)
        write_results(records, lines, partial(importance_report, problem, budget, dense))


def _check_names(config: SearchConfig, importances: Sequence[str], agents: Sequence[str]) -> None:
    """Raise InputError for an unknown importance or agent, with the nearest known name."""
    values = config.model_dump(mode="json")
    for name in importances:
        parse_config({**values, "importance": name}, "--importance")
    check_agents(config, agents)


def compare_importances(
    problem: Problem,
    budget: Budget,
    importances: Sequence[str],
    agents: Sequence[str],
    evaluations: int,
    records: Records,
) -> Iterator[str]:
    """Add a row for every importance and agent that has none yet; yield each new row as a line of text.

    The agent chooses the widths: it has `evaluations` evaluations on validation images under `SEARCHED_WITH`, and its best
    policy is scored on test images under each of `TESTED_WITH`. `uniform` needs a single evaluation.

    Args:
        problem: from `calibrated_problem`.
        budget: one of its budgets.
        importances, agents: names; with default options.
        evaluations: of each agent.
        records: the rows.
    """
    for name in importances:
        missing = [agent for agent in agents if records.find(importance=name, agent=agent) is None]
        if not missing:
            continue
        seconds, scores = timed(_scores, problem, name)
        assembler = with_recoveries(problem.assembler, RECOVERY_SETTINGS[SEARCHED_WITH], scores=scores)
        task = replace(problem, assembler=assembler, budgets=(budget,))
        runner = open_runner(task)
        try:
            for agent in missing:
                best, done = allocate(task, runner, agent, evaluations)
                found = {"evaluations": done, **_candidate_scores(task, best)}
                yield _line(records.add(importance=name, agent=agent, importance_seconds=seconds, **found))
        finally:
            runner.close()


def _scores(problem: Problem, name: str) -> tuple[np.ndarray, ...]:
    """Return the scores of an importance; each importance has the same generator, so that their order does not matter."""
    images, labels = all_samples(problem.task, "calibration")
    rng = np.random.default_rng(problem.config.search.seed)
    dense = DenseModel(
        problem.assembler.model, problem.graph, problem.assembler.calibration, images, labels, rng, problem.task.loss
    )
    return tuple(build_plugin(IMPORTANCES, PluginEntry(name=name)).scores(dense))


def _candidate_scores(problem: Problem, candidate: FrontPoint | None) -> dict[str, Any]:
    """Return validation and test scores, share of MACs and widths."""
    if candidate is None:
        return {"validation_top1": None, "test_top1": {}, "macs": None, "widths": None}
    networks = {
        name: with_recoveries(problem.assembler, RECOVERY_SETTINGS[name]).assemble(candidate.policy) for name in TESTED_WITH
    }
    return {
        "validation_top1": candidate.evaluation.score,
        "test_top1": {name: problem.task.evaluate(network, "test").score for name, network in networks.items()},
        "macs": candidate.evaluation.costs["macs"] / problem.space.dense_costs["macs"],
        "widths": candidate.policy.widths,
    }


# ---------------------------------------------------------------------------------------------------------------- report


def _line(row: Row) -> str:
    scores = ", ".join(f"{name} {percent(score)}" for name, score in row["test_top1"].items())
    return f"{row['importance']}, {row['agent']}, {row['evaluations']} evaluations: {scores or 'no feasible policy'}"


def importance_table(rows: Sequence[Row]) -> str:
    """Return the results as Markdown: top-1 in percent; for each agent, the best under the strongest recovery first."""
    heads = ["allocation", "importance", "evaluations", "MACs left %", "validation", *(f"test, {name}" for name in TESTED_WITH)]
    agents = list(dict.fromkeys(row["agent"] for row in rows))

    def order(row: Row) -> tuple[int, float]:
        return agents.index(row["agent"]), -row["test_top1"].get(TESTED_WITH[-1], 0.0)

    return markdown_table(heads, [_cells(row) for row in sorted(rows, key=order)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    shares = (row["macs"], row["validation_top1"], *(row["test_top1"].get(name) for name in TESTED_WITH))
    return [row["agent"], row["importance"], str(row["evaluations"]), *map(percent, shares)]


def importance_report(problem: Problem, budget: Budget, dense_top1: float, rows: Sequence[Row]) -> str:
    """Return the table with what it was measured on; `dense_top1` is the dense model's score on the test split."""
    limits = ", ".join(
        f"{cost} <= {100 * limit / problem.space.dense_costs[cost]:g} % of dense" for cost, limit in budget.limits.items()
    )
    notes = (
        f"Budget: {limits}. Top-1 in percent, no fine-tuning. Validation: {problem.dense.images} images, under {SEARCHED_WITH}; "
        f"the policy with the best validation score is scored on {problem.task.samples('test')} test images in float32 under "
        f"each recovery. Dense: {percent(problem.dense.score)} on validation, {percent(dense_top1)} on test. "
        f"Seed {problem.config.search.seed}. {problem.task.source}"
    )
    return f"{importance_table(rows)}\n\n{notes}\n"
