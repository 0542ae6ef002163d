"""Training samples: drawn by index, and augmented."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.envs.inputs import Inputs
from secateur.envs.tasks.core import Batch
from secateur.envs.tasks.splits import Split, TaskData


@dataclass(frozen=True)
class Samples:
    """Samples of a training.

    Attributes:
        count: number of samples.
        at: indices (n,) -> these samples.
        shift: images are shifted by up to this many pixels in each direction; the border is filled with black.
        flip: whether half of the images, drawn in every epoch, are mirrored left to right.
        channels_last: whether batches of images have the memory format in which convolutions are fastest.
    """

    count: int
    at: Callable[[Tensor], Batch]
    shift: int = 0
    flip: bool = False
    channels_last: bool = True

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        """Return the samples at these indices, augmented with random numbers from `generator`."""
        inputs, targets = self.at(indices)
        if not isinstance(inputs, Tensor) or inputs.dim() != 4:  # no images
            return Batch(inputs, targets)
        if self.flip:
            mirrored = torch.rand(len(inputs), generator=generator) < 0.5
            inputs = torch.where(mirrored[:, None, None, None], inputs.flip(3), inputs)
        inputs = shifted(inputs, self.shift, generator)
        return Batch(inputs.contiguous(memory_format=torch.channels_last) if self.channels_last else inputs, targets)


def labeled_samples(data: TaskData, split: Split, shift: int = 0, flip: bool = False, channels_last: bool = True) -> Samples:
    """Return the images of a split with their labels; a batch is normalized when it is drawn."""
    images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)

    def at(indices: Tensor) -> Batch:
        return Batch(*data.tensors(Split(images[indices].numpy(), labels[indices].numpy())))

    return Samples(len(split), at, shift, flip, channels_last)


def unlabeled_samples(inputs: Inputs, shift: int = 0, flip: bool = False) -> Samples:
    """Return inputs without targets."""
    return Samples(len(inputs), lambda indices: Batch(inputs[indices]), shift, flip)


def shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Return the images (N, C, H, W), each shifted by its own random offset of up to `shift` pixels."""
    if not shift:
        return images
    count, channels, height, width = images.shape
    # Black is the smallest value of the normalized images, not 0.
    padded = F.pad(images, (shift,) * 4, value=float(images.min()))
    top, left = torch.randint(2 * shift + 1, (2, count), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    index = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[index[0], index[1], rows, columns]
