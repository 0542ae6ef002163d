"""The benchmark of the agents reports what their searches found."""

from __future__ import annotations

from functools import partial

import pytest

from secateur.envs.core import InputError
from secateur.search.benchmarks.agent_tables import outcome_line, search_report, summary
from secateur.search.benchmarks.agents import Contestant, contestant, run_contestants
from secateur.search.benchmarks.records import Records
from secateur.search.build import build_agent, build_front, build_problem, make_env
from secateur.search.loop import run_loop
from secateur.search.results.finalize import finalize
from secateur.search.run.local_runner import LocalRunner
from tests.scoring import top1

EVALUATIONS = 8
SECTIONS = {
    "search": {"agent": "random", "evaluations": EVALUATIONS, "workers": 0},
    "space": {"prune_ratio": [0.0, 0.75], "weight_bits": [4, 8], "activation_bits": [8]},
    "budgets": {"small": {"macs": "<= 50%"}, "tiny": {"macs": "<= 30%", "weight_bytes": "<= 10%", "top1_drop": "<= 90"}},
    "recovery": ["least_squares"],
    "finalize": {"top": 2},
}


@pytest.fixture(scope="module")
def with_bits(settings):
    return build_problem(settings(**SECTIONS))


@pytest.fixture(scope="module")
def runner(with_bits):
    return LocalRunner(partial(make_env, with_bits))


@pytest.fixture(scope="module")
def records(with_bits, runner, tmp_path_factory):
    """The records of one run of random search."""
    records = Records(tmp_path_factory.mktemp("agents") / "results.jsonl", {})
    lines = list(run_contestants(with_bits, runner, [Contestant("random", "random")], [0], records))
    assert lines == [outcome_line(row) for row in records.rows] and len(lines) == 1
    return records


@pytest.fixture(scope="module")
def search(with_bits, runner):
    """The same search by hand: its front, and its hypervolume after every evaluation."""
    front, volumes = build_front(with_bits), []
    agent = build_agent(with_bits, "random", {}, 0)
    run_loop(agent, runner, EVALUATIONS, lambda _, episode: (front.add(episode), volumes.append(front.hypervolume)))
    return front, volumes


def test_a_row_holds_the_hypervolume_over_the_evaluations(records, search):
    (row,), (_, volumes) = records.rows, search
    assert [point["hypervolume"] for point in row["curve"]] == [volumes[point["evaluations"] - 1] for point in row["curve"]]
    assert row["hypervolume"] == volumes[-1] and row["evaluations"] == EVALUATIONS


def test_winners_are_chosen_on_validation_and_scored_on_test(with_bits, records, search):
    (row,), (front, _) = records.rows, search
    assert list(row["winners"]) == ["small", "tiny"]
    finalists = finalize(with_bits, front, top=2)
    test = with_bits.task.data.tensors(with_bits.task.data.test)
    for name, winner in row["winners"].items():
        first, second = (finalist for finalist in finalists if finalist.budget == name)
        assert first.validation.score >= second.validation.score
        scores = (front.best_score(name), first.validation.score, first.final.score)
        assert (winner["search_score"], winner["validation_score"], winner["test_score"]) == scores
        assert winner["test_score"] == top1(with_bits.finalist_assembler.assemble(first.policy), *test)
        plain = top1(with_bits.assembler.assemble(front.best(name, 1)[0].policy), *test)
        assert winner["plain_test_score"] == pytest.approx(plain, abs=0.02)  # other number format
        assert (tuple(winner["widths"]), tuple(winner["weight_bits"])) == (first.policy.widths, first.policy.weight_bits)


def test_finished_runs_are_not_repeated(with_bits, records):
    assert list(run_contestants(with_bits, None, [Contestant("random", "random")], [0], records)) == []


def test_options_make_a_contestant_of_their_own(settings):
    config = settings(**SECTIONS)
    assert contestant("uniform", config) == Contestant("uniform", "uniform", {})
    given = contestant("envelope_ddpg envelope=false  updates=3", config)
    assert given == Contestant("envelope_ddpg envelope=false updates=3", "envelope_ddpg", {"envelope": False, "updates": 3})
    own = settings(search={**SECTIONS["search"], "options": {"redraws": 5}})
    assert contestant("random", own).options == {"redraws": 5}
    assert contestant('bee_colony "preference=[0.5, 0.5]"', config).options == {"preference": [0.5, 0.5]}
    for wrong in ("envelope_ddpg envelope", "envelope_ddpg envelope=[1,", "envelope_ddpg envelope=@a", 'random "'):
        with pytest.raises(InputError, match="must read like"):
            contestant(wrong, config)
    for wrong in ("nobody", "", "random nothing=1", "random redraws=2020-01-01"):
        with pytest.raises(InputError, match="--agent"):
            contestant(wrong, config)


def test_options_that_do_not_fit_the_problem_are_refused_before_any_run(with_bits, tmp_path):
    records = Records(tmp_path / "results.jsonl", {})
    wrong = Contestant("bee_colony", "bee_colony", {"preference": (1.0,)})
    with pytest.raises(InputError, match="one weight for each of"):
        next(run_contestants(with_bits, None, [Contestant("random", "random"), wrong], [0], records))
    assert not records.rows


def row(agent, seed, tests, hypervolumes=(0.2, 0.4), **changes):
    """A run of 20 evaluations with these test scores of its budgets."""
    scores = {"search_score": 0.5, "plain_test_score": 0.4, "validation_score": 0.6}
    return {
        "agent": agent, "seed": seed, "evaluations": 20, "feasible": 1.0, "hypervolume": hypervolumes[-1], "seconds": 10.0,
        "agent_seconds": 1.0,
        "winners": {name: value and {**scores, "test_score": value} for name, value in tests.items()},
        "curve": [{"evaluations": 10 * (i + 1), "hypervolume": value} for i, value in enumerate(hypervolumes)],
        **changes,
    }  # fmt: skip


def test_tables_give_means_and_spreads_best_first():
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
    assert curves == ["| a | 0.4000 |", "| b | 0.3000 |"], "a run that ended early keeps its last value"
    assert "small 70.00 %, tiny -" in outcome_line(rows[0])
    assert summary([row("c", 0, {"small": 0.9}, (0.3,), evaluations=1)]).endswith("| c | 0.3000 |"), "a single point"


def test_the_report_names_what_was_measured(problem):
    rows = [row("a", 0, {"small": 0.7})]
    report = search_report(problem, 0.9, rows)
    assert (
        report.startswith(summary(rows))
        and f"90.00 % on {len(problem.task.data.test)} test images" in report
        and problem.task.source in report
    )
