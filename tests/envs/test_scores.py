"""What a search maximizes: the task's metric, or the agreement with the dense model's outputs."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.core import InputError
from secateur.envs.scores.divergence import DivergenceScore, DivergenceScoreConfig
from secateur.envs.scores.metric import MetricScore, MetricScoreConfig
from secateur.envs.tasks.classification import Classification
from secateur.envs.tasks.data import Split
from secateur.envs.tasks.restoration import Restoration
from secateur.envs.tasks.splits import TaskData

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 4), dtype=np.uint8)
LABELS = np.arange(40) % 5


def _task(labels=LABELS):
    return Classification(_data(Split(IMAGES, labels)))


def _data(split):
    return TaskData(
        split, split.at(np.arange(20)), split.at(np.arange(20)), None, (0.5,) * 3, (0.25,) * 3, 5, tuple("abcde"), "test"
    )


def _model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()


def _divergence(task, model, images=8):
    return DivergenceScore(DivergenceScoreConfig(images), task, model, 0.5)


def test_divergence_is_the_mean_kl_divergence_over_the_last_calibration_samples():
    task, model, other = _task(), _model(0), _model(1)
    held = task.data.tensors(task.data.splits["calibration"])[0][-8:]
    with torch.no_grad():
        wanted = F.kl_div(other(held).log_softmax(1), model(held).log_softmax(1), log_target=True, reduction="batchmean")
    found = _divergence(task, model).measure(other)
    assert found.score == pytest.approx(float(wanted), rel=1e-5) and found.samples == 8
    assert found.contributions.shape == (8,)


def test_the_dense_model_has_no_divergence_from_itself_and_full_quality():
    score = _divergence(_task(), _model())
    assert score.measure(_model()).score == pytest.approx(score.dense, abs=1e-6)
    assert score.metric.quality(score.dense, score.dense) == 1 > score.metric.quality(0.2, 0) > score.metric.quality(0.3, 0) > 0


def test_divergence_needs_no_labels():
    first, second = (_divergence(_task(labels), _model(0)).measure(_model(1)).score for labels in (LABELS, LABELS[::-1].copy()))
    assert first == second


def test_divergence_of_images_is_the_relative_squared_error():
    images = IMAGES.astype(np.float32) / 255
    data = _data(Split(images, images))
    score = _divergence(Restoration(data), nn.Identity(), images=4)

    class Shift(nn.Module):
        def forward(self, x):
            return x + 0.1

    held = data.tensors(data.splits["calibration"])[0][-4:]
    assert score.measure(Shift()).score == pytest.approx(float(0.01 / held.var(correction=0)), rel=1e-4)


def test_outputs_that_are_not_finite_are_an_error_and_no_score():
    broken = _model()
    with torch.no_grad():
        broken[1].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="8 of 8 samples are not finite"):
        _divergence(_task(), _model()).measure(broken)


def test_a_score_is_picklable_and_holds_no_more_than_its_samples():
    score = _divergence(_task(), _model(0))
    again = pickle.loads(pickle.dumps(score))
    assert again.measure(_model(1)).score == score.measure(_model(1)).score


@pytest.mark.parametrize(("images", "calibration", "held"), [(256, 1024, 256), (256, 512, 128), (8, 40, 8), (1, 4, 1)])
def test_at_most_a_quarter_of_the_calibration_samples_is_held_out(images, calibration, held):
    assert DivergenceScoreConfig(images).held_out(calibration) == held


def test_too_few_calibration_samples_are_refused():
    with pytest.raises(InputError, match=r"there are 3. Set `data.calibration` to 4 or more, or use `search.score: metric`"):
        DivergenceScoreConfig().held_out(3)


def test_the_metric_is_that_of_the_task_on_the_validation_split():
    task, model = _task(), _model()
    score = MetricScore(MetricScoreConfig(), task, model, 0.25)
    assert score.measure(model).score == task.evaluate(model, "validation").score
    assert (score.metric, score.dense, score.split, MetricScoreConfig().held_out(3)) == (task.metric, 0.25, "validation", 0)
