"""Error-compensated rounding: the rounding error of a column of a weight is compensated by the columns after it.

For rows w (one per output channel), inputs u with H = E[u u^T], and columns in a fixed order, factor

    P H P^T + lambda I = (I + U) D (I + U)^T,   U strictly upper triangular, D diagonal                               (1)

and round column after column, with the errors e of the columns before:

    q_k = nearest(w_k + e_{<k} U_{<k,k}),   e_k = w_k - q_k                                                           (2)

The squared error of the layer's outputs, e H e^T, is then sum_k D_k (w_k + e_{<k} U_{<k,k} - q_k)^2: each step minimizes
its own term.

Source: Frantar et al. 2023 (GPTQ), arXiv:2210.17323, after Frantar & Alistarh 2022 (OBQ), arXiv:2208.11580. Eq. (1)-(2)
are the same procedure without an inverse of H: Chee et al. 2023 (QuIP), arXiv:2307.13304, LDLQ.

Where we differ and why (figures: CIFAR ResNet-56, top-1 93.5 %, all convolutions but the first at 4, 3 and 2 bits, 250
calibration images, no recovery, 8,000 test images: 93.6, 93.1 and 92.0 %; `uniform`: 92.5, 88.1 and 24.4 %):
1. At 2 bits the grid is -1.5, -0.5, 0.5, 1.5, unless -1, 0, 1 has the smaller error in this layer. With -1, 0, 1 only,
   which does not use one of four codes: 90.4 %.
2. The scale is the corrected scale of the quantizer `uniform`.
3. A channel whose error is larger with compensation (because of clipping) is rounded without compensation.
4. H is not centered: the mean of an output is preserved too, so no bias correction is needed afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.cost_models.core import Positive, check_fields
from secateur.envs.calibration.core import CHANNEL, FULL, LayerStatistics
from secateur.envs.quantization.quantizers.common.activation_grids import ActivationGridConfig, choose_activation_grid
from secateur.envs.quantization.quantizers.common.weight_grids import (
    RelativeRows,
    WeightGrid,
    choose_scale,
    half_step_grid,
    relative_rows,
    symmetric_grid,
)
from secateur.envs.quantization.quantizers.core import ActivationGrid, QuantizedWeight, check_bits
from secateur.envs.quantization.quantizers.uniform import Uniform

BLOCK = 64
"""Number of columns whose errors are propagated to later columns in one matrix product."""


@dataclass(frozen=True)
class GPTQConfig(ActivationGridConfig):
    """Configuration of the compensation.

    Attributes:
        damping: lambda, relative to the mean of H's diagonal.
        activations, percentile: see `ActivationGridConfig`.
    """

    damping: Positive = 0.01

    def __post_init__(self) -> None:
        check_fields(self, "the quantizer `gptq`")


@dataclass(frozen=True)
class GPTQ:
    """The quantizer `gptq`; see the top of this file. Layers without a matrix of moments are rounded as by `uniform`."""

    config: GPTQConfig = GPTQConfig()
    needs_images: ClassVar[bool] = True

    def quantize_weight(self, weight: Tensor, bits: int, statistics: LayerStatistics | None = None) -> QuantizedWeight:
        """See `Quantizer.quantize_weight`."""
        check_bits(bits)
        if statistics is None or statistics.kind not in (FULL, CHANNEL) or not statistics.moments[:, :-1, :-1].any():
            return Uniform().quantize_weight(weight, bits)
        curvature = _curvature(statistics, self.config.damping, weight.device)
        # If the moments are those of one pixel, H is taken as block-diagonal: each kernel position is rounded separately.
        area = statistics.area if statistics.kind == CHANNEL else 1
        relative = relative_rows(weight)
        makers = (symmetric_grid, half_step_grid) if bits == 2 else (symmetric_grid,)
        grids = [make(bits).on(weight.device) for make in makers]
        roundings = [_rounded(relative, grid, curvature, area) for grid in grids]
        values, scale, grid, _ = min(roundings, key=lambda rounding: rounding[3])
        return grid.quantized(values, relative.scales(scale), weight.shape)

    def activation_grid(self, statistics: LayerStatistics, bits: int) -> ActivationGrid:
        """See `Quantizer.activation_grid`."""
        return choose_activation_grid(statistics, bits, self.config)


@dataclass(frozen=True)
class Curvature:
    """The quadratic form of the error of a layer's outputs.

    Attributes:
        matrix: H + lambda I, (conv groups, n, n) float32, relative to the mean of H's diagonal.
        order: columns by descending diagonal, (conv groups, n).
        feedback: (I + U)^T of eq. (1) for this order, (conv groups, n, n) float32.
    """

    matrix: Tensor
    order: Tensor
    feedback: Tensor

    def error(self, errors: Tensor) -> Tensor:
        """Return e H e^T for every row of (conv groups, rows, n)."""
        return (errors @ self.matrix * errors).sum(2)


def _curvature(statistics: LayerStatistics, damping: float, device: torch.device) -> Curvature:
    """Return the curvature of a layer; each conv group has its own lambda."""
    matrix = torch.tensor(statistics.moments[:, :-1, :-1], dtype=torch.float64, device=device)
    means = matrix.diagonal(dim1=1, dim2=2).mean(1)
    means = torch.where(means > 0, means, means.mean())[:, None, None]  # the inputs of a group may all be zero
    matrix = (matrix + damping * means * torch.eye(matrix.shape[1], dtype=torch.float64, device=device)) / means.mean()
    order = matrix.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    sorted_matrix = matrix[torch.arange(len(order), device=device)[:, None, None], order[:, :, None], order[:, None]]
    upper = torch.linalg.cholesky(sorted_matrix.flip(1, 2)).flip(1, 2)  # from the last row up
    feedback = (upper / upper.diagonal(dim1=1, dim2=2)[:, None]).transpose(1, 2)
    return Curvature(matrix.float(), order, feedback.float().contiguous())


def _rounded(
    relative: RelativeRows, grid: WeightGrid, curvature: Curvature, area: int
) -> tuple[Tensor, Tensor, WeightGrid, float]:
    """Return grid values (outputs, entries), scales (outputs,), the grid, and the layer's error."""
    outputs, scale = len(relative.rows), choose_scale(relative.rows, grid, "mse")
    rows = _columns(relative.rows, len(curvature.order), area)
    scales = scale.repeat_interleave(area).view(*rows.shape[:2], 1)
    both = grid.round(rows / scales), _compensate(rows / scales, grid, curvature)
    plain, compensated = (curvature.error(rows - values * scales).view(outputs, area).sum(1) for values in both)
    worse = (compensated > plain).repeat_interleave(area).view_as(scales)
    values = torch.where(worse, *both).view(outputs, area, -1).transpose(1, 2).reshape(outputs, -1)
    # In units of the weight, so that all channels are measured by their contribution to the output.
    error = (torch.minimum(plain, compensated).double() * relative.largest.double().square()).sum()
    return values, scale, grid, float(error)


