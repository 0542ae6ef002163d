"""A small U-Net for the generated scenes of `secateur.envs.tasks.scenes`, trained in some minutes.

Configuration: `model: {factory: "secateur:unet", weights: trained, input: [1, 64, 64]}`,
`data: {name: digit_scenes, train: rest, ...}`, `task: segmentation`.

Source: Ronneberger et al. 2015, "U-Net", arXiv:1505.04597. We differ: padded convolutions, batch norms, nearest-neighbor
upsampling, one convolution at full resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.envs.tasks.scenes import CLASSES
from secateur.envs.tasks.supervised import PerSampleTask
from secateur.envs.tasks.training import Progress, Recipe, cached_weights

RECIPE = Recipe(epochs=6, batch_size=8, learning_rate=0.005, weight_decay=1e-4, shift=0, optimizer="adamw")


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two 3x3 convolutions, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for inputs in (in_channels, out_channels):
        layers += [nn.Conv2d(inputs, out_channels, 3, 1, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Class scores of every pixel, (N, classes, H, W), from images (N, C, H, W).

    The blocks run at half the resolution of the images and below; the last convolutions see the images themselves besides the
    enlarged features. Height and width are multiples of 2 ** len(widths).

    Args:
        widths: channels at each resolution, each half of the one before.
        classes: number of classes.
        channels: channels of the images.
    """

    def __init__(self, widths: Sequence[int], classes: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, 2, 1)
        self.down = nn.ModuleList(_block(before, after) for before, after in zip((widths[0], *widths), widths, strict=False))
        pairs = list(pairwise(widths))
        self.up = nn.ModuleList(_block(fine + coarse, fine) for fine, coarse in reversed(pairs))
        self.last = nn.Conv2d(channels + widths[0], widths[0], 3, 1, 1)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.stem(image))
        skips: list[Tensor] = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for block, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = block(_joined(skip, x))
        return self.head(F.relu(self.last(_joined(image, x))))


def _joined(fine: Tensor, coarse: Tensor) -> Tensor:
    """Return the channels of `fine`, and those of `coarse` at twice its resolution."""
    return torch.cat([fine, F.interpolate(coarse, scale_factor=2, mode="nearest")], dim=1)


def unet(widths: Sequence[int] = (16, 32, 64), classes: int = len(CLASSES), channels: int = 1) -> UNet:
    """Return the untrained network: 13 convolutions, 120,000 parameters."""
    return UNet(tuple(widths), classes, channels)


def train_weights(model: nn.Module, task: PerSampleTask, progress: Progress | None = None) -> Path:
    """Return a cached weights file of `model` trained on the task's training split; see `secateur.envs.tasks.models`."""
    return cached_weights("unet", model, task, RECIPE, progress)
