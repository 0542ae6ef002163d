"""A generated task and a tiny network for tests: training takes a second, and pruning lowers the accuracy measurably."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.envs.tasks.splits import Dataset, Pool, TaskData, array_pool, split_dataset
from secateur.envs.tasks.supervised import PerSampleTask
from secateur.envs.tasks.training import Progress, Recipe, cached_weights

IMAGE_SHAPE = (3, 8, 8)
NUM_CLASSES = 6
NOISE = 1.6
"""Standard deviation of the pixel noise; the standard deviation of the class patterns is 1."""

TRAIN_IMAGES, TEST_IMAGES = 1024, 1024
RECIPE = Recipe(epochs=6, batch_size=32, shift=0)


class SyntheticNet(nn.Module):
    """A stem, one residual block, one convolution and a linear layer: one channel group of several layers, two of one layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv4 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(2 * width)
        self.linear = nn.Linear(2 * width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x))))))
        x = F.relu(self.bn4(self.conv4(x)))
        return self.linear(x.mean((2, 3)))


def synthetic_net(width: int = 8) -> SyntheticNet:
    """Return the untrained network, 3x8x8 -> 6 classes."""
    return SyntheticNet(width)


def train_weights(model: nn.Module, task: PerSampleTask, progress: Progress | None = None) -> Path:
    """Return a cached weights file of `model` trained on the task's training split; see `secateur.envs.tasks.models`."""
    return cached_weights("synthetic", model, task, RECIPE, progress)


def load(
    root: str | None = None,
    calibration: int | str = 64,
    validation: int | str = 256,
    test: int | str = "rest",
    train: int | str = "rest",
    validation_from: str = "test",
    seed: int = 0,
) -> TaskData:
    """Return the generated splits, with defaults that suit tests; a configuration writes `data: {name: synthetic, ...}`."""
    return split_dataset(
        "synthetic",
        draw_dataset(),
        calibration=calibration,
        validation=validation,
        test=test,
        train=train,
        validation_from=validation_from,
        seed=seed,
    )


def draw_dataset() -> Dataset:
    """Return the generated images, always the same.

    Each class is a smooth random pattern; an image is its class's pattern, shifted by up to two pixels, plus noise.
    """
    rng = np.random.default_rng(0)
    patterns = _smooth(rng.standard_normal((NUM_CLASSES, *IMAGE_SHAPE)))
    return Dataset(
        train=_draw(patterns, TRAIN_IMAGES, rng),
        test=_draw(patterns, TEST_IMAGES, rng),
        classes=tuple(f"pattern {index}" for index in range(NUM_CLASSES)),
        mean=(0.0,) * IMAGE_SHAPE[0],
        std=(1.0,) * IMAGE_SHAPE[0],
    )


def _smooth(patterns: np.ndarray) -> np.ndarray:
    """Return each pattern averaged over cyclic 3x3 windows, with standard deviation 1."""
    smooth = np.zeros_like(patterns)
    for row, column in itertools.product((-1, 0, 1), repeat=2):
        smooth += np.roll(patterns, (row, column), axis=(2, 3))
    return smooth / smooth.std(axis=(1, 2, 3), keepdims=True)


def _draw(patterns: np.ndarray, count: int, rng: np.random.Generator) -> Pool:
    labels = rng.integers(len(patterns), size=count)
    shifts = rng.integers(-2, 3, size=(count, 2))
    clean = [np.roll(patterns[label], shift, axis=(1, 2)) for label, shift in zip(labels, shifts, strict=True)]
    images = np.stack(clean) + NOISE * rng.standard_normal((count, *IMAGE_SHAPE))
    return array_pool(images.astype(np.float32), labels.astype(np.int64))
