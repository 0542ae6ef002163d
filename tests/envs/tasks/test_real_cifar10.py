"""The published CIFAR-10 weights under our networks; $SECATEUR_DATA holds data/cifar10 (tiles) and weights/cifar10."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.envs.tasks import convert_tiles
from secateur.envs.tasks.data import load_data
from secateur.envs.tasks.models import load_model

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif("SECATEUR_DATA" not in os.environ, reason="needs CIFAR-10 and weights under $SECATEUR_DATA"),
]

TRAIN_SHA256 = "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a"
TEST_SHA256 = "1249626010949d8f448e0faf792debbc3da0c50ed31bfff3678c99c37fbc7e48"


@pytest.fixture(scope="module")
def root():
    return Path(os.environ["SECATEUR_DATA"])


@pytest.fixture(scope="module")
def converted(root, tmp_path_factory):
    target = tmp_path_factory.mktemp("cifar10")
    return target, convert_tiles.convert(root / "data" / "cifar10", target)


def test_converted_pixels_are_the_original_ones(converted):
    folder, digests = converted
    assert digests == {"train": TRAIN_SHA256, "test": TEST_SHA256}
    assert [path.name for path in folder.iterdir()] == ["cifar10.npz"]
    with np.load(folder / "cifar10.npz") as archive:
        assert np.bincount(archive["y_train"]).tolist() == [5000] * 10
        assert np.bincount(archive["y_test"]).tolist() == [1000] * 10


@pytest.mark.parametrize(("name", "least"), [("resnet20", 0.90), ("resnet56", 0.92), ("vgg16_bn", 0.89)])
def test_published_weights_reach_their_accuracy(name, least, root, converted):
    # The first 1,000 test images; on all 10,000 they have 91.73, 93.39 and 91.69 %.
    data = load_data("cifar10", converted[0], calibration=16, validation=1000)
    model = load_model(f"secateur:{name}", root / "weights" / "cifar10" / f"{name}.pth")
    images, labels = data.tensors(data.validation)
    with torch.inference_mode():
        right = [int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True)]
    assert sum(right) / 1000 >= least


def test_fashion_mnist_is_read_from_torchvisions_layout(root):
    data = load_data("fashion_mnist", root / "data" / "fashion_mnist", calibration=2048, validation=1000)
    assert (len(data.test), data.image_shape, data.classes[0]) == (9000, (1, 28, 28), "T-shirt/top")
    images, _ = data.tensors(data.calibration)
    assert abs(float(images.mean())) < 0.05 and abs(float(images.std()) - 1) < 0.05
