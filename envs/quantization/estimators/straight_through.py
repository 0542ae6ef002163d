"""The straight-through estimator: the gradient passes the rounding unchanged (Bengio et al. 2013, arXiv:1308.3432)."""

from __future__ import annotations

from torch import Tensor

from secateur.envs.quantization.estimators.core import WeightEstimator


class StraightThrough(WeightEstimator):
    """Rounds to a fixed grid. The gradient is passed outside the range of the grid too, so a clipped weight can come back."""

    def forward(self, master: Tensor) -> Tensor:
        """Return the rounded weight; its gradient is that of the master weight."""
        return self.rounded(master)
