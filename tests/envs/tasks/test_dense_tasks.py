"""Scores of segmentation and restoration against numbers computed by hand and by torchmetrics, and training with their losses."""

import numpy as np
import pytest
import torch
from torch import nn

from secateur.envs.tasks.core import Batch
from secateur.envs.tasks.data import Split, TaskData
from secateur.envs.tasks.restoration import Restoration, RestorationConfig
from secateur.envs.tasks.segmentation import Segmentation
from secateur.envs.tasks.training import Recipe, cached_weights, train


def task_data(images, targets, classes):
    split, names = Split(images.astype(np.float32), targets), tuple(map(str, range(classes)))
    return TaskData(split, split, split, split, (0.0,), (1.0,), classes, names, "made up")


def segmentation(targets, classes):
    return Segmentation(task_data(np.zeros((len(targets), 1, *targets.shape[1:])), targets, classes))


def scores_of(predicted, classes):
    """Class scores whose largest one is the predicted class."""
    return torch.nn.functional.one_hot(torch.from_numpy(predicted).long(), classes).movedim(-1, 1).float()


def test_miou_by_hand():
    targets = np.array([[[0, 0], [1, 1]], [[0, 2], [2, 255]]], np.uint8)
    predicted = np.array([[[0, 1], [1, 1]], [[0, 2], [0, 2]]], np.uint8)
    task = segmentation(targets, 4)
    found = task.summarize(task.statistics(scores_of(predicted, 4), torch.from_numpy(targets)))
    # Class 0: 2 of 4 pixels, class 1: 2 of 3, class 2: 1 of 2. Class 3 does not occur, and the pixel 255 does not count.
    assert found.score == pytest.approx((2 / 4 + 2 / 3 + 1 / 2) / 3)
    assert found.others["iou_worst_class"] == pytest.approx(1 / 2) and found.samples == 2


def test_miou_is_that_of_torchmetrics():
    segmentation_metrics = pytest.importorskip("torchmetrics.segmentation")
    rng = np.random.default_rng(0)
    targets, predicted = rng.integers(0, 5, (2, 12, 16, 16)).astype(np.uint8)
    predicted = np.where(rng.random(targets.shape) < 0.6, targets, predicted)
    reference = segmentation_metrics.MeanIoU(5, input_format="index", per_class=True)
    # All images as one tall image: torchmetrics takes the mean over images, and we sum the pixels of all images.
    tall = [torch.from_numpy(x.reshape(1, -1, 16)).long() for x in (predicted, targets)]
    task = segmentation(targets, 5)
    found = task.summarize(task.statistics(scores_of(predicted, 5), torch.from_numpy(targets)))
    assert found.score == pytest.approx(float(reference(*tall).mean()), abs=1e-6)


def test_psnr_by_hand():
    targets = np.full((2, 1, 4, 4), 0.5, np.float32)
    outputs = torch.full((2, 1, 4, 4), 0.6)
    outputs[1] = 0.51
    outputs[:, :, 0] = 9.0  # the border does not count
    task = Restoration(task_data(np.zeros((2, 1, 4, 4)), targets, 0), RestorationConfig(border=1))
    found = task.summarize(task.statistics(outputs, torch.from_numpy(targets)))
    assert found.contributions == pytest.approx([20, 40], abs=1e-3) and found.score == pytest.approx(30, abs=1e-3)
    with_range = Restoration(task.data, RestorationConfig(border=1, range=10.0))
    assert with_range.summarize(with_range.statistics(outputs, torch.from_numpy(targets))).score == pytest.approx(50, abs=1e-3)


def test_a_perfect_image_has_the_largest_psnr():
    targets = np.zeros((1, 1, 4, 4), np.float32)
    task = Restoration(task_data(targets, targets, 0))
    assert task.statistics(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)) == pytest.approx(100)


def bright_pixels(count=64):
    """Images, and which pixels are bright."""
    images = np.random.default_rng(0).uniform(-1, 1, (count, 1, 6, 6)).astype(np.float32)
    return images, (images[:, 0] > 0).astype(np.uint8)


def test_a_network_is_trained_with_the_loss_of_its_task():
    images, targets = bright_pixels()
    steps = []
    recipe = Recipe(epochs=5, batch_size=8, learning_rate=0.1, weight_decay=0.0, shift=0, optimizer="adamw")
    task = Segmentation(task_data(images, targets, 2))
    network = train(nn.Conv2d(1, 2, 1), task, recipe, steps.append)
    assert task.evaluate(network, "test").score > 0.9
    assert steps[-1].loss < steps[0].loss and steps[-1].score > 0.9
    inverse = Restoration(task_data(images, -images, 0))
    network = train(nn.Conv2d(1, 1, 1), inverse, recipe, steps.append)
    assert inverse.evaluate(network, "test").score > 20
    assert inverse.loss(network, Batch(torch.ones(1, 1, 2, 2), -torch.ones(1, 1, 2, 2))) < 0.1


def test_weights_are_cached_by_task(tmp_path):
    images, targets = bright_pixels(8)
    recipe = Recipe(epochs=1, shift=0)
    data = task_data(images, targets[:, None].astype(np.float32), 0)
    paths = {
        cached_weights("tiny", nn.Conv2d(1, 1, 1), task, recipe, None, tmp_path)
        for task in (Restoration(data), Restoration(data), Restoration(data, RestorationConfig(border=1)))
    }
    assert len(paths) == 2
