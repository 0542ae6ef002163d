"""Uniform quantization: evenly spaced levels; weights symmetric per output channel, activations asymmetric per tensor.

Source: Jacob et al. 2018, arXiv:1712.05877, eq. (1); per-channel weights: Krishnamoorthi 2018, arXiv:1806.08342,
section 3.

Where we differ and why (figures: CIFAR ResNet-56, weights at 3 bits, no recovery, 1,000 images):
1. Signed codes are -(2^(b-1) - 1) .. 2^(b-1) - 1. One more negative code would lower the mean of a clipped channel:
   top-1 88.8 -> 82.4 %.
2. With `clip: mse` (default), outliers do not determine a channel's grid: the clipping point has the least squared error.
3. Least squared error makes weights smaller; the scale is corrected for this, see common/weight_grids.py: top-1 67.2 ->
   88.8 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.cost_models.core import check_fields
from secateur.envs.calibration.core import LayerStatistics
from secateur.envs.quantization.quantizers.common.activation_grids import ActivationGridConfig, choose_activation_grid
from secateur.envs.quantization.quantizers.common.weight_grids import Clip, choose_scale, relative_rows, symmetric_grid
from secateur.envs.quantization.quantizers.core import ActivationGrid, QuantizedWeight, check_bits


@dataclass(frozen=True)
class UniformConfig(ActivationGridConfig):
    """Configuration of the scales.

    Attributes:
        clip: "mse": clipping point with the least squared error, with the corrected scale of common/weight_grids.py; "max":
            the largest weight of the channel is the end of the grid.
        activations, percentile: see `ActivationGridConfig`.
    """

    clip: Clip = "mse"

    def __post_init__(self) -> None:
        check_fields(self, "the quantizer `uniform`")


@dataclass(frozen=True)
class Uniform:
    """The quantizer `uniform`; see the top of this file."""

    config: UniformConfig = UniformConfig()
    needs_images: ClassVar[bool] = False

    def quantize_weight(self, weight: Tensor, bits: int, statistics: LayerStatistics | None = None) -> QuantizedWeight:
        """See `Quantizer.quantize_weight`."""
        check_bits(bits)
        grid, relative = symmetric_grid(bits).on(weight.device), relative_rows(weight)
        scale = choose_scale(relative.rows, grid, self.config.clip)
        return grid.quantized(grid.round(relative.rows / scale[:, None]), relative.scales(scale), weight.shape)

    def activation_grid(self, statistics: LayerStatistics, bits: int) -> ActivationGrid:
        """See `Quantizer.activation_grid`."""
        return choose_activation_grid(statistics, bits, self.config)
