"""Asymptotic quantization (AQE): the weight moves from float to its grid while it is trained.

Chen et al. 2020 (JSTSP, "Propagating asymptotic-estimated gradients for low bitwidth quantized neural networks"):

    h_hat(a) = alpha h(a) + (1 - alpha) a,   gradient 2 alpha dL/dh_hat where |a| <= 1, and 0 elsewhere

with the quantizer h and a in units of the range. alpha = 1/2 has the gradient of the straight-through estimator. The schedule is
ours: alpha rises from 1/2 to 1 along half a cosine, and stays 1 for the last tenth of the training, so that batch norms and the
other layers learn with the weights that are exported. Grids with levels of their own are treated in the same way.
"""

from __future__ import annotations

import math

from torch import Tensor

from secateur.envs.quantization.estimators.core import WeightEstimator
from secateur.envs.quantization.quantizers.core import QuantizedWeight

FULL = 0.9
"""Share of the training after which the weight is completely quantized."""


class Asymptotic(WeightEstimator):
    """Mixes the float weight with the rounded one; the share of the rounded one rises from a half to 1."""

    def __init__(self, quantized: QuantizedWeight):
        super().__init__(quantized)
        self.alpha = 0.5

    def progress(self, share: float) -> None:
        """Set the share of the rounded weight."""
        self.alpha = 1 - 0.25 * (1 + math.cos(math.pi * min(share / FULL, 1)))

    def forward(self, master: Tensor) -> Tensor:
        """Return the mixture in training mode, the rounded weight in eval mode."""
        rounded = self.rounded(master)
        if not self.training:
            return rounded
        alpha = self.alpha
        mixed = rounded + (1 - alpha) * (master - rounded).detach()
        if mixed.requires_grad:
            inside = (self.relative(master.detach()).abs() <= self.range).to(master.dtype)
            mixed.register_hook(lambda gradient: 2 * alpha * gradient * inside)
        return mixed

    @property
    def range(self) -> float:
        """Largest value of the grid in units of the scale, and half a step."""
        return self.largest + 0.5 if self.levels is None else float(self.levels.abs().max())
