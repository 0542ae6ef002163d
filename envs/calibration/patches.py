"""What a convolution or linear layer reads at some of its output positions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def is_plain(layer: nn.Module | None) -> bool:
    """Whether a layer's outputs are its weight times its unfolded input: any linear layer, most two-dimensional convolutions.

    Subclasses that compute in their own way (standardised weights, other padding) are not plain.
    """
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    own = isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros"
    return own and all(getattr(type(layer), name) is getattr(nn.Conv2d, name) for name in ("forward", "_conv_forward"))


def num_positions(layer: nn.Module, x: Tensor) -> int:
    """Return how many output positions (tokens) a layer has for one image."""
    if isinstance(layer, nn.Linear):
        return x[0].numel() // layer.in_features
    return int(np.prod(_output_size(layer, x)))


def sample_positions(count: int, most: int, rng: np.random.Generator) -> Tensor:
    """Return `most` of `count` output positions, or all of them if they are fewer; sorted."""
    return torch.from_numpy(np.sort(rng.choice(count, min(count, most), replace=False)))


def patches(layer: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    """Return what a layer reads, (images, positions, conv_groups, n); n in the order of `layer.weight[0].flatten()`.

    Args:
        layer: for which `is_plain` holds.
        x: its input; (images, channels, height, width) or (images, ..., features).
        positions: flat indices of output positions (tokens).
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, layer.in_features)[:, positions, None]
    _, width = _output_size(layer, x)
    x = F.pad(x, _padding(layer))
    rows = _kernel_index(positions // width, layer, 0)[:, :, None]  # (positions, kernel height, 1)
    columns = _kernel_index(positions % width, layer, 1)[:, None, :]  # (positions, 1, kernel width)
    # index_select on flat pixels takes a third of the time of an index per axis.
    picked = x.flatten(2).index_select(2, (rows * x.shape[3] + columns).flatten())
    by_position = picked.view(len(x), x.shape[1], len(positions), -1).transpose(1, 2)
    return by_position.reshape(len(x), len(positions), layer.groups, -1)


def outputs_at(layer: nn.Module, y: Tensor, positions: Tensor) -> Tensor:
    """Return a layer's outputs (or anything of their shape) at flat positions, (images, positions, outputs)."""
    if isinstance(layer, nn.Linear):
        return y.reshape(len(y), -1, y.shape[-1])[:, positions]
    return y.flatten(2)[:, :, positions].transpose(1, 2)


def _output_size(layer: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    left, right, top, bottom = _padding(layer)
    padded = x.shape[2] + top + bottom, x.shape[3] + left + right
    extents = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return tuple((size - e - 1) // s + 1 for size, e, s in zip(padded, extents, layer.stride, strict=True))


def _kernel_index(start: Tensor, layer: nn.Conv2d, axis: int) -> Tensor:
    """Return the input coordinates under the kernel at each output coordinate, (positions, kernel size)."""
    return start[:, None] * layer.stride[axis] + torch.arange(layer.kernel_size[axis]) * layer.dilation[axis]


def _padding(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom)."""
    if layer.padding == "valid":
        return (0, 0, 0, 0)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return (totals[1] // 2, totals[1] - totals[1] // 2, totals[0] // 2, totals[0] - totals[0] // 2)
    return (layer.padding[1],) * 2 + (layer.padding[0],) * 2
