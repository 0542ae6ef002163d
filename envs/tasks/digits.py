"""A small residual network for scikit-learn's handwritten digits, trained in seconds: the demo's model.

Configuration: `model: {factory: "secateur:digits", weights: trained}`,
`data: {name: digits, train: rest, ...}`.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from secateur.envs.tasks.data import TaskData, load_data
from secateur.envs.tasks.models import load_weights
from secateur.envs.tasks.training import Progress, Recipe, cached_weights

RECIPE = Recipe(epochs=30)
"""Reaches 99 % of the digits' test images."""


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
    """A stem and one residual block per width, each after the first at half the resolution; 1x8x8 input."""

    def __init__(self, widths: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, widths[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        blocks = [ResidualBlock(widths[0], widths[0], 1)]
        blocks += [ResidualBlock(before, after, 2) for before, after in zip(widths[:-1], widths[1:], strict=True)]
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.linear(x.mean((2, 3)))


def digits_resnet(widths: tuple[int, ...] = (16, 32, 64), num_classes: int = 10) -> DigitsResNet:
    """Return the untrained network: nine convolutions and a linear layer, wider than the task needs."""
    return DigitsResNet(tuple(widths), num_classes)


def train_weights(model: nn.Module, data: TaskData, progress: Progress | None = None) -> Path:
    """Return a weights file of `model` trained on `data.train`, cached (the hook of `secateur.envs.tasks.models`)."""
    return cached_weights("digits", model, data, RECIPE, progress)


def trained_digits_model(cache_dir: Path | None = None, progress: Progress | None = None) -> DigitsResNet:
    """Return the network trained on all training images of the digits, in eval mode."""
    data = load_data("digits", validation=300, train="rest")
    model = digits_resnet()
    load_weights(model, cached_weights("digits", model, data, RECIPE, progress, cache_dir))
    return model.eval()
