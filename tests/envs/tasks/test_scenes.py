"""The generated scenes: always the same, with masks and boxes that fit the images, and without a scan in two splits."""

import numpy as np
import pytest
import torch

from secateur.envs.tasks.data import load_data
from secateur.envs.tasks.scenes import MOST_DIGITS, SIZE, TEST_SCENES, TRAIN_SCENES, digit_scans, digit_scenes, draw_scenes


@pytest.fixture(scope="module")
def parts():
    return digit_scenes()


def few(seed=0, noise=0.0, count=20):
    pixels, digits = digit_scans()
    return draw_scenes(pixels / 16, digits, np.arange(50), count, seed, noise)


def test_scenes_depend_on_their_seed_alone():
    first, again, other = few(), few(), few(seed=1)
    for name in ("images", "masks", "boxes", "scans"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))


def test_noise_changes_the_pixels_only():
    clean, noisy = few(), few(noise=0.1)
    assert np.array_equal(clean.boxes, noisy.boxes) and np.array_equal(clean.masks, noisy.masks)
    assert 0.05 < np.std(noisy.images - clean.images) < 0.11
    assert noisy.images.min() >= 0 and noisy.images.max() <= 1


def test_shapes_and_ranges(parts):
    for scenes, count in zip(parts, (TRAIN_SCENES, TEST_SCENES), strict=True):
        assert scenes.images.shape == (count, 1, SIZE, SIZE) and scenes.images.dtype == np.float32
        assert scenes.masks.shape == (count, SIZE, SIZE) and scenes.masks.dtype == np.uint8
        assert scenes.boxes.shape == (count, MOST_DIGITS, 5)
        assert set(np.unique(scenes.masks)) == set(range(11))
        digits = (scenes.scans >= 0).sum(1)
        assert digits.min() == 1 and digits.max() == MOST_DIGITS


def test_no_scan_is_in_two_splits(parts):
    train, test = parts
    half = TEST_SCENES // 2
    used = [set(scans[scans >= 0].tolist()) for scans in (train.scans, test.scans[:half], test.scans[half:])]
    assert all(len(one) > 100 for one in used)
    assert not (used[0] & used[1] or used[0] & used[2] or used[1] & used[2])


def test_boxes_enclose_the_strokes_of_their_digit(parts):
    _, digits = digit_scans()
    for scene in range(100):
        left_over = parts[0].masks[scene].copy()
        for (left, top, right, bottom, label), scan in zip(parts[0].boxes[scene], parts[0].scans[scene], strict=True):
            if scan < 0:
                assert label == -1 and left == right == 0
                continue
            window = left_over[int(top) : int(bottom), int(left) : int(right)]
            strokes = window == label
            assert label == 1 + digits[scan]
            # The box is tight: its first and last row and column hold strokes.
            assert strokes[0].any() and strokes[-1].any() and strokes[:, 0].any() and strokes[:, -1].any()
            window[strokes] = 0
        assert not left_over.any()


def test_strokes_are_brighter_than_the_paper():
    scenes = few()
    for image, mask in zip(scenes.images[:, 0], scenes.masks, strict=True):
        assert image[mask > 0].min() > image[mask == 0].mean()


def test_segmentation_data(parts):
    data = load_data("digit_scenes", calibration=16, validation=TEST_SCENES // 2, train="rest")
    assert data.num_classes == 11 and data.image_shape == (1, SIZE, SIZE) and len(data.train) == TRAIN_SCENES
    images, masks = data.tensors(data.train)
    assert images.mean().abs() < 0.05 and 0.9 < images.std() < 1.1  # the mean and standard deviation of the reader
    assert np.array_equal(data.validation.labels, parts[1].masks[: TEST_SCENES // 2]) and masks.dtype == torch.uint8


def test_detection_data(parts):
    data = load_data("digit_scene_boxes", calibration=16, validation=TEST_SCENES // 2, train="rest")
    assert data.classes == tuple("0123456789") and len(data.train) == TRAIN_SCENES
    boxes, drawn = data.validation.labels, parts[1].boxes[: TEST_SCENES // 2]
    used = drawn[..., 4] >= 0
    assert np.array_equal(boxes[used], drawn[used] - [0, 0, 0, 0, 1]) and (boxes[~used][:, 4] == -1).all()
    assert set(np.unique(boxes[used][:, 4])) == set(range(10))


def test_super_resolution_inputs_are_averages_of_the_targets():
    data = load_data("digit_scenes_x2", calibration=16, validation=50, train=100, test=50)
    assert data.num_classes == 0 and data.image_shape == (1, 32, 32)
    inputs, targets = data.tensors(data.train)
    assert targets.shape == (100, 1, 64, 64) and targets.dtype == inputs.dtype == torch.float32
    corners = targets[:, :, ::2, ::2] + targets[:, :, 1::2, ::2] + targets[:, :, ::2, 1::2] + targets[:, :, 1::2, 1::2]
    assert torch.allclose(inputs, corners / 4, atol=1e-6)
    assert 0 <= targets.min() and targets.max() <= 1


def test_photographs_of_cifar10_are_halved(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(0, 256, (6, 32, 32, 3), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "cifar10.npz", **arrays, y_train=np.zeros(6, np.int64), y_test=np.zeros(6, np.int64))
    data = load_data("cifar10_x2", tmp_path, calibration=2, validation=3, train="rest", input_shape=(3, 16, 16))
    assert data.validation.images.shape == (3, 3, 16, 16)
    assert data.validation.labels == pytest.approx(arrays["x_test"][:3].transpose(0, 3, 1, 2) / 255, abs=1e-6)
    assert data.test.images[0, 1, 2, 5] == pytest.approx(arrays["x_test"][3, 4:6, 10:12, 1].mean() / 255, abs=1e-6)
