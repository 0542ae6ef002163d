"""Power-of-two quantization: weights are zero or plus/minus a power of two times the scale, so products become shifts.

The levels of b bits are 0 and +-2^-i, i = 0 .. 2^(b-1) - 2; the scale belongs to the output channel.

Source: Chen et al. 2020, n-BQ-NN, IEEE TNNLS.

Where we differ and why:
1. Each output channel has one scale: the clipping point with the least squared error, corrected so that the weights do not
   become smaller (see common/weight_grids.py). The paper trains its weights toward the levels; here they are only rounded.
2. The smallest exponent is -23, so with 6 or more bits some codes are not used: next to the largest weight, smaller weights
   are lost in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.cost_models.core import check_fields
from secateur.envs.calibration.core import LayerStatistics
from secateur.envs.quantization.quantizers.common.activation_grids import ActivationGridConfig, choose_activation_grid
from secateur.envs.quantization.quantizers.common.weight_grids import Clip, choose_scale, power_of_two_grid, relative_rows
from secateur.envs.quantization.quantizers.core import ActivationGrid, QuantizedWeight, check_bits


@dataclass(frozen=True)
class PowerOfTwoConfig(ActivationGridConfig):
    """Configuration of the scales.

    Attributes:
        clip: "mse": clipping point with the least squared error, with the corrected scale of common/weight_grids.py; "max":
            the largest weight of the channel is the end of the grid.
        activations, percentile: see `ActivationGridConfig`.
    """

    clip: Clip = "mse"

    def __post_init__(self) -> None:
        check_fields(self, "the quantizer `power_of_two`")


@dataclass(frozen=True)
class PowerOfTwo:
    """The quantizer `power_of_two`; see the top of this file."""

    config: PowerOfTwoConfig = PowerOfTwoConfig()
    needs_images: ClassVar[bool] = False

    def quantize_weight(self, weight: Tensor, bits: int, statistics: LayerStatistics | None = None) -> QuantizedWeight:
        """See `Quantizer.quantize_weight`."""
        check_bits(bits)
        grid, relative = power_of_two_grid(bits).on(weight.device), relative_rows(weight)
        scale = choose_scale(relative.rows, grid, self.config.clip)
        return grid.quantized(grid.round(relative.rows / scale[:, None]), relative.scales(scale), weight.shape)

    def activation_grid(self, statistics: LayerStatistics, bits: int) -> ActivationGrid:
        """See `Quantizer.activation_grid`."""
        return choose_activation_grid(statistics, bits, self.config)
