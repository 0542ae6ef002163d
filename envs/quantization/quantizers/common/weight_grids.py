"""The grids of weights, and the scale of each output channel.

`choose_scale` searches the clipping point with the least squared error and then corrects the scale to

    s = <w, w> / <w, q>                                                                                            (1)

where q is the rounded channel in units of s. Least squared error makes the channel smaller, s <w, q> < <w, w>, and over many
layers the signal becomes weak; with eq. (1), the error is orthogonal to w.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from secateur.envs.quantization.quantizers.core import QuantizedWeight

Clip = Literal["mse", "max"]

CLIPPING_POINTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Clipping points that are tried, relative to a channel's largest weight."""

GAIN_CORRECTIONS = 3
"""Number of times that the scale is corrected and the channel is rounded again."""

MAX_SHIFT = 23
"""The smallest power of two in a grid is 2^-23, the last bit of float32: relative to the largest weight, less is lost."""


@dataclass(frozen=True)
class WeightGrid:
    """The allowed values of a channel, in units of its scale.

    Attributes:
        values: (at most 2^bits,) float32, increasing; the first value has the code `first_code`, the next one the next code.
        first_code: the smallest code.
        bits: bits of a code.
        offset: the values are `offset` plus all integers between the ends; None: they are not evenly spaced.
    """

    values: Tensor
    first_code: int
    bits: int
    offset: float | None

    def on(self, device: torch.device) -> WeightGrid:
        """Return the grid with its values on a device."""
        return replace(self, values=self.values.to(device))

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest values, same shape."""
        if self.offset is None:
            return self.values[torch.bucketize(x, (self.values[1:] + self.values[:-1]) / 2)]
        return (x - self.offset).round_().add_(self.offset).clamp_(*self._ends)

    @cached_property
    def _ends(self) -> tuple[float, float]:
        return float(self.values[0]), float(self.values[-1])

    def quantized(self, values: Tensor, scale: Tensor, shape: torch.Size) -> QuantizedWeight:
        """Return values of the grid, (outputs, ...), as a quantized weight of this shape; scale: (outputs,)."""
        codes = (torch.searchsorted(self.values, values.contiguous()) + self.first_code).to(torch.int8).view(shape)
        levels = None
        if self.offset != 0:
            levels = self.values.new_zeros(2**self.bits)
            start = self.first_code + 2 ** (self.bits - 1)
            levels[start : start + len(self.values)] = self.values
        return QuantizedWeight(codes, scale, self.bits, levels)


def symmetric_grid(bits: int) -> WeightGrid:
    """Return the integers from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1, which are symmetric around zero."""
    largest = 2 ** (bits - 1) - 1
    return WeightGrid(torch.arange(-largest, largest + 1.0), -largest, bits, 0)


def half_step_grid(bits: int) -> WeightGrid:
    """Return -(2^(bits - 1) - 1/2), ..., -1/2, 1/2, ..., 2^(bits - 1) - 1/2: symmetric, with all 2^bits codes, without zero."""
    count = 2 ** (bits - 1)
    return WeightGrid(torch.arange(-count, count) + 0.5, -count, bits, 0.5)


def power_of_two_grid(bits: int) -> WeightGrid:
    """Return 0 and +-2^-i for i = 0 .. 2^(bits - 1) - 2, at most `MAX_SHIFT`."""
    largest = min(2 ** (bits - 1) - 2, MAX_SHIFT)
    powers = torch.ldexp(torch.ones(largest + 1), torch.arange(-largest, 1))
    return WeightGrid(torch.cat([-powers.flip(0), torch.zeros(1), powers]), -(largest + 1), bits, None)


@dataclass(frozen=True)
class RelativeRows:
    """A weight relative to the largest weight of each channel.

    All computations use relative weights, because squares of very small weights are zero in float32.

    Attributes:
        rows: (outputs, entries), relative to the largest absolute weight of each row.
        largest: (outputs,), the largest absolute weight of each row.
    """

    rows: Tensor
    largest: Tensor

    def scales(self, relative: Tensor) -> Tensor:
        """Return scales in units of the weight; an all-zero channel gets 0 and stays zero even on a grid without zero."""
        return relative * self.largest


def relative_rows(weight: Tensor) -> RelativeRows:
    """Return a weight, (outputs, ...), relative to each channel's largest weight; all-zero channels stay zero."""
    rows = weight.detach().float().flatten(1)
    largest = rows.abs().amax(1)
    return RelativeRows(rows / largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None], largest)


def choose_scale(rows: Tensor, grid: WeightGrid, clip: Clip) -> Tensor:
    """Return the scale of each channel, (channels,).

    Args:
        rows: relative weights of `RelativeRows`, (channels, elements).
        grid: allowed values of the rounded weights.
        clip: "mse": see the top of this file; "max": the largest weight is the end of the grid.
    """
    widest = torch.full_like(rows[:, 0], 1 / float(grid.values[-1]))
    if clip == "max":
        return widest
    return _corrected_scale(rows, _least_error_scale(rows, widest, grid), widest, grid)


def _least_error_scale(rows: Tensor, widest: Tensor, grid: WeightGrid) -> Tensor:
    scales = torch.stack([share * widest for share in CLIPPING_POINTS])
    errors = torch.stack([_squared_error(rows, scale, grid) for scale in scales])
    return scales.gather(0, errors.argmin(0, keepdim=True))[0]


def _corrected_scale(rows: Tensor, scale: Tensor, widest: Tensor, grid: WeightGrid) -> Tensor:
    """Return the scale of eq. (1), at most `widest`."""
    for _ in range(GAIN_CORRECTIONS):
        product = (rows * grid.round(rows / scale[:, None])).sum(1)
        corrected = torch.minimum(rows.square().sum(1) / product, widest)
        scale = torch.where(product > 0, corrected, scale)  # if all codes are 0, the scale is not corrected
    return scale


def _squared_error(rows: Tensor, scale: Tensor, grid: WeightGrid) -> Tensor:
    return (grid.round(rows / scale[:, None]) * scale[:, None] - rows).square_().sum(1)
