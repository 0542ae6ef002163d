"""A check of the search's score: its rank correlation with the quality after the finalists' repair, before the search."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from secateur.envs.core import InputError
from secateur.envs.memory import run_model
from secateur.envs.metric import DIVERGENCE, Metric
from secateur.envs.scores import SCORES
from secateur.envs.scores.metric import MetricScoreConfig
from secateur.envs.tasks.core import Metrics, first_inputs
from secateur.search.build import build_problem, with_sensitivities
from secateur.search.cli import app
from secateur.search.config import parse_config
from secateur.search.results.score_check import ScoreCheck, check_lines, compare_ranks, dearer_settings, score_lines
from secateur.search.run.progress import SearchProgress
from secateur.search.run.score_check import check_score, greedy_sequences, near_greedy
from secateur.search.run.search import resume, search
from secateur.search.run.sensitivities import SENSITIVITIES
from secateur.search.run.study import load_study

VALUES = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "train": "rest", "calibration": 64, "validation": 100},
    "search": {"agent": "random", "evaluations": 4, "workers": 0, "check_score": 8, "precision": "float32"},
    "space": {"prune_ratio": [0.0, 0.75], "weight_bits": [4, 8]},
    "recovery": ["least_squares"],
    "budgets": {"small": {"macs": "<= 50%"}, "tiny": {"macs": "<= 30%"}},
    "finalize": {"top": 1, "verify": False, "recovery": ["least_squares"]},
}


def settings(tmp_path=None, **changes):
    values = {**VALUES, "search": {**VALUES["search"], **changes.pop("search", {})}, **changes}
    return parse_config({**values, **({} if tmp_path is None else {"output": {"root": str(tmp_path)}})}, "test.yaml")


class ValidationDivergence:
    """The divergence that the check itself measures after the finalists' repair; with the same recovery, both rank alike."""

    split, metric, dense = "validation", DIVERGENCE, 0.0

    def __init__(self, config, task, model, dense):
        self.task, self.inputs = task, first_inputs(task, "validation", 256)
        self.outputs = [run_model(model, batch).detach() for batch in self.inputs]

    def on(self, device):
        return self

    @torch.inference_mode()
    def measure(self, model, stop=None):
        pairs = zip(self.outputs, (run_model(model, batch) for batch in self.inputs), strict=True)
        each = torch.cat([self.task.divergence(*pair) for pair in pairs]).double().numpy()
        return Metrics(float(each.mean()), len(each))


class Reversed(ValidationDivergence):
    """Prefers the worst policies."""

    metric = Metric("distance", worst=0.0)


@pytest.fixture
def scores(monkeypatch):
    for name, score in (("good", ValidationDivergence), ("reversed", Reversed)):
        monkeypatch.setitem(SCORES, name, (MetricScoreConfig, score))


@pytest.fixture
def checked():
    return ScoreCheck(16, "small", 0.88, (0.62, 0.97), 12.0)


class Notes(SearchProgress):
    def __init__(self):
        from rich.console import Console

        super().__init__(Console(quiet=True))
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def trials(run):
    return [(trial.user_attrs["budget"], trial.params, trial.values) for trial in load_study(run).trials]


def manifest(run):
    return json.loads((run / "manifest.json").read_text())


def test_a_score_that_ranks_like_the_finalists_repair_has_a_correlation_of_one(scores):
    check = check_score(build_problem(settings(search={"score": "good"})))
    assert check.policies == 8 and check.budget == "small" and check.correlation > 0.95 and not check.low
    assert 0.5 < check.interval[0] <= check.interval[1] <= 1


def test_a_score_that_prefers_the_worst_is_found_and_a_dearer_setting_recommended(scores, tmp_path):
    careful = {**VALUES["finalize"], "recovery": ["sequential"]}
    config, progress = settings(tmp_path, search={"score": "reversed"}, finalize=careful), Notes()
    run = search(config, progress)
    assert manifest(run)["score_check"]["correlation"] < 0
    lines = check_lines(run)
    assert lines[0].startswith("the search's score ranks 8 good policies with -") and "write in the configuration" in lines[1]
    assert [note for note in progress.notes if note in lines] == lines
    shown = CliRunner().invoke(app, ["resume", str(run)]).output
    assert all(line in shown for line in lines), "the summary at the end of a search"


def test_policies_near_greedy_are_different_and_within_the_budget():
    problem = with_sensitivities(build_problem(settings()))
    budget = problem.budgets[0]
    drawn = near_greedy(problem, budget, greedy_sequences(problem, budget), 12)
    assert len(drawn) == 12 and len(set(drawn)) > 6
    assert all(problem.space.costs.of_policy(policy)["macs"] <= budget.limits["macs"] for policy in drawn)
    assert near_greedy(problem, budget, greedy_sequences(problem, budget), 6) == drawn[:6]


