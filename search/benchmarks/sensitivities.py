"""How well sensitivities of single choices rank whole policies, before any policy was evaluated.

Random feasible policies of every budget are scored as the search would; Spearman's rank correlation says how far the sum over all
choices of divergence ** power (envs/sensitivity.py) orders them as their scores do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.search.benchmarks.agents import markdown_table
from secateur.search.benchmarks.prediction import interval, random_policies, spearman
from secateur.search.benchmarks.records import Records
from secateur.search.build import make_env
from secateur.search.problem import Problem

POWERS = (0.5, 0.75, 1.0)


def compare_sensitivities(problem: Problem, policies: int, records: Records, on_row: Callable[[str], None]) -> None:
    """Add a row for every random policy that has none yet.

    Args:
        problem: with sensitivities.
        policies: per budget.
        records: the rows.
        on_row: told each row in one line.
    """
    space, evaluator = problem.space, make_env(problem).evaluator
    choices = space.policy_space
    for budget in problem.budgets:
        for index, policy in enumerate(random_policies(problem, budget, policies)):
            if records.find(budget=budget.name, policy=index) is not None:
                continue
            alone = space.sensitivities(choices.levels_to_sequence(choices.policy_to_levels(policy))[choices.used])
            sums = {str(power): float((alone**power).sum()) for power in POWERS}
            row = records.add(budget=budget.name, policy=index, top1=evaluator.evaluate(policy).top1, sums=sums)
            on_row(f"{budget.name}, policy {index}: {100 * row['top1']:.1f} % top-1, sensitivities {sums['0.75']:.3f}")


def sensitivity_report(problem: Problem, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return results.md: correlations by budget and power, and what they were measured on."""
    heads = ["budget", "policies", "top-1 %", *(f"power {power}" for power in POWERS), "95 % interval at 0.75"]
    lines = []
    for budget in problem.budgets:
        own = [row for row in rows if row["budget"] == budget.name]
        if len(own) < 4:
            continue
        scores = [row["top1"] for row in own]
        found = {power: spearman([-row["sums"][str(power)] for row in own], scores) for power in POWERS}
        low, high = interval(found[0.75], len(own))
        span = f"{100 * min(scores):.1f} to {100 * max(scores):.1f}"
        lines.append([
            budget.name, str(len(own)), span, *(f"{found[power]:.2f}" for power in POWERS), f"{low:.2f} to {high:.2f}",
        ])  # fmt: skip
    return (
        f"{markdown_table(heads, lines)}\n\n"
        f"Spearman's rank correlation of top-1 on {problem.dense.images} validation images with minus the sum of "
        f"divergence ** power over {len(problem.space.level_actions)} choices, whose measurement took "
        f"{problem.space.sensitivities.seconds:.0f} s. {problem.data.source}\n"
    )
