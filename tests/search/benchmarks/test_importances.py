"""The comparison of importances: each has its own scores and search, and is scored on images that no search saw."""

import numpy as np
import pytest

from secateur.cost_models.core import InputError
from secateur.envs.core import CompressionPolicy
from secateur.search.benchmarks import importances as measure
from secateur.search.benchmarks import policies
from secateur.search.benchmarks.records import Records
from secateur.search.benchmarks.recovery_settings import with_recoveries
from tests.scoring import top1

pytestmark = pytest.mark.usefixtures("two_settings")


@pytest.fixture
def compare(problem, tmp_path):
    """Function (importances, agents, evaluations) -> (lines, rows), on one file."""

    def run(importances, agents, evaluations=1):
        records = Records(tmp_path / "rows.jsonl", {})
        lines = measure.compare_importances(problem, problem.budgets[0], importances, agents, evaluations, records)
        return list(lines), records.rows

    return run


def test_every_importance_and_agent_has_a_row(compare):
    lines, rows = compare(("l1_norm", "random"), ("uniform", "random"), 3)
    assert [(row["importance"], row["agent"]) for row in rows] == [
        ("l1_norm", "uniform"), ("l1_norm", "random"), ("random", "uniform"), ("random", "random")
    ]  # fmt: skip
    assert len(lines) == 4 and [row["evaluations"] for row in rows] == [1, 3, 1, 3]
    assert all(0 < row["macs"] <= 0.5 for row in rows)
    assert rows[0]["widths"] == rows[2]["widths"], "one uniform policy for all importances"


def test_scores_are_those_of_the_importance_and_the_recovery_on_test_images(compare, problem, two_settings):
    _, (row,) = compare(("random",), ("uniform",))
    rng = np.random.default_rng(problem.config.search.seed)
    scores = tuple(rng.random(group.units) for group in problem.graph.groups)
    layers = len(problem.graph.geometry.layers)
    policy = CompressionPolicy(tuple(row["widths"]), (32,) * layers, (32,) * layers)
    networks = {
        name: with_recoveries(problem.assembler, recoveries, scores=scores).assemble(policy)
        for name, recoveries in two_settings.items()
    }
    test, validation = (problem.task.data.tensors(split) for split in (problem.task.data.test, problem.task.data.validation))
    assert row["test_top1"] == {name: top1(network, *test) for name, network in networks.items()}
    expected = top1(networks[measure.SEARCHED_WITH], *validation)
    assert row["validation_top1"] == pytest.approx(expected, abs=0.011)  # folded batch norms may flip a close decision


def test_finished_rows_are_not_measured_again(compare, monkeypatch):
    compare(("l1_norm",), ("uniform",))
    lines, rows = compare(("l1_norm", "random"), ("uniform",))
    assert len(rows) == 2 and len(lines) == 1 and lines[0].startswith("random, uniform, 1 evaluations: none ")
    monkeypatch.setattr(measure, "open_runner", None)
    assert compare(("l1_norm", "random"), ("uniform",)) == ([], rows)


def test_an_agent_without_a_feasible_policy_has_a_row_of_dashes(compare, monkeypatch):
    monkeypatch.setattr(policies, "run_loop", lambda agent, runner, evaluations, on_episode: 1)
    (line,), rows = compare(("random",), ("uniform",))
    assert line.endswith("no feasible policy")
    assert measure.importance_table(rows).splitlines()[2] == "| uniform | random | 1 | - | - | - | - |"


def test_unknown_names_are_refused_before_anything_is_written(settings, tmp_path):
    for importances, agents, place in (
        (["l3_norm"], None, "--importance.*Did you mean"),
        (None, ["uniforn"], "--agent.*Did you"),
    ):
        with pytest.raises(InputError, match=f"(?s){place}"):
            measure.run_importances(settings(), "half", 1, importances, agents, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_table_is_sorted_within_each_agent(problem):
    def row(importance, agent, score):
        return {"importance": importance, "agent": agent, "evaluations": 3, "validation_top1": 0.5, "macs": 0.5,
                "test_top1": {"none": 0.1, "least_squares": score}}  # fmt: skip

    rows = [row("a", "uniform", 0.5), row("b", "uniform", 0.75), row("a", "bees", 0.9)]
    report = measure.importance_report(problem, problem.budgets[0], 0.95, rows).splitlines()
    assert report[0] == "| allocation | importance | evaluations | MACs left % | validation | test, none | test, least_squares |"
    assert report[2] == "| uniform | b | 3 | 50.00 | 50.00 | 10.00 | 75.00 |"
    assert report[3].startswith("| uniform | a |") and report[4].startswith("| bees | a |")
    assert "macs <= 50 % of dense" in report[-1] and "95.00 on test" in report[-1]
