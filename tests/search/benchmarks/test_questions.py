"""The benchmark that asks a run's agent under new budgets, and searches each afresh."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from secateur.envs.core import Budget, InputError
from secateur.search.ask import answer
from secateur.search.benchmarks.questions import (
    agent_name,
    answer_questions,
    draw_questions,
    question_report,
    shared_config,
    shared_experience,
)
from secateur.search.benchmarks.records import Records
from secateur.search.build import build_agent, build_problem, make_env
from secateur.search.config import parse_config
from secateur.search.loop import run_loop
from secateur.search.results.finalize import finalist_scores
from secateur.search.run.local_runner import LocalRunner

OPTIONS = {"warmup": 6, "candidates": 16, "updates": 2, "planned": 4, "hidden": 8, "critics": 2, "goals": 2}
VALUES = {
    "model": {"factory": "secateur.envs.tasks.synthetic:synthetic_net", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "secateur.envs.tasks.synthetic:load", "train": "rest", "calibration": 64, "validation": 200},
    "search": {"agent": "envelope_ddpg", "options": OPTIONS, "evaluations": 12, "workers": 0},
    "space": {"prune_ratio": [0.0, 0.75]},
    "budgets": {"small": {"macs": "<= 60%"}, "tiny": {"macs": "<= 30%"}},
}


@pytest.fixture(scope="module")
def problem():
    return build_problem(parse_config(VALUES, "test.yaml"))


def test_questions_lie_between_the_budgets_of_the_run():
    class Space:
        objectives = ("top1", "macs", "bytes")

        def check(self, budget):
            if budget.limits["macs"] < 10:
                raise InputError("cannot be met")

    budgets = [Budget("a", {"macs": 30.0, "bytes": 5.0}), Budget("b", {"macs": 70.0, "bytes": 9.0}), Budget("c", {"macs": 50.0})]
    questions = draw_questions(Space(), budgets, 20, 0)
    shares = np.array([(q.budget.limits["macs"] - 30) / 40 for q in questions])
    np.testing.assert_allclose(shares, [(q.budget.limits["bytes"] - 5) / 4 for q in questions])
    assert shares.min() >= 0 and shares.max() <= 1 and shares.std() > 0.1
    assert all(q.preference.tolist() == [1, 0, 0] for q in questions[::2])
    assert all(0 < q.preference.min() and q.preference.sum() == pytest.approx(1) for q in questions[1::2])
    again = draw_questions(Space(), budgets, 30, 0)[:20]
    assert [q.budget for q in again] == [q.budget for q in questions], "more questions are more of the same"
    with pytest.raises(InputError, match="at least two that differ"):
        draw_questions(Space(), budgets[:1], 5, 0)
    with pytest.raises(InputError, match="cannot be met"):
        draw_questions(Space(), [budgets[0], Budget("none", {"macs": 1.0, "bytes": 1.0})], 20, 0)


def test_both_answers_are_scored_on_test(problem, tmp_path):
    runner = LocalRunner(partial(make_env, problem))
    agent = build_agent(problem, "envelope_ddpg", OPTIONS, 0)
    run_loop(agent, runner, 12, lambda *_: None)
    agent.finish()
    questions = draw_questions(problem.space, problem.budgets, 2, 0)
    records, told = Records(tmp_path / "results.jsonl", {}), []

    def ask(records, seed=0):
        answer_questions(problem, agent, "envelope_ddpg", seed, runner, questions, 2, 6, records, told.append)

    ask(records)
    assert len(records.rows) == len(told) == 2
    for row, question in zip(records.rows, questions, strict=True):
        for who in ("asked", "searched"):
            shares = row[who]["shares"]
            assert shares["macs"] <= row["limits"]["macs"] + 1e-9
            assert row[who]["test"] == pytest.approx(question.preference @ [row[who]["top1"], -shares["macs"]])
    agent.rng.bit_generator.state = np.random.default_rng(0).bit_generator.state
    best = answer(agent, make_env(problem), questions[0].budget, questions[0].preference, 2)[0]
    assert records.rows[0]["asked"]["top1"] == finalist_scores(problem, best.policy)[1].top1
    assert records.rows[0]["asked"]["validation"] == best.utility
    ask(records)
    assert len(told) == 2, "what is there is not asked again"
    later = Records(tmp_path / "later.jsonl", {})
    later.add(**records.rows[0])
    ask(later)
    assert later.rows[1]["asked"]["top1"] == records.rows[1]["asked"]["top1"], "whatever was asked before"
    searched = [row["searched"] for row in records.rows]
    ask(records, seed=1)
    assert [row["searched"] for row in records.rows] == searched * 2, "one fresh search of a question serves all agents"


def test_the_report_says_who_is_better():
    def row(number, preference, asked, searched, **changes):
        scores = [{"test": test, "validation": test + 0.01, "seconds": 2.0} for test in (asked, searched)]
        known = {"agent": "ddpg", "seed": 0, "question": number, "preference": preference, "asked": scores[0]}
        return {**known, "searched": {**scores[1], "seconds": 40.0}, **changes}

    rows = [row(0, [1.0, 0.0], 0.9, 0.8), row(2, [1.0, 0.0], 0.7, 0.72), row(1, [0.5, 0.5], 0.1, 0.2)]
    lines = question_report(rows, 3, 60).splitlines()
    assert lines[2] == "| 2, top-1 alone | ddpg | 1 | 80.00 | 76.00 | +4.00 ± 6.00 | 1 of 2 | +4.00 | 2.0 | 40.0 |"
    assert lines[3] == "| 1, random preference | ddpg | 1 | 10.00 | 20.00 | -10.00 ± nan | 0 of 1 | -10.00 | 2.0 | 40.0 |"
    rows += [row(0, [1.0, 0.0], 0.84, 0.8, seed=1), row(2, [1.0, 0.0], 0.76, 0.72, seed=1)]
    rows += [row(0, [1.0, 0.0], 0.9, 0.8, agent="b")]
    lines = question_report(rows, 3, 60).splitlines()
    assert lines[2].startswith("| 2, top-1 alone | ddpg | 2 | 80.00 | 76.00 | +4.00 ± 3.00 | 3 of 4 |")
    assert lines[3].startswith("| 1, top-1 alone | b | 1 | 90.00 | 80.00 |")


def test_runs_are_asked_together_if_only_their_agents_differ():
    def config(options=OPTIONS, seed=0, evaluations=12, **sections):
        search = {**VALUES["search"], "options": options, "seed": seed, "evaluations": evaluations}
        return parse_config({**VALUES, "search": search, **sections}, "test.yaml")

    folders = [Path("a"), Path("b")]
    other = config({"hidden": 8, "envelope": True}, evaluations=20)
    assert shared_config(folders, [config(), other]) == shared_config(folders[:1], [other])
    assert agent_name(other) == "envelope_ddpg envelope=true hidden=8"
    with pytest.raises(InputError, match="`budgets.tiny` is null in b, {.*} in a"):
        shared_config(folders, [config(), config(budgets={"small": {"macs": "<= 60%"}})])
    with pytest.raises(InputError, match="b and a are runs of the same agent with the same seed"):
        shared_config(folders, [config(), config(evaluations=20)])
    shared_config(folders, [config(), config(seed=1)])


def test_agents_are_asked_together_if_they_have_learned_from_as_many_evaluations():
    folders, agents = [Path("a"), Path("b")], [SimpleNamespace(learned=300), SimpleNamespace(learned=500)]
    assert shared_experience(folders[:1], agents[:1]) == 300
    with pytest.raises(InputError, match="agent in b has learned from 500 evaluations, the one in a from 300"):
        shared_experience(folders, agents)
