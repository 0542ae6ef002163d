"""The inputs of a convolution or linear layer at some of its output positions.

A layer is a product: each output at one position is a row of its weight (`outputs_first`) times the inputs that it reads. This
holds for convolutions and transposed convolutions with any number of spatial axes; only the input coordinate of a kernel
position differs:

    convolution             input = output * stride - padding + kernel * dilation
    transposed convolution  input = (output + padding - kernel * dilation) / stride, where this is a whole number

Coordinates outside of the input are zeros. Other padding modes than zeros enlarge the input first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

PlainLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
TransposedLayer = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = PlainLayer | TransposedLayer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_plain(layer: object) -> TypeGuard[PlainLayer]:
    """Return whether this is a linear layer or a convolution, not transposed, with PyTorch's own forward pass.

    Subclasses with their own forward pass (standardized weights, for example) are not plain.
    """
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    return _has_own_forward(layer, _CONVOLUTIONS, ("forward", "_conv_forward"))


def is_product(layer: object) -> TypeGuard[Layer]:
    """Return whether a layer's outputs are its weight times `patches`: a plain layer or a transposed convolution."""
    return is_plain(layer) or _has_own_forward(layer, _TRANSPOSED, ("forward", "_output_padding"))


def _has_own_forward(layer: object, types: tuple[type, ...], methods: tuple[str, ...]) -> bool:
    kind = next((kind for kind in types if isinstance(layer, kind)), None)
    return kind is not None and all(getattr(type(layer), name) is getattr(kind, name) for name in methods)


def num_positions(layer: Layer, x: Tensor) -> int:
    """Return the number of output positions (tokens) of a layer for one image."""
    if isinstance(layer, nn.Linear):
        return x[0].numel() // layer.in_features
    return math.prod(_output_size(layer, x.shape[2:]))


def sample_positions(count: int, most: int, rng: np.random.Generator) -> Tensor:
    """Return `most` random positions out of `count`, or all of them if there are fewer; sorted."""
    return torch.from_numpy(np.sort(rng.choice(count, min(count, most), replace=False)))


def patches(layer: Layer, x: Tensor, positions: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Return a layer's inputs, (images, positions, conv_groups, n), in the order of `outputs_first(layer)[0].flatten()`.

    Args:
        layer: a layer with `is_product(layer)`.
        x: input of the layer; (images, channels, ...) or (images, ..., features).
        positions: flat indices of output positions (tokens).
        size: spatial size of the output; None: computed from the input. A caller can choose that of a transposed convolution.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, layer.in_features)[:, positions, None]
    size = _output_size(layer, x.shape[2:]) if size is None else size
    before, after = _padding(layer)
    if layer.padding_mode != "zeros":  # F.pad starts at the last axis
        widths = [
            width for pair in zip(before[::-1], after[::-1], strict=True) for width in pair
        ]  # F.pad starts at the last axis
        x, before = F.pad(x, widths, layer.padding_mode), (0,) * len(before)
    index = _pixel_index(layer, torch.unravel_index(positions, tuple(size)), x.shape[2:], before)
    # index_select on flat pixels takes a third of the time that one index per axis takes. The last pixel is the zero outside.
    picked = F.pad(x.flatten(2), (0, 1)).index_select(2, index.flatten())
    by_position = picked.view(len(x), x.shape[1], len(positions), -1).transpose(1, 2)
    return by_position.reshape(len(x), len(positions), layer.groups, -1)


def outputs_at(layer: Layer, y: Tensor, positions: Tensor) -> Tensor:
    """Return a layer's outputs, or values of the same shape, at flat positions: (images, positions, outputs)."""
    if isinstance(layer, nn.Linear):
        return y.reshape(len(y), -1, y.shape[-1])[:, positions]
    return y.flatten(2)[:, :, positions].transpose(1, 2)


def _output_size(layer: Any, size: Sequence[int]) -> tuple[int, ...]:
    """Return the spatial size of a convolution's output for the spatial size of its input."""
    before, after = _padding(layer)
    extents = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    axes = zip(size, before, after, extents, layer.stride, strict=True)
    if not layer.transposed:
        return tuple((n + b + a - e - 1) // s + 1 for n, b, a, e, s in axes)
    return tuple((n - 1) * s - b - a + e + more + 1 for (n, b, a, e, s), more in zip(axes, layer.output_padding, strict=True))


def _padding(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the padding before and after the input along each axis."""
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size), (0,) * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple(total // 2 for total in totals), tuple(total - total // 2 for total in totals)
    widths = tuple(int(width) for width in layer.padding)
    return widths, widths


def _pixel_index(layer: Any, positions: Sequence[Tensor], size: Sequence[int], before: Sequence[int]) -> Tensor:
    """Return the flat input pixel of each kernel position, (positions, kernel area); the number of pixels stands for a zero.

    Args:
        layer: the convolution.
        positions: coordinates of the output positions along each axis.
        size: spatial size of the input.
        before: padding with zeros before the input along each axis.
    """
    flat, inside = positions[0].new_zeros(len(positions[0]), 1), positions[0].new_ones(1, 1, dtype=torch.bool)
    for axis, (start, length) in enumerate(zip(positions, size, strict=True)):
        offsets = torch.arange(layer.kernel_size[axis], device=start.device) * layer.dilation[axis]
        stride = layer.stride[axis]
        if layer.transposed:
            scaled = start[:, None] + before[axis] - offsets
            coordinates, valid = scaled.div(stride, rounding_mode="floor"), scaled % stride == 0
        else:
            coordinates = start[:, None] * stride - before[axis] + offsets
            valid = torch.ones_like(coordinates, dtype=torch.bool)
        valid &= (coordinates >= 0) & (coordinates < length)
        flat = (flat[:, :, None] * length + coordinates[:, None]).flatten(1)
        inside = (inside[:, :, None] & valid[:, None]).flatten(1)
    return torch.where(inside, flat, math.prod(size))
