"""Weights in one layout: (outputs, inputs per conv group, ...). Only transposed convolutions store the inputs first."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd


def is_transposed(layer: Any) -> bool:
    """Return whether a layer is a transposed convolution."""
    return isinstance(layer, _ConvTransposeNd)


def outputs_first(layer: Any, weight: Tensor | None = None) -> Tensor:
    """Return a layer's weight as (outputs, inputs per conv group, ...), detached.

    Args:
        layer: a convolution, transposed or not, or a linear layer.
        weight: a weight as the layer stores it, in place of the layer's own.
    """
    weight = layer.weight.detach() if weight is None else weight
    return _swapped(layer, weight) if is_transposed(layer) else weight


def as_stored(layer: Any, weight: Tensor) -> Tensor:
    """Return a weight, (outputs, inputs per conv group, ...), as the layer stores it."""
    return _swapped(layer, weight) if is_transposed(layer) else weight


def kernel_use(layer: Any) -> float:
    """Return the mean share of the kernel positions that an output reads: 1, or 1 / stride for transposed convolutions."""
    return 1 / math.prod(layer.stride) if is_transposed(layer) else 1.0


def _swapped(layer: Any, weight: Tensor) -> Tensor:
    """Return a weight with axis 0 and axis 1 exchanged within each conv group."""
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1).contiguous()
