"""`secateur benchmark sensitivities`: how well the sensitivities of single choices rank whole policies.

Random feasible policies of every budget are scored as the search would score them. Spearman's rank correlation compares these
scores with the sum of divergence ** power over all choices (envs/sensitivity.py), which needs no evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from secateur.envs.core import Sensitivities
from secateur.search.benchmarks.policies import random_policies
from secateur.search.benchmarks.records import Records, Row, config_record
from secateur.search.benchmarks.scaffold import ROWS, markdown_table, show_progress, write_results
from secateur.search.build import build_problem, make_env, with_sensitivities
from secateur.search.config import SearchConfig
from secateur.search.correlation import spearman, spearman_interval
from secateur.search.problem import Problem

POWERS = (0.5, 0.75, 1.0)
INTERVAL_POWER = 0.75
"""The power whose correlation is given with its confidence interval."""
MIN_POLICIES = 4
"""Fewer have no confidence interval."""


def run_sensitivities(config: SearchConfig, policies: int, output: Path) -> None:
    """Measure and report; see `compare_sensitivities`.

    Args:
        config: without racing, which would stop evaluations early.
        policies: for each budget.
        output: folder of the results.
    """
    with show_progress() as progress:
        problem = build_problem(config, progress.status)
        records = Records(output / ROWS, {"benchmark": "sensitivities", "config": config_record(config)})
        problem = with_sensitivities(problem, progress.status)
        progress.stop()
        write_results(records, compare_sensitivities(problem, policies, records), partial(sensitivity_report, problem))


def compare_sensitivities(problem: Problem, policies: int, records: Records) -> Iterator[str]:
    """Add a row for every random policy that has none yet; yield each new row as a line of text.

    Args:
        problem: with sensitivities.
        policies: for each budget.
        records: the rows.
    """
    space, evaluator, sensitivities = problem.space.policy_space, make_env(problem).evaluator, _sensitivities(problem)
    for budget in problem.budgets:
        for index, policy in enumerate(random_policies(problem, budget, policies)):
            if records.find(budget=budget.name, policy=index) is not None:
                continue
            divergences = sensitivities(space.levels_to_sequence(space.policy_to_levels(policy))[space.used])
            sums = {str(power): float((divergences**power).sum()) for power in POWERS}
            row = records.add(budget=budget.name, policy=index, top1=evaluator.evaluate(policy).score, sums=sums)
            shown = sums[str(INTERVAL_POWER)]
            yield f"{budget.name}, policy {index}: {100 * row['top1']:.1f} % top-1, sum of sensitivities {shown:.3f}"


def _sensitivities(problem: Problem) -> Sensitivities:
    assert problem.space.sensitivities is not None, "with_sensitivities comes first"
    return problem.space.sensitivities


def sensitivity_report(problem: Problem, rows: Sequence[Row]) -> str:
    """Return the report: correlations by budget and power, and what they were measured on."""
    names = [budget.name for budget in problem.budgets]
    return (
        f"{sensitivity_table(names, rows)}\n\n"
        f"Spearman's rank correlation of top-1 on {problem.dense.images} validation images with minus the sum of "
        f"divergence ** power over {len(problem.space.level_actions)} choices. Measuring the divergences took "
        f"{_sensitivities(problem).seconds:.0f} s. {problem.task.source}\n"
    )


def sensitivity_table(budgets: Sequence[str], rows: Sequence[Row]) -> str:
    """Return one line of Markdown for each budget that has at least `MIN_POLICIES` rows."""
    powers = (f"power {power}" for power in POWERS)
    heads = ["budget", "policies", "top-1 %", *powers, f"95 % interval at {INTERVAL_POWER}"]
    by_budget = {budget: [row for row in rows if row["budget"] == budget] for budget in budgets}
    lines = [_cells(budget, own) for budget, own in by_budget.items() if len(own) >= MIN_POLICIES]
    return markdown_table(heads, lines)


def _cells(budget: str, rows: Sequence[Row]) -> list[str]:
    scores = [row["top1"] for row in rows]
    found = {power: spearman([-row["sums"][str(power)] for row in rows], scores) for power in POWERS}
    low, high = spearman_interval(found[INTERVAL_POWER], len(rows))
    span = f"{100 * min(scores):.1f} to {100 * max(scores):.1f}"
    return [budget, str(len(rows)), span, *(f"{found[power]:.2f}" for power in POWERS), f"{low:.2f} to {high:.2f}"]
