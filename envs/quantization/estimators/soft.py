"""Differentiable soft quantization (DSQ): the gradient of the rounding is that of a smooth staircase.

Gong et al. 2019, arXiv:1908.05033, eq. (3) to (5). In the cell i of width D around the middle m_i,

    phi(v) = s tanh(k (v - m_i)),  s = 1 / (1 - alpha),  k = ln(2 / alpha - 1) / D,

and the forward pass rounds hard (sign of phi). So in units of the step, with u the distance from the middle of the cell,

    d v_hat / d v = k s / 2 (1 - tanh(k u)^2).

Weights near a border between two codes have a larger gradient than those in the middle of their code's interval. `alpha` is
fixed here; the paper trains it together with the range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.envs.quantization.estimators.core import WeightEstimator

ALPHA = 0.2
"""How far the smooth staircase is from the hard one; 0: no distance, 1: a straight line."""


class Soft(WeightEstimator):
    """Rounds to a fixed grid, with the gradient of a smooth staircase; grids with levels of their own: straight through."""

    def forward(self, master: Tensor) -> Tensor:
        """Return the rounded weight."""
        rounded = self.rounded(master)
        if self.levels is not None or not rounded.requires_grad:
            return rounded
        with torch.no_grad():
            relative = self.relative(master)
            slope = torch.where(relative.abs() <= self.largest, staircase_slope(relative), 1.0)  # a clipped weight can come back
        rounded.register_hook(lambda gradient: gradient * slope)
        return rounded


def staircase_slope(relative: Tensor) -> Tensor:
    """Return the slope of the smooth staircase at values in units of the step."""
    sharpness, height = math.log(2 / ALPHA - 1), 1 / (1 - ALPHA)
    from_border = relative - relative.floor() - 0.5  # a cell lies between two codes; its middle is the border of rounding
    return sharpness * height / 2 * (1 - torch.tanh(sharpness * from_border) ** 2)
