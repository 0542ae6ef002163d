"""Splits keep their promises, every reader reads its layout, and what cannot be used is said in one sentence."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.envs.core import InputError
from secateur.envs.tasks import readers
from secateur.envs.tasks.classification import Classification
from secateur.envs.tasks.data import Split, TaskData, load_data


def indices_of(split, pool):
    """Return where each image of `split` sits in `pool`; the pixels of the fixtures are unique."""
    known = {image.tobytes(): index for index, image in enumerate(pool)}
    return [known[image.tobytes()] for image in split.images]


@pytest.fixture
def cifar_root(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8) for part in ("train", "test")}
    arrays |= {f"y_{part}": rng.integers(0, 10, 40).astype(np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    return tmp_path, arrays


@pytest.fixture
def folder_root(tmp_path):
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(6):
                color = (200 * label, 10 * index, 0)
                Image.new("RGB", (30, 20), color).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


def test_validation_is_the_first_part_of_the_test_files_and_test_the_rest(cifar_root):
    root, arrays = cifar_root
    data = load_data("cifar10", root, calibration=8, validation=15, train="rest")
    files = arrays["x_test"].transpose(0, 3, 1, 2)
    assert indices_of(data.validation, files) == list(range(15))
    assert indices_of(data.test, files) == list(range(15, 40))
    assert data.validation.labels.tolist() == arrays["y_test"][:15].tolist()
    training_files = arrays["x_train"].transpose(0, 3, 1, 2)
    assert sorted(indices_of(data.train, training_files)) == list(range(40))
    assert set(indices_of(data.calibration, training_files)) <= set(indices_of(data.train, training_files))
    assert "first 15 test images" in data.source


def test_validation_held_out_of_train_is_in_no_other_split(cifar_root):
    root, arrays = cifar_root
    data = load_data("cifar10", root, calibration=10, validation=15, train="rest", validation_from="train")
    training_files = arrays["x_train"].transpose(0, 3, 1, 2)
    held_out = set(indices_of(data.validation, training_files))
    fitting = set(indices_of(data.train, training_files))
    assert len(held_out) == 15 and held_out.isdisjoint(fitting) and len(fitting) == 25
    assert set(indices_of(data.calibration, training_files)) <= fitting
    assert len(data.test) == 40


def test_draw_depends_on_the_seed_alone(cifar_root):
    root, _ = cifar_root
    first, again, other = (load_data("cifar10", root, calibration=9, validation=5, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.calibration.images, again.calibration.images)
    assert not np.array_equal(first.calibration.images, other.calibration.images)


def test_images_become_normalised_tensors(cifar_root):
    root, arrays = cifar_root
    data = load_data("cifar10", root, calibration=4, validation=5, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    images, labels = data.tensors(data.validation)
    expected = (arrays["x_test"][0, 3, 7].astype(float) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 1.0]
    assert images[0, :, 3, 7].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert labels.tolist() == arrays["y_test"][:5].tolist()


def test_digits_need_no_files_and_their_parts_are_disjoint():
    data = load_data("digits", calibration=16, validation=300, train="rest")
    assert (len(data.train), len(data.validation), len(data.test)) == (1000, 300, 497)
    assert data.image_shape == (1, 8, 8) and data.num_classes == 10
    assert data.test.images.max() == 255
    train = {image.tobytes() for image in data.train.images}
    shared = sum(image.tobytes() in train for image in data.test.images)
    assert shared == 0
    assert np.bincount(data.validation.labels, minlength=10).min() > 15  # drawn, not one writer after the other


def test_torchvision_layout_is_read(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]
    batches = {name: rng.integers(0, 256, (4, 3072), dtype=np.uint8) for name in names}
    for name, pixels in batches.items():
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [1, 2, 3, 4]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(index) for index in range(10)]}))
    # The checksums are those of the real archive.
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    data = load_data("cifar10", tmp_path, calibration=20, validation=1)
    assert np.array_equal(data.validation.images[0], batches["test_batch"][0].reshape(3, 32, 32))
    assert len(data.test) == 3


def test_image_folder_is_cropped_shuffled_and_decoded_only_as_far_as_asked(folder_root, monkeypatch):
    decoded = []
    decode = readers.decode_image
    monkeypatch.setattr(readers, "decode_image", lambda path, shape: decoded.append(path) or decode(path, shape))
    data = load_data("image_folder", folder_root, calibration=3, validation=4, test=5, input_shape=(3, 16, 12))
    assert len(decoded) == 12
    assert data.image_shape == (3, 16, 12) and data.classes == ("cat", "dog")
    assert set(data.validation.labels) == {0, 1}
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        assert image[0].min() == image[0].max() == 200 * label


def test_centre_crop_keeps_the_centre(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255  # the crop is the middle 35 of 80 columns
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert readers.decode_image(str(tmp_path / "wide.png"), (3, 35, 35)).min() == 255
    assert readers.decode_image(str(tmp_path / "wide.png"), (1, 35, 35)).shape == (1, 35, 35)


def valid_task():
    return load_data("digits", calibration=4, validation=5, test=6)


def load_for_test(root, calibration, validation, test, train, validation_from, seed):
    assert (root, calibration, validation, test, train, validation_from, seed) == ("x", 7, 8, 9, 0, "test", 3)
    return valid_task()


def load_nothing(**arguments):
    return None


def load_and_fail(**arguments):
    raise KeyError("labels")


@pytest.fixture
def this_module(monkeypatch):
    monkeypatch.syspath_prepend(__file__.rsplit("/", 1)[0])
    return "test_data"


def test_function_of_the_user_gets_the_counts(this_module):
    data = load_data(f"{this_module}:load_for_test", "x", calibration=7, validation=8, test=9, seed=3)
    assert len(data.test) == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "cifar11", "root": "."}, "Did you mean `cifar10`"),
        ({"name": "cifar10", "root": "/nowhere"}, "not a folder"),
        ({"name": "cifar10"}, "`data.root` must name"),
        ({"name": "cifar10", "root": "EMPTY"}, "cifar-10-batches-py"),
        ({"name": "cifar100", "root": "EMPTY"}, "cifar-100-python"),
        ({"name": "fashion_mnist", "root": "EMPTY"}, "FashionMNIST/raw"),
        ({"name": "image_folder", "root": "EMPTY", "input_shape": (3, 8, 8)}, "train/<class>/"),
        ({"name": "image_folder", "root": "EMPTY"}, "needs `model.input"),
        ({"name": "digits", "validation": 800}, "There are 797 test images"),
        ({"name": "digits", "validation": 797}, "too few"),
        ({"name": "digits", "validation": "rest"}, "Only one"),
        ({"name": "digits", "calibration": 1001}, "There are 1000 training images"),
        ({"name": "digits", "calibration": -1}, "`data.calibration`"),
        ({"name": "digits", "train": "all"}, "`data.train`"),
        ({"name": "digits", "test": True}, "`data.test`"),
        ({"name": "digits", "validation_from": "both"}, "validation_from"),
        ({"name": "digits", "validation": 1000, "validation_from": "train"}, "too few"),
        ({"name": "digits", "input_shape": (3, 32, 32)}, "1x8x8"),
        ({"name": "digits", "mean": (0.1, 0.2)}, "one number per channel"),
        ({"name": "digits", "std": (0.0,)}, "above 0"),
        ({"name": "test_data:load_nothing"}, "must return"),
        ({"name": "test_data:load_and_fail"}, "KeyError"),
        ({"name": "test_data:load_nothin"}, "Did you mean `load_nothing`"),
        ({"name": "no_such_module:load"}, "no module `no_such_module`"),
        ({"name": "test_data:"}, "package.module:name"),
    ],
)
def test_bad_input_is_one_sentence_that_names_the_field(arguments, words, tmp_path, this_module):
    if arguments.get("root") == "EMPTY":
        arguments = {**arguments, "root": tmp_path}
    with pytest.raises(InputError) as error:
        load_data(**{"validation": 10, **arguments})
    assert words in str(error.value)
    assert "data." in str(error.value)


def test_damaged_files_are_input_errors(cifar_root, folder_root):
    root, _ = cifar_root
    (root / "cifar10.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match="convert_tiles"):
        load_data("cifar10", root, validation=5)
    (folder_root / "val" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"0\.png is not an image"):
        load_data("image_folder", folder_root, calibration=4, validation=4, input_shape=(3, 8, 8))
    (folder_root / "val" / "cat").rename(folder_root / "val" / "cow")
    with pytest.raises(InputError, match="same classes"):
        load_data("image_folder", folder_root, calibration=4, validation=4, input_shape=(3, 8, 8))


def make_task(labels, num_classes=3, shape=(4, 1, 8, 8), dtype=np.uint8):
    split = Split(np.zeros(shape, dtype), np.array(labels, np.int64))
    return TaskData(split, split, split, None, (0.5,), (0.5,), num_classes, ("a", "b", "c"), "made up")


def test_labels_classes_and_outputs_must_fit():
    assert len(make_task([0, 1, 2, 0]).splits) == 3
    with pytest.raises(InputError, match=r"0\.\.2, but are in 0\.\.3"):
        Classification(make_task([0, 1, 2, 3]))
    with pytest.raises(InputError, match="3 class names"):
        make_task([0, 1, 2, 0], num_classes=4)
    with pytest.raises(InputError, match="4 images, but labels of"):
        make_task([0, 1, 2])
    with pytest.raises(InputError, match="float64"):
        Classification(make_task([0, 1, 2, 0], dtype=np.float64))
    with pytest.raises(InputError, match="1000 outputs, but the data has 3 classes"):
        Classification(make_task([0, 1, 2, 0])).check(torch.zeros(1, 1000))
