"""Training samples: drawn by index, and augmented."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.envs.devices import move
from secateur.envs.inputs import Inputs, tensors_of_inputs
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
            mirrored = torch.rand(len(inputs), generator=generator).to(inputs.device) < 0.5
            inputs = torch.where(mirrored[:, None, None, None], inputs.flip(3), inputs)
        inputs = shifted(inputs, self.shift, generator)
        return Batch(inputs.contiguous(memory_format=torch.channels_last) if self.channels_last else inputs, targets)


def labeled_samples(data: TaskData, split: Split, shift: int = 0, flip: bool = False, channels_last: bool = True) -> Samples:
    """Return the images of a split with their labels; a batch is normalized when it is drawn."""
    images, labels = split.tensors()
    if split.nbytes <= data.moved.max_bytes:
        images, labels = move(images, data.device), move(labels, data.device)

    def at(indices: Tensor) -> Batch:
        indices = indices.to(images.device)
        return Batch(*data.normalized(images[indices], labels[indices]))

    return Samples(len(split), at, shift, flip, channels_last)


def unlabeled_samples(inputs: Inputs, shift: int = 0, flip: bool = False) -> Samples:
    """Return inputs without targets."""
    (device,) = {x.device for x in tensors_of_inputs(inputs)}
    return Samples(len(inputs), lambda indices: Batch(inputs[indices.to(device)]), shift, flip)


def shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Return the images (N, C, H, W), each shifted by its own random offset of up to `shift` pixels."""
    if not shift:
        return images
    count, channels, height, width = images.shape
    # Black is the smallest value of the normalized images, not 0.
    padded = F.pad(images, (shift,) * 4, value=float(images.min()))
    device = images.device
    top, left = torch.randint(2 * shift + 1, (2, count), generator=generator).to(device)
    rows = (top[:, None] + torch.arange(height, device=device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width, device=device))[:, None, None, :]
    samples, planes = (torch.arange(n, device=device) for n in (count, channels))
    index = samples[:, None, None, None], planes[None, :, None, None]
    return padded[index[0], index[1], rows, columns]
