"""The benchmark of the agents reports what their searches found."""

from __future__ import annotations

from functools import partial

import pytest

from secateur.envs.core import InputError
from secateur.envs.evaluator import top1
from secateur.search.benchmarks.agents import Contestant, contestant, outcome_line, run_contestants, search_report, summary
from secateur.search.benchmarks.records import Records
from secateur.search.build import build_agent, build_front, build_problem, make_env
from secateur.search.config import parse_config
from secateur.search.loop import run_loop
from secateur.search.results.finalize import finalist_scores, finalize
from secateur.search.run.local_runner import LocalRunner

VALUES = {
    "model": {"factory": "secateur.envs.tasks.synthetic:synthetic_net", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "secateur.envs.tasks.synthetic:load", "train": "rest", "calibration": 64, "validation": 200},
    "search": {"agent": "random", "evaluations": 6, "workers": 0},
    "space": {"prune_ratio": [0.0, 0.75], "weight_bits": [4, 8], "activation_bits": [8]},
    "budgets": {"small": {"macs": "<= 50%"}, "tiny": {"macs": "<= 30%", "weight_bytes": "<= 10%", "top1_drop": "<= 60"}},
    "finalize": {"top": 2},
}


@pytest.fixture(scope="module")
def problem():
    return build_problem(parse_config(VALUES, "test.yaml"))


def test_winners_are_chosen_on_validation_and_scored_on_test(problem, tmp_path):
    records, told = Records(tmp_path / "results.jsonl", {}), []
    runner = LocalRunner(partial(make_env, problem))
    run_contestants(problem, runner, [Contestant("random", "random")], [0], 8, records, told.append)
    (row,) = records.rows
    assert told == [outcome_line(row)] and list(row["winners"]) == ["small", "tiny"]
    front = build_front(problem)
    agent = build_agent(problem, "random", {}, 0)
    volumes = []
    run_loop(agent, runner, 8, lambda _, episode: (front.add(episode), volumes.append(front.hypervolume)))
    assert [look["hypervolume"] for look in row["curve"]] == [volumes[look["evaluations"] - 1] for look in row["curve"]]
    assert row["hypervolume"] == volumes[-1] and row["evaluations"] == 8
    finalists = finalize(problem, front, top=2)
    for budget in problem.budgets:
        mine = [finalist for finalist in finalists if finalist.budget == budget.name]
        assert len(mine) == 2 and mine[0].validation.top1 >= mine[1].validation.top1
        assert max(finalist.proxy.top1 for finalist in mine) == front.best_top1(budget.name)
        assert all(f.final.fidelity == "final" and f.final.images == len(problem.data.test) for f in mine)
        assert finalist_scores(problem, mine[0].policy)[1].top1 == mine[0].final.top1
        winner = row["winners"][budget.name]
        scores = (front.best_top1(budget.name), mine[0].validation.top1, mine[0].final.top1)
        assert (winner["search_top1"], winner["validation_top1"], winner["test_top1"]) == scores
        images, labels = problem.data.tensors(problem.data.test)
        plain = top1(problem.assembler.assemble(front.best(budget.name, 1)[0].policy), images, labels)
        assert winner["plain_test_top1"] == pytest.approx(plain, abs=0.01)
        assert tuple(winner["widths"]) == mine[0].policy.widths
    run_contestants(problem, runner, [Contestant("random", "random")], [0], 8, records, told.append)
    assert len(records.rows) == len(told) == 1, "what is there is not run again"


def test_options_make_a_contestant_of_their_own():
    config = parse_config(VALUES, "test.yaml")
    assert contestant("uniform", config) == Contestant("uniform", "uniform", {})
    given = contestant("envelope_ddpg envelope=false  updates=3", config)
    assert given == Contestant("envelope_ddpg envelope=false updates=3", "envelope_ddpg", {"envelope": False, "updates": 3})
    own = parse_config({**VALUES, "search": {**VALUES["search"], "options": {"redraws": 5}}}, "test.yaml")
    assert contestant("random", own).options == {"redraws": 5}
    assert contestant('bee_colony "preference=[0.5, 0.5]"', config).options == {"preference": [0.5, 0.5]}
    for wrong in ("envelope_ddpg envelope", "envelope_ddpg envelope=[1,", "envelope_ddpg envelope=@a", 'random "'):
        with pytest.raises(InputError, match="must read like"):
            contestant(wrong, config)
    for wrong in ("nobody", "", "random nothing=1", "random redraws=2020-01-01"):
        with pytest.raises(InputError, match="--agent"):
            contestant(wrong, config)


def test_what_does_not_fit_the_problem_is_refused_before_any_run(problem, tmp_path):
    records = Records(tmp_path / "results.jsonl", {})
    wrong = Contestant("envelope_ddpg", "envelope_ddpg", {"preference": (1.0,)})
    with pytest.raises(InputError, match="one weight for each of"):
        run_contestants(problem, None, [Contestant("random", "random"), wrong], [0], 2, records, print)
    assert not records.rows


def row(agent, seed, tests, hypervolumes=(0.2, 0.4), **changes):
    """A run of 20 evaluations with these test scores of its budgets."""
    scores = {"search_top1": 0.5, "plain_test_top1": 0.4, "validation_top1": 0.6}
    return {
        "agent": agent, "seed": seed, "evaluations": 20, "feasible": 1.0, "hypervolume": hypervolumes[-1], "seconds": 10.0,
        "agent_seconds": 1.0,
        "winners": {name: value and {**scores, "test_top1": value} for name, value in tests.items()},
        "curve": [{"evaluations": 10 * (i + 1), "hypervolume": value} for i, value in enumerate(hypervolumes)],
        **changes,
    }  # fmt: skip


def test_tables_give_means_and_spreads_best_first(problem):
    short = row("b", 0, {"small": 0.95, "tiny": 0.5}, (0.3,), evaluations=10)
    rows = [*(row("a", seed, {"small": 0.70 + seed / 50, "tiny": None}) for seed in range(2)), short]
    budgets, runs, curves = (table.splitlines()[2:] for table in summary(rows).split("\n\n"))
    assert budgets == [
        "| small | b | 1 | 50.00 | 40.00 | 60.00 | 95.00 |",
        "| small | a | 2 | 50.00 ± 0.00 | 40.00 ± 0.00 | 60.00 ± 0.00 | 71.00 ± 1.41 |",
        "| tiny | b | 1 | 50.00 | 40.00 | 60.00 | 50.00 |",
        "| tiny | a | 0 of 2 | - | - | - | - |",
    ]
    assert runs == [
        "| a | 20 | 0.4000 ± 0.0000 | - | - | 100 | 0.50 | 0.05 |",
        "| b | 10 | 0.3000 | 40.00 | 72.50 | 100 | 1.00 | 0.10 |",
    ]
    assert curves == ["| a | 0.4000 |", "| b | 0.3000 |"], "a run that ended early stays where it was"
    assert "macs" not in outcome_line(rows[0]) and "small 70.00, tiny -" in outcome_line(rows[0])
    report = search_report(problem, 0.9, rows)
    assert summary([row("c", 0, {"small": 0.9}, (0.3,), evaluations=1)]).endswith("| c | 0.3000 |"), "a single look"
    assert summary(rows) in report and "90.00 % on" in report and problem.data.source in report
