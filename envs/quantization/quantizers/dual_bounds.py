"""Dual bounds: the grid of activations has a lower and an upper bound of its own per layer, both chosen for the least error.

Made for networks without batch norms, such as those for super-resolution: their activations are asymmetric, have long tails, and
differ in range from layer to layer.

Source: Zhong et al. 2022, "Dynamic Dual Trainable Bounds for Ultra-low Precision Super-Resolution Networks" (DDTB), ECCV,
arXiv:2203.03844. Taken from it: separate lower and upper bounds of each layer, with a zero point, in place of one symmetric
bound, and their start at percentiles of the activations.

Where we differ and why:
1. The paper trains the bounds with the network. Here nothing is trained: a pattern search minimizes the squared error of the
   calibration's samples. It starts at the percentiles and at the whole range, so it is never worse than either.
2. The paper's gates, small networks that rescale the bounds for every image at run time, are left out: grids in ONNX are fixed.
3. Zero is on the grid, because padding needs it exactly: the lower bound is at most 0, the upper one at least 0.
4. The smallest and the largest value of the whole calibration count as one sample each, because a random sample misses the ends
   of long tails (results/quantizers_super_resolution, weights of 8 bits with inputs of 8 and of 4 bits: 37.69 and 35.50 dB,
   `uniform` 37.60 and 35.26 dB).
5. Weights are rounded by `uniform` or `gptq`; the paper rounds them symmetrically up to the largest weight of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from torch import Tensor

from secateur.cost_models.core import Range, check_fields
from secateur.envs.calibration.core import LayerStatistics
from secateur.envs.quantization.quantizers.common.activation_grids import grid_between, grid_errors
from secateur.envs.quantization.quantizers.core import ActivationGrid, QuantizedWeight, check_bits
from secateur.envs.quantization.quantizers.gptq import GPTQ
from secateur.envs.quantization.quantizers.uniform import Uniform

FIRST_STEP = 0.25
"""Of the pattern search, as a share of the distance between the bounds."""

LAST_STEP = 1 / 8
"""Of the pattern search, in units of the distance between two values of the grid."""

MOST_MOVES = 200
"""Of the pattern search; it usually needs some thirty."""


@dataclass(frozen=True)
class DualBoundsConfig:
    """Configuration of the bounds.

    Attributes:
        percentile: upper percentile of the activations where the search starts; the lower one leaves out as many.
        weights: "uniform" or "gptq": which quantizer rounds the weights, with its default options.
    """

    percentile: Annotated[float, Range(above=50, most=100)] = 99.0
    weights: Literal["uniform", "gptq"] = "uniform"

    def __post_init__(self) -> None:
        check_fields(self, "the quantizer `dual_bounds`")


@dataclass(frozen=True)
class DualBounds:
    """The quantizer `dual_bounds`; see the top of this file."""

    config: DualBoundsConfig = DualBoundsConfig()
    needs_images: ClassVar[bool] = True

    def quantize_weight(self, weight: Tensor, bits: int, statistics: LayerStatistics | None = None) -> QuantizedWeight:
        """See `Quantizer.quantize_weight`."""
        rounding = GPTQ() if self.config.weights == "gptq" else Uniform()
        return rounding.quantize_weight(weight, bits, statistics)

    def activation_grid(self, statistics: LayerStatistics, bits: int) -> ActivationGrid:
        """See `Quantizer.activation_grid`."""
        check_bits(bits)
        tails = np.percentile(statistics.samples, [100 - self.config.percentile, self.config.percentile])
        starts = [_with_zero(*tails.tolist()), _with_zero(statistics.low, statistics.high)]
        samples = _with_ends(statistics)
        found = [least_error_bounds(samples, start, starts[-1], bits) for start in starts]
        _, low, high = min(found)
        return grid_between(low, high, bits)


def _with_zero(low: float, high: float) -> tuple[float, float]:
    return min(low, 0.0), max(high, 0.0)


def _with_ends(statistics: LayerStatistics) -> np.ndarray:
    """Return the samples, and the smallest and largest value of the calibration where they are outside of them, float64."""
    samples = statistics.samples.astype(np.float64)
    ends = [end for end in (statistics.low, statistics.high) if not samples.min() <= end <= samples.max()]
    return np.concatenate([samples, ends])


def least_error_bounds(
    samples: np.ndarray, start: tuple[float, float], widest: tuple[float, float], bits: int
) -> tuple[float, float, float]:
    """Return the squared error on the samples, and the bounds that a pattern search finds.

    Both bounds move by a step, alone and together. If no move lowers the error, the step is halved.

    Args:
        samples: of the activations, float64.
        start: first bounds, low at most 0 and high at least 0.
        widest: the bounds stay between these.
        bits: of the grid.
    """
    low, high = start
    error, share = float(grid_errors(samples, low, np.array([high]), bits)[0]), FIRST_STEP
    for _ in range(MOST_MOVES):
        step = share * (high - low)
        lows = np.clip([low - step, low, low + step], widest[0], 0.0)
        highs = np.clip([high - step, high, high + step], 0.0, widest[1])
        errors = np.stack([grid_errors(samples, end, highs, bits) for end in lows])
        best = np.unravel_index(errors.argmin(), errors.shape)
        if errors[best] < error:
            error, low, high = float(errors[best]), float(lows[best[0]]), float(highs[best[1]])
        elif (share := share / 2) < LAST_STEP / 2**bits:
            break
    return error, low, high
