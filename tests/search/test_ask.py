"""The agent of a finished search is queried for budgets and preferences that the search did not have."""

import numpy as np
import pytest
from typer.testing import CliRunner

from secateur.envs.core import InputError
from secateur.search import ask as module
from secateur.search.ask import ask
from secateur.search.cli import app
from secateur.search.config import parse_config
from secateur.search.run.search import search

VALUES = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "train": 256, "calibration": 64, "validation": 200},
    "space": {"prune_ratio": [0.0, 0.75]},
    "recovery": [],
    "budgets": {"half": {"macs": "<= 50%"}},
    "finalize": {"top": 1, "verify": False},
}
SMALL = {
    "warmup": 8, "candidates": 8, "training_budgets": 3, "updates": 2, "batch": 8, "planned": 4, "hidden": 8, "critics": 2,
    "lookahead": 2,
}  # fmt: skip


def a_run(folder, agent, options):
    values = {
        **VALUES,
        "search": {
            "agent": agent, "options": options, "evaluations": 12, "workers": 0, "precision": "float32",
        },
        "output": {"root": str(folder)},
    }  # fmt: skip
    return search(parse_config(values, "test.yaml"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return a_run(tmp_path_factory.mktemp("runs"), "envelope_ddpg", SMALL)


@pytest.fixture(scope="module", autouse=True)
def problems_are_built_once():
    """Every query builds the problem of its run, which is always the same."""
    built, build = {}, module.build_problem

    def once(config, *rest):
        key = config.model_dump_json()
        if key not in built:
            built[key] = build(config, *rest)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build_problem", once)
        yield


@pytest.mark.numerics
def test_answers_fit_a_new_budget_and_are_measured(run):
    reply = ask(run, "macs <= 37%, weight_bytes <= 60%", evaluations=2)
    space = reply.problem.space
    assert len(reply.answers) == 2 and reply.answers[0].policy != reply.answers[1].policy
    for answer in reply.answers:
        assert answer.evaluation.costs["macs"] <= 0.37 * space.dense_costs["macs"]
        assert answer.evaluation.costs["weight_bytes"] <= 0.6 * space.dense_costs["weight_bytes"]
        assert answer.evaluation.images == 200
    assert reply.answers[0].utility >= reply.answers[1].utility


@pytest.mark.numerics
def test_a_preference_for_few_macs_finds_fewer(run):
    dear = ask(run, {"macs": "<= 50%"}, evaluations=1).answers[0]
    cheap = ask(run, {"macs": "<= 50%"}, {"macs": 0.95}, evaluations=1).answers[0]
    assert cheap.evaluation.costs["macs"] < dear.evaluation.costs["macs"]


def test_weights_are_shares_and_top1_has_the_rest(run):
    np.testing.assert_allclose(ask(run, "macs<=50%", "macs=0.25", 1).preference, [0.75, 0.25])
    np.testing.assert_allclose(ask(run, "macs<=50%", "macs=1, top1=3", 1).preference, [0.75, 0.25])


@pytest.mark.parametrize(
    ("budget", "preference", "message"),
    [
        ("macs", None, "must read like"),
        ("macs<=10%,macs<=20%", None, "limits a cost twice"),
        ("macz<=10%", None, "Did you mean `macs`"),
        ("macs<=lots", None, "a limit must read like"),
        ("macs<=0.001%", None, "cannot be met"),
        ("macs<=50%", "macs", "must read like"),
        ("macs<=50%", "bops=0.5", "is no objective of this run"),
        ("macs<=50%", "macs=-1", "must be 0 or more"),
        ("macs<=50%", "macs=1.5", "leaves nothing for top1"),
        ("macs<=50%", "top1=0", "some weight must be above 0"),
    ],
)
def test_wrong_queries_are_refused(run, budget, preference, message):
    with pytest.raises(InputError, match=message):
        ask(run, budget, preference)


def test_a_run_of_another_agent_cannot_be_asked(tmp_path):
    with pytest.raises(InputError, match=r"has no agent that can be queried: its search used `random`"):
        ask(a_run(tmp_path, "random", {}), "macs<=50%")


def test_the_verb_prints_what_it_measured(run):
    done = CliRunner().invoke(app, ["ask", str(run), "--budget", "macs<=40%", "--evaluations", "2"])
    assert done.exit_code == 0, done.output
    assert "macs <= " in done.stdout and done.stdout.count("yes") == 2
    wrong = CliRunner().invoke(app, ["ask", str(run), "--budget", "macs=40%"])
    assert wrong.exit_code == 2 and "must read like" in wrong.output
