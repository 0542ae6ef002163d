"""Metrics: qualities rise with how good a score is, whatever the direction and the range."""

import math

import numpy as np
import pytest

from secateur.cost_models.core import InputError
from secateur.envs.core import Budget, Evaluation
from secateur.envs.metric import TOP1, Metric, loss_of
from secateur.envs.rewards import constraints
from secateur.search.config import BudgetConfig

METRICS = [
    Metric("top1", unit="%", worst=0.0, best=1.0),
    Metric("psnr", unit="dB", worst=0.0),
    Metric("rmse", higher_is_better=False, best=0.0),
    Metric("error", higher_is_better=False, worst=1.0, best=0.0),
    Metric("likelihood"),
    Metric("perplexity", higher_is_better=False),
    Metric("loss", higher_is_better=False, worst=10.0),
]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
@pytest.mark.parametrize("dense", [0.0, 0.7, 30.0])
def test_qualities_rise_with_how_good_a_score_is_and_come_back(metric, dense):
    scores = np.linspace(0.01, 0.99, 20) if metric.best == 1 else np.linspace(0.01, 40, 20)
    best_first = scores[::-1] if metric.higher_is_better else scores
    qualities = [metric.quality(score, dense) for score in best_first]
    assert all(better > worse for better, worse in zip(qualities, qualities[1:], strict=False))
    for score in scores:
        assert metric.score(metric.quality(score, dense), dense) == pytest.approx(score, rel=1e-6, abs=1e-6)
    drops = [metric.drop(score, dense) for score in best_first]
    assert drops == sorted(drops)


def test_a_share_is_its_own_quality_and_a_psnr_is_relative_to_the_dense_one():
    assert TOP1.quality(0.93, 0.95) == 0.93
    assert METRICS[1].quality(15.0, 30.0) == 0.5
    assert METRICS[2].quality(2.0, 2.0) == 0.5 and METRICS[2].quality(0.0, 2.0) == 1
    assert METRICS[4].quality(-3.0, -3.0) == 0.5


def test_a_loss_of_quality_is_a_difference_of_scores():
    assert loss_of(TOP1, 0.01, 0.9, 0.95) == pytest.approx(0.01)
    assert loss_of(METRICS[1], 0.01, 28.0, 30.0) == pytest.approx(0.3)
    assert loss_of(METRICS[2], 0.01, 2.0, 2.0) > 0, "a larger error"


def test_scores_are_shown_with_their_unit():
    assert (TOP1.text(0.9325), TOP1.difference(0.015), TOP1.label) == ("93.25 %", "1.5 points", "top-1")
    assert (METRICS[1].text(31.4159), METRICS[1].difference(0.2)) == ("31.42 dB", "0.2 dB")
    assert METRICS[2].text(0.5) == "0.5"


@pytest.mark.parametrize("name", ["", "a b", "1st", "images", "metric", None, "x" * 3 + "-"])
def test_names_that_columns_could_not_carry_are_refused(name):
    with pytest.raises(InputError, match="letters, digits and underscores"):
        Metric(name)


def test_ends_in_the_wrong_order_are_refused():
    with pytest.raises(InputError, match="lower is better, so its best score must be lower"):
        Metric("error", higher_is_better=False, worst=0.0, best=1.0)


@pytest.mark.parametrize(("metric", "words", "limit"), [(TOP1, "top1_drop", 0.015), (METRICS[1], "psnr_drop", 1.5)])
def test_a_budget_limits_the_loss_in_the_metrics_own_unit(metric, words, limit):
    for name in (words, "metric_drop"):
        assert BudgetConfig({"macs": "<= 40%", name: "<= 1.5"}).metric_drop(metric) == pytest.approx(limit)
    with pytest.raises(InputError, match=f"write `{words}`"):
        BudgetConfig({"miou_drop": "<= 1"}).metric_drop(metric)
    with pytest.raises(ValueError, match="the loss of one metric"):
        BudgetConfig({"metric_drop": "<= 1", words: "<= 2"})


def test_an_error_that_grows_is_a_drop():
    budget = Budget("phone", {"macs": 10.0}, metric_drop=0.5)
    slacks = constraints(Evaluation(2.4, {"macs": 5.0}), budget, METRICS[2], 2.0)
    assert slacks == {"macs": -0.5, "rmse_drop": pytest.approx(-0.2)}
    assert constraints(Evaluation(3.0, {"macs": 5.0}), budget, METRICS[2], 2.0)["rmse_drop"] == pytest.approx(1.0)
    assert math.isnan(Evaluation(float("nan"), {}).quality)
