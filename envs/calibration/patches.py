"""The inputs of a convolution or linear layer at some of its output positions."""

from __future__ import annotations

import math
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Layer = nn.Conv2d | nn.Linear


def is_plain(layer: object) -> TypeGuard[Layer]:
    """Return whether a layer's outputs are its weight times its unfolded input: a linear layer or two-dimensional convolution.

    Convolutions with other padding than zeros, and subclasses with their own forward pass (standardized weights, for
    example), are not plain.
    """
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    own = isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros"
    return own and all(getattr(type(layer), name) is getattr(nn.Conv2d, name) for name in ("forward", "_conv_forward"))


def num_positions(layer: Layer, x: Tensor) -> int:
    """Return the number of output positions (tokens) of a layer for one image."""
    if isinstance(layer, nn.Linear):
        return x[0].numel() // layer.in_features
    return math.prod(_output_size(layer, x))


def sample_positions(count: int, most: int, rng: np.random.Generator) -> Tensor:
    """Return `most` random positions out of `count`, or all of them if there are fewer; sorted."""
    return torch.from_numpy(np.sort(rng.choice(count, min(count, most), replace=False)))


def patches(layer: Layer, x: Tensor, positions: Tensor) -> Tensor:
    """Return a layer's inputs, (images, positions, conv_groups, n); the order of n is that of `layer.weight[0].flatten()`.

    Args:
        layer: a layer with `is_plain(layer)`.
        x: input of the layer; (images, channels, height, width) or (images, ..., features).
        positions: flat indices of output positions (tokens).
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, layer.in_features)[:, positions, None]
    _, width = _output_size(layer, x)
    x = F.pad(x, _padding(layer))
    rows = _kernel_index(positions // width, layer, 0)[:, :, None]  # (positions, kernel height, 1)
    columns = _kernel_index(positions % width, layer, 1)[:, None, :]  # (positions, 1, kernel width)
    # index_select on flat pixels takes a third of the time that one index per axis takes.
    picked = x.flatten(2).index_select(2, (rows * x.shape[3] + columns).flatten())
    by_position = picked.view(len(x), x.shape[1], len(positions), -1).transpose(1, 2)
    return by_position.reshape(len(x), len(positions), layer.groups, -1)


def outputs_at(layer: Layer, y: Tensor, positions: Tensor) -> Tensor:
    """Return a layer's outputs, or values of the same shape, at flat positions: (images, positions, outputs)."""
    if isinstance(layer, nn.Linear):
        return y.reshape(len(y), -1, y.shape[-1])[:, positions]
    return y.flatten(2)[:, :, positions].transpose(1, 2)


def _output_size(layer: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    left, right, top, bottom = _padding(layer)
    padded = x.shape[2] + top + bottom, x.shape[3] + left + right
    extents = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    height, width = ((size - e - 1) // s + 1 for size, e, s in zip(padded, extents, layer.stride, strict=True))
    return height, width


def _kernel_index(start: Tensor, layer: nn.Conv2d, axis: int) -> Tensor:
    """Return the input coordinates of the kernel at each output coordinate, (positions, kernel size)."""
    return start[:, None] * layer.stride[axis] + torch.arange(layer.kernel_size[axis]) * layer.dilation[axis]


def _padding(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom)."""
    if layer.padding == "valid":
        return (0, 0, 0, 0)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return (totals[1] // 2, totals[1] - totals[1] // 2, totals[0] // 2, totals[0] - totals[0] // 2)
    vertical, horizontal = (int(width) for width in layer.padding)
    return horizontal, horizontal, vertical, vertical
