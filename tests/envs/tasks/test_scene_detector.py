"""The detector of scenes: which positions find a box, its loss and its answers on constructed outputs, and its training."""

import numpy as np
import pytest
import torch

from secateur.envs.inputs import ImageList
from secateur.envs.tasks.core import Batch
from secateur.envs.tasks.detection import Detection
from secateur.envs.tasks.scene_detector import (
    LARGEST_FINE,
    MOST_BOXES,
    answer,
    assign,
    centerness,
    losses,
    positions,
    scene_detector,
    to_boxes,
)
from secateur.envs.tasks.scenes import digit_scans, draw_scenes
from secateur.envs.tasks.splits import Split, TaskData
from secateur.envs.tasks.training import Recipe, train

GRID = positions(64, 64)
FINE = 16 * 16
"""Positions of the fine level, which come first."""


def scene_task(count=24):
    """Scenes without noise in all splits."""
    pixels, digits = digit_scans()
    scenes = draw_scenes(pixels / 16, digits, np.arange(100), count, 0, 0.0)
    boxes = scenes.boxes.copy()
    boxes[..., 4] -= boxes[..., 4] > 0
    split = Split(scenes.images, boxes)
    return Detection(TaskData(split, split, split, split, (0.0,), (1.0,), 10, tuple("0123456789"), "made up"))


def perfect(targets, certainty=20.0):
    """Raw outputs that answer with the targets: the nearest position of each box knows its class and its edges."""
    count = len(targets)
    raw = {
        "classes": torch.full((count, len(GRID), 10), -certainty),
        "distances": torch.zeros(count, len(GRID), 4),
        "centerness": torch.full((count, len(GRID), 1), -certainty),
    }
    for image, target in enumerate(targets):
        found = assign(target["boxes"], GRID)
        for place in (found >= 0).nonzero().flatten():
            box = target["boxes"][found[place]]
            raw["classes"][image, place, target["labels"][found[place]] - 1] = certainty
            edges = torch.cat([GRID[place, :2] - box[:2], box[2:] - GRID[place, :2]]) / GRID[place, 2]
            raw["distances"][image, place] = edges.expm1().log()  # the inverse of softplus
            raw["centerness"][image, place] = centerness(box[None], GRID[place, None, :2]).logit(eps=1e-6)
    return raw


def test_positions_are_the_centers_of_the_cells():
    assert GRID.shape == (FINE + 8 * 8, 3)
    assert GRID[0].tolist() == [2, 2, 4] and GRID[1].tolist() == [6, 2, 4] and GRID[16].tolist() == [2, 6, 4]
    assert GRID[FINE].tolist() == [4, 4, 8] and GRID[-1].tolist() == [60, 60, 8]
    assert positions(16, 32).shape == (4 * 8 + 2 * 4, 3)


def test_distances_are_in_strides():
    raw = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expm1().log()
    assert to_boxes(raw, torch.tensor([[20.0, 30.0, 4.0]])).tolist()[0] == pytest.approx([16, 22, 32, 46], abs=1e-4)
    assert to_boxes(raw, torch.tensor([[20.0, 30.0, 8.0]])).tolist()[0] == pytest.approx([12, 14, 44, 62], abs=1e-4)


def test_a_box_belongs_to_the_level_of_its_area():
    boxes = torch.tensor([[10.0, 10, 22, 10 + LARGEST_FINE / 12], [30, 30, 42, 31 + LARGEST_FINE / 12]])
    found = assign(boxes, GRID)
    assert set(found[:FINE].tolist()) == {-1, 0} and set(found[FINE:].tolist()) == {-1, 1}
    for index, box in enumerate(boxes):
        points = GRID[found == index]
        center = (box[:2] + box[2:]) / 2
        assert ((points[:, :2] - center).abs() <= 1.5 * points[:, 2:]).all()
        assert (points[:, :2] >= box[:2]).all() and (points[:, :2] <= box[2:]).all()


def test_the_smaller_of_two_boxes_wins_a_position():
    boxes = torch.tensor([[9.5, 9.5, 24.5, 24.5], [13, 13, 21, 21]])
    both, large = assign(boxes, GRID), assign(boxes[:1], GRID)
    # Both have the center 17: the large box has the positions 14, 18 and 22 along each axis, the small one 14 and 18.
    assert (large == 0).sum() == 9 and (both == 1).sum() == 4 and (both == 0).sum() == 9 - 4
    assert (both[large < 0] == -1).all()
    assert (assign(torch.zeros(0, 4), GRID) == -1).all()