@pytest.mark.parametrize("agent", ["random", "greedy"])
def test_the_search_is_the_same_as_without_the_check(tmp_path, agent):
    plain = search(settings(tmp_path / "plain", search={"agent": agent, "check_score": 0}))
    checked = search(settings(tmp_path / "checked", search={"agent": agent}))
    assert trials(plain) == trials(checked)
    assert (plain / SENSITIVITIES).exists() == (checked / SENSITIVITIES).exists() == (agent == "greedy")
    assert "score_check" not in manifest(plain) and manifest(checked)["score_check"]["policies"] == 8
    assert check_lines(plain) == []


def test_a_resumed_run_keeps_its_check(tmp_path, monkeypatch):
    run = search(settings(tmp_path))
    before = manifest(run)["score_check"]
    monkeypatch.setattr("secateur.search.run.search.check_score", lambda *_: pytest.fail("measured twice"))
    for changes in ({"search.evaluations": 6}, {"search.check_score": 0}):
        resume(run, changes)
        assert manifest(run)["score_check"] == before


def test_a_run_without_a_check_gets_one_when_it_is_resumed(tmp_path):
    run = search(settings(tmp_path, search={"check_score": 0}))
    resume(run, {"search.check_score": 8})
    assert manifest(run)["score_check"]["policies"] == 8


@pytest.mark.parametrize("value", [1, 3, -4, True, 4.5, "many"])
def test_too_few_policies_are_refused_in_one_sentence(value):
    with pytest.raises(InputError, match=r"search.check_score: .*from 4 on, or 0 for no check") as caught:
        settings(search={"check_score": value})
    assert len(str(caught.value).splitlines()) == 1


def test_policies_that_cannot_be_scored_are_left_out(monkeypatch):
    problem = with_sensitivities(build_problem(settings()))

    class Broken(ValidationDivergence):
        measured = 0

        def measure(self, model, stop=None):
            self.measured += 1
            if self.measured % 2:
                raise ValueError("broken")
            return super().measure(model)

    score = Broken(None, problem.task, problem.assembler.model, 1.0)
    assert check_score(replace(problem, score=score)).policies == 4
    everything = replace(problem, score=Broken(None, problem.task, problem.assembler.model, 1.0))
    monkeypatch.setattr(Broken, "measure", lambda *_: math.nan)
    none = check_score(everything)
    assert (none.policies, none.correlation, none.low) == (0, None, False)
    assert "is not checked: 4 different policies near greedy's are needed for `small`, but 0" in none.line()


def test_ranks_are_compared():
    values = np.linspace(0, 1, 8)
    assert compare_ranks(values, values**3, "it", 0.0).correlation == pytest.approx(1)
    assert compare_ranks(values, -values, "it", 0.0).low
    constant = compare_ranks(np.ones(8), values, "it", 0.0)
    assert constant.correlation is None and constant.low and "all of them have the same score" in constant.line()


def test_the_line_has_correlation_and_interval(checked):
    config = settings()
    assert score_lines(checked, config) == ["the search's score ranks 16 good policies with 0.88 (0.62 to 0.97)"]
    assert len(score_lines(replace(checked, correlation=0.6), config)) == 1
    assert len(score_lines(replace(checked, correlation=0.59), config)) > 1


CHEAP = {"name": "sequential", "options": {"max_images": 128, "samples": 4000}}


@pytest.mark.parametrize(
    "recovery, score, careful, wanted",
    [
        (["least_squares"], "metric", ["sequential"], {"recovery": [CHEAP], "search": {"score": "divergence"}}),
        (["least_squares"], "divergence", ["sequential"], {"recovery": [CHEAP]}),
        ([CHEAP], "divergence", ["sequential"], {"recovery": ["sequential"]}),
        ([CHEAP], "metric", None, {"search": {"score": "divergence"}}),
        (["sequential"], "divergence", ["sequential"], {}),
    ],
)
def test_the_next_dearer_setting(recovery, score, careful, wanted):
    config = settings(recovery=recovery, search={"score": score}, finalize={"recovery": careful})
    assert dearer_settings(config) == wanted


def test_recommended_lines_are_a_configuration(checked):
    config = settings(finalize={"recovery": ["sequential"]})
    sentence, *lines = score_lines(replace(checked, correlation=0.1), config)[1:]
    assert sentence.endswith("write in the configuration:")
    written = yaml.safe_load("\n".join(lines))
    accepted = settings(**written)
    assert accepted.search.score.name == "divergence" and accepted.recovery[0].options == CHEAP["options"]


def test_without_a_dearer_setting_more_samples_are_recommended(checked):
    config = settings(recovery=["sequential"], search={"score": "divergence"}, finalize={"recovery": ["sequential"]})
    assert score_lines(replace(checked, correlation=0.1), config)[-1].endswith("raise `data.calibration`.")


@pytest.mark.parametrize("damage", [3, {"policies": "many"}, {"policies": 8, "budget": "a", "correlation": "x"}])
def test_a_damaged_check_is_named(tmp_path, damage):
    run = search(settings(tmp_path, search={"evaluations": 1}))
    (run / "manifest.json").write_text(json.dumps({**manifest(run), "score_check": damage}))
    with pytest.raises(InputError, match=re.escape("manifest.json is damaged: `score_check")):
        check_lines(run)
