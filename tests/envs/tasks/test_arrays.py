"""Arrays in one file as a data set: with training images, and without any, when three splits come from the same images."""

import numpy as np
import pytest
import torch

from secateur.envs.core import InputError
from secateur.envs.tasks.classification import Classification
from secateur.envs.tasks.data import load_data
from secateur.envs.tasks.detection import Detection
from secateur.envs.tasks.regression import Regression
from secateur.envs.tasks.restoration import Restoration
from secateur.envs.tasks.segmentation import Segmentation


def arrays(count=12, part="test", size=(4, 5, 3), classes=6):
    rng = np.random.default_rng(len(part))
    return {
        f"x_{part}": rng.integers(0, 256, (count, *size), dtype=np.uint8),
        f"y_{part}": np.arange(count, dtype=np.uint16) * classes // count,  # sorted by class, as files often are
    }


@pytest.fixture
def write(tmp_path):
    def save(**content):
        np.savez(tmp_path / "images.npz", **content)
        return tmp_path / "images.npz"

    return save


def places(split, images):
    """Return where each image of `split` sits among `images` (N, H, W, C)."""
    known = {image.tobytes(): index for index, image in enumerate(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))}
    return [known[image.tobytes()] for image in split.images]


def test_training_and_test_images_are_split_as_always(write):
    content = arrays() | arrays(20, "train")
    data = load_data("arrays", write(**content), calibration=5, validation=4, train="rest", input_shape=(3, 4, 5))
    assert places(data.validation, content["x_test"]) == [0, 1, 2, 3] and len(data.test) == 8
    assert len(data.train) == 20 and len(places(data.calibration, content["x_train"])) == 5
    assert data.classes == ("0", "1", "2", "3", "4", "5") and data.test.labels.dtype == np.int64


def test_without_training_images_three_disjoint_splits_come_from_the_test_images(write):
    content = arrays(60) | {"classes": np.array([f"class {index}" for index in range(6)])}
    path = write(**content)
    data = load_data("arrays", path, calibration=20, validation=10, test="rest", seed=1)
    found = [places(split, content["x_test"]) for split in (data.calibration, data.validation, data.test)]
    assert [len(part) for part in found] == [20, 10, 30] and sorted(sum(found, [])) == list(range(60))
    for split, indices in zip((data.calibration, data.validation, data.test), found, strict=True):
        assert split.labels.tolist() == content["y_test"][indices].tolist()
        assert len(set(split.labels)) > 3, "drawn: the first images would be of the first classes"
    assert data.train is None and data.classes[2] == "class 2"
    assert "no training images; calibration is 20, validation 10 and test 30 of the 60 test images, disjoint" in data.source
    none = load_data("arrays", path, calibration=0, validation=10)
    assert none.calibration is None and len(none.test) == 50
    other = load_data("arrays", path, calibration=20, validation=10, seed=2)
    assert places(other.test, content["x_test"]) != found[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": "rest"}, r"no training images, so `data.train` must be 0 \(got rest\)"),
        ({"validation_from": "train"}, r'`data.validation_from` "test" \(got "train"\)'),
        ({"calibration": 10}, "There are 12 test images, too few for `data.calibration: 10`, `data.validation: 4`"),
        ({"calibration": "rest", "test": "rest"}, "Only one of"),
    ],
)
def test_what_a_file_without_training_images_cannot_give(write, options, words):
    with pytest.raises(InputError, match=words):
        load_data("arrays", write(**arrays()), **{"calibration": 4, "validation": 4, **options})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_test": np.zeros((12, 4, 5, 3), np.float64)}, r"x_test is \(12, 4, 5, 3\) in float64"),
        ({"x_test": np.zeros((12, 4, 5), np.uint8)}, r"x_test is \(12, 4, 5\)"),
        ({"y_test": np.zeros(11, int)}, r"y_test \(11,\)"),
        ({"y_test": np.zeros(12, float)}, "in float64"),
        ({"x_test": np.zeros((12, 4), np.int16)}, "in int16"),
        ({"y_test": np.array([{}] * 12)}, "cannot be read"),
        ({"y_test": np.full(12, 7), "classes": np.array(["a", "b"])}, "must be in 0..1, but are in 7..7"),
    ],
)
def test_files_that_hold_something_else_are_refused(write, change, words):
    with pytest.raises(InputError, match=words):
        Classification(load_data("arrays", write(**arrays() | change), calibration=4, validation=4))


def test_missing_and_damaged_files_are_refused(write, tmp_path):
    for root in (None, tmp_path, tmp_path / "none.npz"):
        with pytest.raises(InputError, match="must name a .npz file"):
            load_data("arrays", root, calibration=4, validation=4)
    with pytest.raises(InputError, match="has no x_test"):
        load_data("arrays", write(**arrays(part="train")), calibration=4, validation=4)
    (tmp_path / "images.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match="cannot be read"):
        load_data("arrays", tmp_path / "images.npz", calibration=4, validation=4)


def test_inputs_and_targets_of_other_tasks_are_read(write):
    rng = np.random.default_rng(0)
    pixels = np.where(rng.random((12, 4, 5)) < 0.1, 255, rng.integers(0, 3, (12, 4, 5))).astype(np.uint8)
    pixels[0, 0, 0] = 2
    data = load_data("arrays", write(**arrays() | {"y_test": pixels}), calibration=4, validation=4)
    assert data.num_classes == 3 and data.validation.labels.shape == (4, 4, 5), "255 is no class"
    Segmentation(data).check(torch.zeros(1, 3, 4, 5))
    numbers = {"x_test": rng.random((12, 7), np.float32), "y_test": rng.random((12, 2), np.float32)}
    data = load_data("arrays", write(**numbers), calibration=4, validation=4)
    assert data.num_classes == 0 and data.image_shape == (7,)
    task = Regression(data)
    (batch,) = task.batches("test")
    assert task.evaluate(lambda x: batch.targets + 0.5, "test").score == pytest.approx(0.5)
    with pytest.raises(InputError, match="needs one class per image"):
        Classification(data)


@pytest.mark.parametrize(
    ("task", "targets", "words"),
    [
        (
            Segmentation,
            np.zeros(12, int),
            r"class of every pixel, whole numbers \(4, 4, 5\), but the targets of `data.\w+` are \(4,\)",
        ),
        (Restoration, np.zeros(12, int), r"images \(N, C, H, W\) in float32 as targets"),
        (Regression, np.zeros(12, int), "needs targets in float32"),
        (Detection, np.zeros((12, 3, 4), np.float32), r"targets \(images, most, 5\) in float32"),
    ],
)
def test_targets_of_another_task_are_refused(write, task, targets, words):
    data = load_data("arrays", write(**arrays() | {"y_test": targets}), calibration=4, validation=4)
    with pytest.raises(InputError, match=words):
        task(data).check(torch.zeros(1, 1, 4, 5))


def test_classes_of_pixels_must_be_known(write):
    pixels = np.zeros((12, 4, 5), np.uint8)
    pixels[:, 0, 0] = 7
    data = load_data(
        "arrays", write(**arrays() | {"y_test": pixels, "classes": np.array(["a", "b"])}), calibration=4, validation=4
    )
    with pytest.raises(InputError, match=r"must be in 0..1, or 255 for no class, but are in 0..7"):
        Segmentation(data).check(torch.zeros(1, 2, 4, 5))