def test_every_box_of_the_scenes_has_a_position():
    task = scene_task(60)
    targets = [*task.annotations(torch.from_numpy(task.data.test.labels)), {"boxes": torch.tensor([[6.0, 20, 10, 40]])}]
    for target in targets:
        assert set(range(len(target["boxes"]))) <= set(assign(target["boxes"], GRID).tolist())


def test_centerness_by_hand():
    box = torch.tensor([[0.0, 0, 4, 4]])
    assert centerness(box, torch.tensor([[2.0, 2.0]])).item() == 1
    assert centerness(box, torch.tensor([[1.0, 2.0]])).item() == pytest.approx((1 / 3) ** 0.5)
    assert centerness(box, torch.tensor([[1.0, 1.0]])).item() == pytest.approx(1 / 3)


def test_perfect_outputs_answer_with_the_targets():
    task = scene_task()
    targets = task.annotations(torch.from_numpy(task.data.test.labels))
    raw = perfect(targets)
    for image, target in enumerate(targets):
        given = answer({name: values[image] for name, values in raw.items()}, GRID, (64, 64))
        best = given["scores"] > 0.5  # positions away from the centers give the same boxes, which are left out
        assert sorted(given["labels"][best].tolist()) == sorted(target["labels"].tolist())
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            assert (given["boxes"][given["labels"] == label] - box).abs().amax(1).min() < 1e-2


def test_losses_see_wrong_classes_boxes_and_centerness_alone():
    task = scene_task()
    targets = task.annotations(torch.from_numpy(task.data.test.labels))
    raw = perfect(targets)
    found = losses(raw, GRID, targets)
    assert found["classes"] < 1e-4 and found["boxes"] < 1e-4
    changes = {
        "classes": {"classes": raw["classes"].roll(1, 2)},
        "boxes": {"distances": raw["distances"] + 0.5},
        "centerness": {"centerness": -raw["centerness"]},
    }
    for name, change in changes.items():
        changed = losses(raw | change, GRID, targets)
        assert changed[name] > found[name] + 0.05
        assert all(changed[other] == found[other] for other in found if other != name)


def test_of_overlapping_boxes_of_a_class_the_best_one_is_kept():
    raw = {
        "classes": torch.full((len(GRID), 10), -20.0),
        "distances": torch.full((len(GRID), 4), 3.0),
        "centerness": torch.full((len(GRID), 1), 20.0),
    }
    for place, label, score in ((100, 3, 2.0), (101, 3, 1.0), (102, 7, 0.0), (10, 3, -1.0), (9, 5, -6.0)):
        raw["classes"][place, label] = score
    found = answer(raw, GRID, (64, 64))
    # Position 101 overlaps 100 and has its class, 102 another class; 10 is far away; the score of 9 is too small.
    assert found["labels"].tolist() == [4, 8, 4]
    assert found["scores"].tolist() == pytest.approx(torch.tensor([2.0, 0.0, -1.0]).sigmoid().sqrt().tolist(), abs=1e-4)
    assert found["boxes"].min() >= 0 and found["boxes"].max() <= 64
    everywhere = raw | {"classes": torch.zeros(len(GRID), 10), "distances": torch.full((len(GRID), 4), -1.0)}
    assert len(answer(everywhere, GRID, (64, 64))["boxes"]) == MOST_BOXES


def test_every_parameter_is_trained_and_images_may_be_empty():
    detector = scene_detector((4, 6, 8), 8).train()
    images = list(torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    boxes = [torch.tensor([[4.0, 4, 14, 20], [2, 8, 30, 31]]), torch.zeros(0, 4)]
    targets = [{"boxes": box, "labels": torch.arange(1, len(box) + 1)} for box in boxes]
    sum(detector(images, targets).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in detector.parameters())
    empty = detector(images, targets[1:] * 2)
    assert empty["boxes"] == empty["centerness"] == 0 and empty["classes"] > 0
    detector.eval()
    with torch.no_grad():
        assert [set(found) for found in detector(images)] == [{"boxes", "scores", "labels"}] * 2


@pytest.mark.numerics
def test_a_detector_is_trained_with_its_own_losses():
    task, steps = scene_task(32), []
    recipe = Recipe(epochs=6, batch_size=8, learning_rate=0.005, weight_decay=0.0, shift=0, optimizer="adamw")
    detector = train(scene_detector((8, 8, 8), 8), task, recipe, steps.append)
    assert steps[-1].loss < 0.8 * steps[0].loss and steps[-1].score is None
    with torch.no_grad():
        assert len(ImageList((torch.zeros(2, 1, 64, 64),)).call(detector)) == 2
    batch = Batch(ImageList((torch.from_numpy(task.data.train.images),)), torch.from_numpy(task.data.train.labels))
    assert task.loss(detector.train(), batch) < steps[0].loss
