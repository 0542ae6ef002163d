"""A small super-resolution network in the manner of EDSR, x2, trained in some minutes.

Configuration: `model: {factory: "secateur:edsr", weights: trained, input: [1, 32, 32]}`,
`data: {name: digit_scenes_x2, train: rest, ...}`, `task: restoration`.

Source: Lim et al. 2017, "Enhanced Deep Residual Networks for Single Image Super-Resolution" (EDSR), arXiv:1707.02921. We differ:
fewer and narrower blocks, and the network adds its output to the bilinearly enlarged input, which shortens the training.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from secateur.envs.tasks.supervised import PerSampleTask
from secateur.envs.tasks.training import Progress, Recipe, cached_weights

RECIPE = Recipe(epochs=5, batch_size=8, learning_rate=2e-3, weight_decay=0.0, shift=0, optimizer="adamw")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a ReLU between them, around a shortcut; no batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class EDSR(nn.Module):
    """Images (N, C, 2H, 2W) from images (N, C, H, W) in [0, 1].

    Args:
        blocks: number of residual blocks.
        width: channels of the blocks.
        channels: channels of the images.
    """

    def __init__(self, blocks: int, width: int, channels: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(channels, width, 3, 1, 1)
        self.body = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)), nn.Conv2d(width, width, 3, 1, 1))
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, 1, 1), nn.PixelShuffle(2))
        self.tail = nn.Conv2d(width, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.head(x)
        details = self.tail(self.up(features + self.body(features)))
        return F.interpolate(x, scale_factor=2, mode="bilinear") + details


def edsr(blocks: int = 4, width: int = 32, channels: int = 1) -> EDSR:
    """Return the untrained network: 12 convolutions, 120,000 parameters."""
    return EDSR(blocks, width, channels)


def train_weights(model: nn.Module, task: PerSampleTask, progress: Progress | None = None) -> Path:
    """Return a cached weights file of `model` trained on the task's training split; see `secateur.envs.tasks.models`."""
    return cached_weights("edsr", model, task, RECIPE, progress)
