"""The table of trainings: every agent's policy is trained with every recipe, for every seed, from the same start."""

from __future__ import annotations

import pytest

from secateur.envs.core import InputError
from secateur.search.benchmarks import policies
from secateur.search.benchmarks.records import Records
from secateur.search.benchmarks.scaffold import show_progress
from secateur.search.benchmarks.training import compare_training, make_plan, training_report
from secateur.search.build import build_problem


def config_of(settings):
    return settings(
        search={"workers": 0},
        recovery=["least_squares"],
        finalize={"training": {"batch_size": 32, "learning_rate": 0.02}},
    )


@pytest.fixture(scope="module")
def measured(settings, tmp_path_factory):
    problem = build_problem(config_of(settings))
    records = Records(tmp_path_factory.mktemp("rows") / "rows.jsonl", {})

    def compare(processes=0, **plan):
        wanted = make_plan(problem.config, agents=("uniform", "random"), evaluations=2, seeds=2, **plan)
        with show_progress() as progress:
            return list(compare_training(problem, problem.budgets[0], wanted, processes, records, progress))

    assert len(compare(epochs=(2,), distillation=(0.9, 0.0))) == len(records.rows) == 2 + 2 * 2 * 2
    return compare, records


def test_trainings_lower_their_loss_from_a_start_within_the_budget(measured):
    for row in measured[1].rows:
        if row["epochs"]:
            assert row["losses"][-1] < row["losses"][0] and not row["note"]
        else:
            assert 0 < row["shares"]["macs"] <= 0.5 and row["evaluations"] <= 2


def test_nothing_is_measured_twice_and_processes_find_the_same(measured):
    compare, records = measured
    assert not compare(epochs=(2,), distillation=(0.9, 0.0))
    kept = records.rows.copy()
    records.rows.remove(next(row for row in records.rows if row["epochs"]))
    assert len(compare(processes=1, epochs=(2,), distillation=(0.9, 0.0))) == 1
    again = records.rows[-1]
    first = next(row for row in kept if row["agent"] == again["agent"] and row.get("recipe") == again["recipe"])
    assert again["losses"] == pytest.approx(first["losses"], rel=1e-4)  # another number of threads sums in another order


def test_the_report_has_means_and_spreads(measured):
    rows = measured[1].rows
    lines = training_report(rows).splitlines()
    assert lines[0] == "| epochs | distillation | uniform | random | minutes |"
    start = next(row for row in rows if row["agent"] == "uniform" and not row["epochs"])
    assert lines[2].startswith(f"| before training |  | {100 * start['test_score']:.2f} |")
    scores = [
        100 * row["test_score"]
        for row in rows
        if row["agent"] == "random" and row["epochs"] and row["recipe"]["distillation"] == 0.9
    ]
    assert f"| {sum(scores) / 2:.2f} ± {abs(scores[0] - scores[1]) / 2**0.5:.2f} |" in lines[4]
    assert "batch_size 32" in lines[-1]


def test_unknown_agents_are_one_sentence(settings):
    with pytest.raises(InputError, match="(?s)--agent.*Did you mean `greedy`"):
        make_plan(config_of(settings), agents=("gredy",))


def test_an_agent_that_finds_nothing_is_one_sentence(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "run_loop", lambda agent, runner, evaluations, on_episode: 1)
    problem = build_problem(config_of(settings))
    records = Records(tmp_path / "rows.jsonl", {})
    plan = make_plan(problem.config, agents=("random",))
    with show_progress() as progress, pytest.raises(InputError, match="Agent `random` finds nothing that fits budget `half`"):
        list(compare_training(problem, problem.budgets[0], plan, 0, records, progress))
    assert not records.rows
