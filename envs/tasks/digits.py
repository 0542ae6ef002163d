"""A small residual network for scikit-learn's handwritten digits, trained in seconds: the demo's model.

Configuration: `model: {factory: "secateur:digits", weights: trained, input: [1, 8, 8]}`,
`data: {name: digits, train: rest, ...}`. With a larger `input`, such as [1, 32, 32], the images are enlarged.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from secateur.envs.tasks.classification import Classification
from secateur.envs.tasks.data import load_data
from secateur.envs.tasks.supervised import PerSampleTask
from secateur.envs.tasks.training import Progress, Recipe, cached_weights
from secateur.envs.tasks.weights import load_weights

RECIPE = Recipe(epochs=30)
"""For images of 8x8: reaches 99 % of the digits' test images."""

LARGE_RECIPE = Recipe(epochs=8, shift=4)
"""For enlarged images, which take more arithmetic: reaches 98 % or more, in fewer epochs."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + residual)


class DigitsResNet(nn.Module):
    """A stem and one residual block per width, each after the first at half the resolution of the one before.

    Args:
        widths: output channels of each block; the stem has those of the first.
        num_classes: number of outputs.
        stem_stride: stride of the stem, 2 for images larger than 8x8.
    """

    def __init__(self, widths: tuple[int, ...], num_classes: int, stem_stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, stem_stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        blocks = [ResidualBlock(widths[0], widths[0], 1)]
        blocks += [ResidualBlock(before, after, 2) for before, after in zip(widths[:-1], widths[1:], strict=True)]
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.linear(x.mean((2, 3)))


def digits_resnet(widths: tuple[int, ...] = (16, 32, 64), num_classes: int = 10, stem_stride: int = 1) -> DigitsResNet:
    """Return the untrained network: nine convolutions and a linear layer at three widths, wider than the task needs."""
    return DigitsResNet(tuple(widths), num_classes, stem_stride)


def train_weights(model: nn.Module, task: PerSampleTask, progress: Progress | None = None) -> Path:
    """Return a cached weights file of `model` trained on the task's training split; see `secateur.envs.tasks.models`."""
    recipe = RECIPE if max(task.data.image_shape) <= 8 else LARGE_RECIPE
    return cached_weights("digits", model, task, recipe, progress)


def trained_digits_model(cache_dir: Path | None = None, progress: Progress | None = None) -> DigitsResNet:
    """Return the network trained on all training images of the digits at 8x8, in eval mode."""
    task = Classification(load_data("digits", validation=300, train="rest"))
    model = digits_resnet()
    load_weights(model, cached_weights("digits", model, task, RECIPE, progress, cache_dir))
    return model.eval()
