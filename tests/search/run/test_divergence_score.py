"""A search that maximizes agreement with the dense model: documents name both scores, the metric decides among finalists."""

import numpy as np
import pytest

import secateur
from secateur.envs.core import InputError
from secateur.envs.recovery.least_squares import LeastSquares
from secateur.envs.recovery.sequential import Sequential
from secateur.search.build import build_problem, make_env, prepare
from secateur.search.config import parse_config
from secateur.search.results.document import read_front
from secateur.search.run.search import resume, search
from secateur.search.run.study import load_study

VALUES = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "train": "rest", "calibration": 64, "validation": 100},
    "search": {"agent": "random", "evaluations": 6, "workers": 0, "score": "divergence"},
    "space": {"prune_ratio": [0.0, 0.75]},
    "recovery": ["least_squares"],
    "budgets": {"small": {"macs": "<= 50%"}, "good": {"macs": "<= 90%", "top1_drop": "<= 90"}},
    "finalize": {"top": 2, "verify": False, "recovery": ["least_squares"]},
}


def settings(**changes):
    return parse_config({**VALUES, **changes}, "test.yaml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return search(settings(output={"root": str(tmp_path_factory.mktemp("runs"))}))


def test_documents_name_what_they_hold(run):
    document, study = read_front(run), load_study(run)
    assert document["search"] == {"metric": document["search"]["metric"], "split": "calibration", "dense_score": 0.0}
    assert document["search"]["metric"]["name"] == study.user_attrs["objectives"][0] == "divergence"
    assert study.directions[0].name == "MINIMIZE"
    assert document["metric"]["name"] == "top1" and document["dense"]["score"] > 0.5
    front = secateur.load_run(run).front
    assert {"calibration_divergence", "finalist_validation_top1", "test_top1"} <= set(front)
    assert "validation_top1" not in front


def test_the_best_of_the_search_are_the_least_divergent_ones_and_the_winner_has_the_best_metric(run):
    document = read_front(run)
    fits = [point for point in document["points"] if "small" in point["fits"]]
    tested = [point for point in document["final"]["points"] if point["budget"] == "small"]
    least = sorted(point["score"] for point in fits)[: len(tested)]
    by_number = {point["evaluation"]: point["score"] for point in document["points"]}
    assert sorted(by_number[point["evaluation"]] for point in tested) == least
    scores = [point["validation_score"] for point in tested]
    assert scores == sorted(scores, reverse=True)
    assert secateur.load_run(run).best("small").validation_score == scores[0]


def test_a_limit_of_the_metrics_loss_holds_for_finalists_only(run, tmp_path):
    assert "top1_drop" not in load_study(run).user_attrs["constraint_names"]
    assert all(trial.user_attrs["feasible"] for trial in load_study(run).trials)
    strict = {"good": {"macs": "<= 40%", "top1_drop": "<= 0.0001"}}
    found = read_front(search(settings(output={"root": str(tmp_path)}, budgets=strict)))
    dense = found["dense"]["score"]
    assert found["budgets"]["good"]["metric_drop"] == pytest.approx(1e-6)
    assert all(dense - point["validation_score"] <= 1e-6 for point in found["final"]["points"])


def test_a_resumed_run_equals_one_that_was_not_stopped(run, tmp_path):
    whole = read_front(run)
    part = search(settings(output={"root": str(tmp_path)}, search={**VALUES["search"], "evaluations": 3}))
    resumed = read_front(resume(part, {"search.evaluations": 6}))
    assert [(p["policy"], p["score"]) for p in resumed["points"]] == [(p["policy"], p["score"]) for p in whole["points"]]


def test_recoveries_do_not_see_the_images_of_the_score():
    problem, plain = build_problem(settings()), build_problem(settings(search={**VALUES["search"], "score": "metric"}))
    seen, every = problem.assembler.images, plain.assembler.images
    assert len(seen) == 48 and len(every) == 64 and np.array_equal(seen, every[:48])


def test_sensitivities_are_measured_under_the_quick_repair():
    problem = prepare(build_problem(settings(recovery=["sequential"])), "greedy", {})
    quick = prepare(build_problem(settings()), "greedy", {})
    assert np.array_equal(problem.space.sensitivities.curves, quick.space.sensitivities.curves)
    assert isinstance(make_env(problem).evaluator.assembler.recoveries[0], Sequential)
    assert isinstance(make_env(quick).evaluator.assembler.recoveries[0], LeastSquares)


def test_a_divergence_without_calibration_samples_is_refused():
    with pytest.raises(InputError, match="calibration"):
        build_problem(settings(data={**VALUES["data"], "calibration": 0}, recovery=["data_free"], finalize={"recovery": []}))


def test_an_unknown_score_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="unknown name .got divergense.. Did you mean `divergence`"):
        settings(search={**VALUES["search"], "score": "divergense"})
