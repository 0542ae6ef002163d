"""The benchmark that asks the agents of runs new queries, and runs a fresh search for each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from secateur.envs.core import Budget, InputError
from secateur.search.ask import answer
from secateur.search.benchmarks.queries import (
    Comparison,
    agent_name,
    answer_queries,
    draw_queries,
    shared_config,
    shared_experience,
)
from secateur.search.benchmarks.query_tables import query_report
from secateur.search.benchmarks.records import Records
from secateur.search.build import build_agent, make_env
from secateur.search.loop import run_loop
from secateur.search.results.finalize import finalist_scores
from secateur.search.run.local_runner import LocalRunner

OPTIONS = {"warmup": 4, "candidates": 16, "updates": 2, "planned": 4, "hidden": 8, "critics": 2, "training_budgets": 2}
COLUMNS = ("agent: 3 evaluations each", "bee_colony: 60 each")


@pytest.fixture(scope="module")
def comparison(problem):
    runner = LocalRunner(partial(make_env, problem))
    return Comparison(problem, runner, draw_queries(problem.space, problem.budgets, 2, 0), 2, 4)


@pytest.fixture(scope="module")
def agent(comparison):
    agent = build_agent(comparison.problem, "envelope_ddpg", OPTIONS, 0)
    run_loop(agent, comparison.runner, 6, lambda *_: None)
    agent.finish()
    return agent


@pytest.fixture(scope="module")
def records(comparison, agent, tmp_path_factory):
    """The records of two queries."""
    records = Records(tmp_path_factory.mktemp("queries") / "results.jsonl", {})
    lines = list(answer_queries(comparison, agent, "envelope_ddpg", 0, records))
    assert len(lines) == 2 and lines[1].startswith("envelope_ddpg, seed 0, query 1, macs <= ")
    return records


def test_queries_lie_between_the_budgets_of_the_run():
    class Space:
        objectives = ("top1", "macs", "bytes")

        def check(self, budget):
            if budget.limits["macs"] < 10:
                raise InputError("cannot be met")

    budgets = [Budget("a", {"macs": 30.0, "bytes": 5.0}), Budget("b", {"macs": 70.0, "bytes": 9.0}), Budget("c", {"macs": 50.0})]
    queries = draw_queries(Space(), budgets, 20, 0)
    shares = np.array([(q.budget.limits["macs"] - 30) / 40 for q in queries])
    np.testing.assert_allclose(shares, [(q.budget.limits["bytes"] - 5) / 4 for q in queries])
    assert shares.min() >= 0 and shares.max() <= 1 and shares.std() > 0.1
    assert all(q.preference.tolist() == [1, 0, 0] for q in queries[::2])
    assert all(0 < q.preference.min() and q.preference.sum() == pytest.approx(1) for q in queries[1::2])
    again = draw_queries(Space(), budgets, 30, 0)[:20]
    assert [q.budget for q in again] == [q.budget for q in queries], "the first queries do not depend on their number"
    with pytest.raises(InputError, match="at least two that differ"):
        draw_queries(Space(), budgets[:1], 5, 0)
    with pytest.raises(InputError, match="cannot be met"):
        draw_queries(Space(), [budgets[0], Budget("none", {"macs": 1.0, "bytes": 1.0})], 20, 0)


def test_both_answers_meet_the_query_and_are_scored_on_test(comparison, records):
    for row, query in zip(records.rows, comparison.queries, strict=True):
        for who in ("asked", "searched"):
            shares = row[who]["shares"]
            assert shares["macs"] <= row["limits"]["macs"] + 1e-9
            assert row[who]["test"] == pytest.approx(query.preference @ [row[who]["top1"], -shares["macs"]])


def test_an_answer_is_the_best_measured_proposal(comparison, agent, records):
    problem, query = comparison.problem, comparison.queries[0]
    agent.rng.bit_generator.state = np.random.default_rng(0).bit_generator.state
    best = answer(agent, make_env(problem), query.budget, query.preference, 2)[0]
    assert records.rows[0]["asked"]["top1"] == finalist_scores(problem, best.policy)[1].score
    assert records.rows[0]["asked"]["validation"] == best.utility


def test_finished_queries_are_not_repeated_and_do_not_change_later_answers(comparison, agent, records, tmp_path):
    assert list(answer_queries(comparison, agent, "envelope_ddpg", 0, records)) == []
    later = Records(tmp_path / "later.jsonl", {})
    later.add(**records.rows[0])
    list(answer_queries(comparison, agent, "envelope_ddpg", 0, later))
    assert later.rows[1]["asked"]["top1"] == records.rows[1]["asked"]["top1"]


def test_one_fresh_search_of_a_query_serves_all_agents(comparison, agent, records, tmp_path):
    both = Records(tmp_path / "both.jsonl", {})
    for row in records.rows:
        both.add(**row)
    list(answer_queries(replace(comparison, runner=None), agent, "envelope_ddpg", 1, both))
    assert [row["searched"] for row in both.rows[2:]] == [row["searched"] for row in records.rows]


def test_the_report_says_who_is_better():
    def row(number, preference, asked, searched, **changes):
        scores = [{"test": test, "validation": test + 0.01, "seconds": 2.0} for test in (asked, searched)]
        known = {"agent": "ddpg", "seed": 0, "question": number, "preference": preference, "asked": scores[0]}
        return {**known, "searched": {**scores[1], "seconds": 40.0}, **changes}

    rows = [row(0, [1.0, 0.0], 0.9, 0.8), row(2, [1.0, 0.0], 0.7, 0.72), row(1, [0.5, 0.5], 0.1, 0.2)]
    lines = query_report(rows, COLUMNS).splitlines()
    assert lines[2] == "| 2, top-1 alone | ddpg | 1 | 80.00 | 76.00 | +4.00 ± 6.00 | 1 of 2 | +4.00 | 2.0 | 40.0 |"
    assert lines[3] == "| 1, random preference | ddpg | 1 | 10.00 | 20.00 | -10.00 ± nan | 0 of 1 | -10.00 | 2.0 | 40.0 |"
    rows += [row(0, [1.0, 0.0], 0.84, 0.8, seed=1), row(2, [1.0, 0.0], 0.76, 0.72, seed=1)]
    rows += [row(0, [1.0, 0.0], 0.9, 0.8, agent="b")]
    lines = query_report(rows, COLUMNS).splitlines()
    assert lines[2].startswith("| 2, top-1 alone | ddpg | 2 | 80.00 | 76.00 | +4.00 ± 3.00 | 3 of 4 |")
    assert lines[3].startswith("| 1, top-1 alone | b | 1 | 90.00 | 80.00 |")


def test_runs_are_compared_if_only_their_agents_differ(settings):
    def config(options=OPTIONS, seed=0, evaluations=12, **sections):
        search = {"agent": "envelope_ddpg", "workers": 0, "options": options, "seed": seed, "evaluations": evaluations}
        return settings(search=search, **sections)

    folders = [Path("a"), Path("b")]
    other = config({"hidden": 8, "envelope": True}, evaluations=20)
    assert shared_config(folders, [config(), other]) == shared_config(folders[:1], [other])
    assert agent_name(other) == "envelope_ddpg envelope=true hidden=8"
    with pytest.raises(InputError, match="`budgets.third` is null in b, {.*} in a"):
        shared_config(folders, [config(), config(budgets={"half": {"macs": "<= 50%"}})])
    with pytest.raises(InputError, match="b and a are runs of the same agent with the same seed"):
        shared_config(folders, [config(), config(evaluations=20)])
    shared_config(folders, [config(), config(seed=1)])


def test_agents_are_compared_if_they_have_learned_from_as_many_evaluations():
    folders, agents = [Path("a"), Path("b")], [SimpleNamespace(learned=300), SimpleNamespace(learned=500)]
    assert shared_experience(folders[:1], agents[:1]) == 300
    with pytest.raises(InputError, match="agent in b has learned from 500 evaluations, the one in a from 300"):
        shared_experience(folders, agents)
