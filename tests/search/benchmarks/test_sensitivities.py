"""The comparison of sensitivities with scores."""

from dataclasses import replace

import numpy as np
import pytest

from secateur.search.benchmarks.policies import random_policies
from secateur.search.benchmarks.records import Records
from secateur.search.benchmarks.sensitivities import compare_sensitivities, sensitivity_report, sensitivity_table
from secateur.search.build import make_env, with_sensitivities


def test_every_policy_has_a_score_and_its_sums(problem, tmp_path):
    problem = with_sensitivities(problem)
    space = problem.space.policy_space
    few, records = replace(problem, budgets=problem.budgets[:1]), Records(tmp_path / "rows.jsonl", {})
    assert len(list(compare_sensitivities(few, 2, records))) == 2
    lines = list(compare_sensitivities(few, 4, records))
    assert len(lines) == 2 and lines[0].startswith("half, policy 2: "), "finished rows are not measured again"
    for row, policy in zip(records.rows, random_policies(problem, problem.budgets[0], 4), strict=True):
        divergences = problem.space.sensitivities(space.levels_to_sequence(space.policy_to_levels(policy))[space.used])
        assert row["sums"]["0.5"] == pytest.approx(np.sqrt(divergences).sum()) and row["sums"]["1.0"] == divergences.sum()
        assert row["top1"] == make_env(problem).evaluator.evaluate(policy).score
    report = sensitivity_report(problem, records.rows)
    assert "| half | 4 | " in report and "| third |" not in report and problem.task.source in report


def test_correlations_are_those_of_small_sums_with_high_scores():
    rows = [{"budget": "a", "top1": 0.5 - i / 10, "sums": {"0.5": i, "0.75": i**2, "1.0": -i}} for i in range(4)]
    table = sensitivity_table(["a", "b"], [*rows, {**rows[0], "budget": "b"}]).splitlines()
    assert table[2:] == ["| a | 4 | 20.0 to 50.0 | 1.00 | 1.00 | -1.00 | 1.00 to 1.00 |"], "too few policies of b"
