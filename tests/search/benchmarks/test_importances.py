"""The comparison of importances: each has its own scores and search, and is judged on images that no search saw."""

from dataclasses import replace

import numpy as np
import pytest

from secateur.cost_models.core import InputError
from secateur.envs.core import CompressionPolicy
from secateur.envs.evaluator import top1
from secateur.search.benchmarks import importances as measure
from secateur.search.benchmarks.records import Records
from secateur.search.benchmarks.recovered import with_recoveries

GRADES = {"none": (), "least_squares": ("least_squares",)}


@pytest.fixture(autouse=True)
def two_grades(monkeypatch):
    monkeypatch.setattr(measure, "GRADES", GRADES)


@pytest.fixture
def compare(problem, tmp_path, lines):
    def run(importances=("l1_norm", "random"), agents=("uniform", "random"), evaluations=3):
        records = Records(tmp_path / "rows.jsonl", {})
        budget = measure.choose_budget(problem, "half")
        measure.compare_importances(problem, budget, importances, agents, evaluations, records, lines.append)
        return records.rows

    return run


def test_every_importance_and_agent_has_a_row(compare, problem, lines):
    rows = compare()
    assert [(row["importance"], row["agent"]) for row in rows] == [
        ("l1_norm", "uniform"), ("l1_norm", "random"), ("random", "uniform"), ("random", "random")
    ]  # fmt: skip
    assert len(lines) == 4 and [row["evaluations"] for row in rows] == [1, 3, 1, 3]
    assert all(0 < row["macs"] <= 0.5 and set(row["test_top1"]) == set(GRADES) for row in rows)
    assert rows[0]["widths"] == rows[2]["widths"], "one uniform policy, whatever the importance"
    assert rows[0]["test_top1"] != rows[2]["test_top1"], "but not the same channels"


def test_scores_are_those_of_the_importance_and_the_grade_on_test_images(compare, problem):
    row = compare(("random",), ("uniform",), 1)[0]
    rng = np.random.default_rng(problem.config.search.seed)
    scores = tuple(rng.random(group.units) for group in problem.graph.groups)
    layers = len(problem.graph.geometry.layers)
    policy = CompressionPolicy(tuple(row["widths"]), (32,) * layers, (32,) * layers)
    for grade, names in GRADES.items():
        network = with_recoveries(problem.assembler, names, scores=scores).assemble(policy)
        assert row["test_top1"][grade] == top1(network, *problem.data.tensors(problem.data.test))
        if grade == measure.SEARCHED_WITH:
            validation = top1(network, *problem.data.tensors(problem.data.validation))
            assert row["validation_top1"] == pytest.approx(validation, abs=0.006)  # folded batch norms flip a draw


def test_finished_rows_are_not_measured_again(compare, lines, monkeypatch):
    compare(("l1_norm",), ("uniform",))
    rows = compare(("l1_norm", "random"), ("uniform",))
    assert len(rows) == len(lines) == 2
    monkeypatch.setattr(measure, "open_runner", None)
    assert compare(("l1_norm", "random"), ("uniform",)) == rows


def test_a_budget_must_be_named_only_if_there_are_several(problem):
    assert measure.choose_budget(problem, "third").name == "third"
    assert measure.choose_budget(replace(problem, budgets=problem.budgets[:1]), None).name == "half"
    with pytest.raises(InputError, match="There are several budgets; choose one with --budget: half, third"):
        measure.choose_budget(problem, None)
    with pytest.raises(InputError, match="no budget `quarter`"):
        measure.choose_budget(problem, "quarter")


def test_the_table_is_sorted_within_each_agent(problem):
    def row(importance, agent, score):
        scores = {} if score is None else {"none": 0.1, "least_squares": score}
        validation = macs = None if score is None else 0.5
        return {"importance": importance, "agent": agent, "evaluations": 3, "validation_top1": validation, "macs": macs,
                "test_top1": scores}  # fmt: skip

    rows = [row("a", "uniform", 0.5), row("b", "uniform", 0.75), row("a", "bees", 0.9), row("b", "bees", None)]
    report = measure.importance_report(problem, problem.budgets[0], 0.95, rows).splitlines()
    assert report[0] == "| allocation | importance | evaluations | MACs left % | validation | test, none | test, least_squares |"
    assert report[2] == "| uniform | b | 3 | 50.00 | 50.00 | 10.00 | 75.00 |"
    assert report[3].startswith("| uniform | a |") and report[4].startswith("| bees | a |")
    assert report[5] == "| bees | b | 3 | - | - | - | - |"
    assert "macs <= 50 % of dense" in report[-1] and "95.00 on test" in report[-1]