def _columns(rows: Tensor, groups: int, area: int) -> Tensor:
    """Return (outputs, entries) as (conv groups, outputs per group x area, entries / area)."""
    split = rows.view(len(rows), -1, area).transpose(1, 2)
    return split.reshape(groups, len(rows) // groups * area, -1)


def _compensate(rows: Tensor, grid: WeightGrid, curvature: Curvature) -> Tensor:
    """Return eq. (2), (conv groups, rows, n); rows are in units of their scales."""
    feedback = curvature.feedback
    columns = curvature.order[:, :, None].expand(-1, -1, rows.shape[1])
    wanted = rows.transpose(1, 2).gather(1, columns)  # (conv groups, n, rows): a column is contiguous
    values, errors = torch.empty_like(wanted), torch.zeros_like(wanted)
    for start in range(0, wanted.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        target = torch.baddbmm(wanted[:, block], feedback[:, block, :start], errors[:, :start])
        for k in range(start, start + target.shape[1]):
            now, within = slice(k, k + 1), slice(k - start, k - start + 1)
            values[:, now] = grid.round(torch.baddbmm(target[:, within], feedback[:, now, start:k], errors[:, start:k]))
            errors[:, now] = wanted[:, now] - values[:, now]
    return torch.empty_like(values).scatter_(1, columns, values).transpose(1, 2)
