"""The benchmark of the agents reports what their searches found."""

from __future__ import annotations

import json
from functools import partial

import pytest

from search.benchmarks.agents import Outcome, benchmark_search, outcome_line, summary, write_results
from search.build import build_agent, build_front, build_problem, make_env
from search.config import parse_config
from search.finalize import finalist_scores, finalize
from search.local_runner import LocalRunner
from search.loop import run_loop

VALUES = {
    "model": {"factory": "envs.tasks.synthetic:synthetic_net", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "envs.tasks.synthetic:load", "train": "rest", "calibration": 64, "validation": 200},
    "search": {"agent": "random", "evaluations": 6, "workers": 0},
    "space": {"prune_ratio": [0.0, 0.75], "weight_bits": [4, 8], "activation_bits": [8]},
    "budgets": {"small": {"macs": "<= 50%"}, "tiny": {"macs": "<= 30%", "weight_bytes": "<= 10%", "top1_drop": "<= 60"}},
    "finalize": {"top": 2},
}


@pytest.fixture(scope="module")
def problem():
    return build_problem(parse_config(VALUES, "test.yaml"))


def test_winners_are_chosen_on_validation_and_scored_on_test(problem):
    told = []
    outcomes = benchmark_search(problem, LocalRunner(partial(make_env, problem)), ["random"], [0], 8, told.append)
    assert told == outcomes and [outcome.budget for outcome in outcomes] == ["small", "tiny"]
    front = build_front(problem)
    agent = build_agent(problem, "random", {}, 0)
    run_loop(agent, LocalRunner(partial(make_env, problem)), 8, lambda _, episode: front.add(episode))
    finalists = finalize(problem, front, top=2)
    for outcome, budget in zip(outcomes, problem.budgets, strict=True):
        mine = [finalist for finalist in finalists if finalist.budget == budget.name]
        assert len(mine) == 2 and mine[0].validation.top1 >= mine[1].validation.top1
        assert max(finalist.proxy.top1 for finalist in mine) == front.best_top1(budget.name)
        assert all(f.final.fidelity == "final" and f.final.images == len(problem.data.test) for f in mine)
        assert finalist_scores(problem, mine[0].policy)[1].top1 == mine[0].final.top1
        scores = (mine[0].proxy.top1, mine[0].validation.top1, mine[0].final.top1)
        assert (outcome.search_top1, outcome.validation_top1, outcome.test_top1) == scores


def test_results_are_written_with_the_table(problem, tmp_path):
    outcomes = [
        *(Outcome("a", seed, "small", 0.75, 0.8, 0.70 + seed / 50, 10, 1.0, 0.5) for seed in range(2)),
        Outcome("a", 2, "small", None, None, None, 10, 0.0, 0.0),
        Outcome("b", 0, "small", 0.85, 0.9, 0.95, 10, 1.0, 0.5),
    ]
    lines = summary(outcomes).splitlines()
    assert lines[2].startswith("| small | b | 1 | 10 |") and "| 90.00 | 95.00 |" in lines[2], "the best on test comes first"
    assert "| 2 of 3 |" in lines[3] and "| 71.00 ± 1.41 |" in lines[3]
    assert outcome_line(outcomes[2]).endswith("nothing fits") and "test 95.00 %" in outcome_line(outcomes[3])
    write_results(tmp_path, problem, problem.dense, outcomes)
    record = json.loads((tmp_path / "results.json").read_text())
    assert len(record["outcomes"]) == 4 and record["dense"]["validation_top1"] == problem.dense.top1
    assert summary(outcomes) in (tmp_path / "results.md").read_text()
