"""Least squares: layers that read pruned channels are refitted on the kept channels.

For a layer with weight W and the (unfolded) input u of the dense network, with kept entries S (including a constant 1
for the intercept) and removed entries R, and A = E[u u^T] over the calibration images, the refitted weight is

    W'_S = W_S + W_R A_RS (A_SS + lambda I)^-1                                                                   (1)

the minimizer of E|W' u_S - W u|^2 + lambda |W' - W_S|^2. The intercept is added to the layer's bias, or subtracted from the
running mean of the batch norm after it.

Source: He et al. 2017 (channel pruning), arXiv:1707.06168, eq. (1)-(3), the reconstruction step.

Where we differ and why:
1. Targets and inputs are those of the dense network ("independent"): A is computed once, and a candidate needs one small
   linear system per layer. Errors of earlier layers are not corrected.
2. The damping term keeps the weights near the old weights, not near zero, so nearly constant inputs do not change them. The
   intercept is not damped.
3. A is estimated from a sample of output positions, because neighboring patches are similar. If it would be too large, A is
   the matrix of the channels at one pixel, and a channel is predicted equally at all positions of the kernel. If this is too
   large too, only the mean of the removed inputs is compensated.

The groups of a grouped convolution are refitted separately. A depthwise convolution loses its outputs together with its
inputs, so it is not refitted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from secateur.cost_models.core import Positive, check_fields
from secateur.envs.calibration.core import CHANNEL, DIAGONAL, NONE, LayerStatistics, required
from secateur.envs.candidate import CandidateNetwork, KeptAxes
from secateur.envs.weight_layout import kernel_use, outputs_first


@dataclass(frozen=True)
class LeastSquaresConfig:
    """Configuration of the refits.

    Attributes:
        damping: lambda, relative to the mean of A's diagonal.
    """

    damping: Positive = 1e-3

    def __post_init__(self) -> None:
        check_fields(self, "the recovery `least_squares`")


@dataclass(frozen=True)
class LeastSquares:
    """Refits convolutions and linear layers from which inputs were removed."""

    config: LeastSquaresConfig = LeastSquaresConfig()
    after_quantization: ClassVar[bool] = False
    needs_images: ClassVar[bool] = True

    def apply(self, candidate: CandidateNetwork) -> None:
        """See `Recovery.apply`."""
        self.refit_readers(candidate, without=())

    def refit_readers(self, candidate: CandidateNetwork, without: Collection[str]) -> None:
        """Refit all layers from which inputs were removed, but these."""
        readers = dict.fromkeys(name for group in candidate.graph.groups for name in group.consumers if name not in without)
        for name in readers:
            statistics = required(candidate.calibration, "a calibration").layers.get(name)
            if statistics is None or statistics.kind == NONE:
                continue
            axes = candidate.kept_axes(name)
            if len(axes.inputs) == statistics.channels:
                continue
            weight, shift = self._refitted(candidate, name, statistics, axes)
            candidate.set_weight(name, weight)
            if candidate.has_intercept(name):
                candidate.shift(name, shift)

    def _refitted(
        self, candidate: CandidateNetwork, name: str, statistics: LayerStatistics, axes: KeptAxes
    ) -> tuple[Tensor, Tensor]:
        """Return weight and shift of the kept outputs; the solution for all outputs is cached, by kept inputs."""
        intercept = candidate.has_intercept(name)
        key = ("least_squares", name, self.config.damping, intercept, axes.inputs.tobytes())
        layer = candidate.dense_layers[name]
        dense, use = outputs_first(layer), kernel_use(layer)

        def solve() -> tuple[Tensor, Tensor]:
            solutions = [
                refit(weight, axes.inputs, replace(statistics, moments=moments[None]), self.config.damping, intercept, use)
                for weight, moments in zip(dense.chunk(len(statistics.moments)), statistics.moments, strict=True)
            ]
            weights, shifts = zip(*solutions, strict=True)
            return torch.cat(weights), torch.cat(shifts)

        weight, shift = candidate.cache.get(key, solve)
        outputs = torch.from_numpy(axes.outputs).to(weight.device)
        return weight[outputs], shift[outputs]


def refit(
    weight: Tensor, kept_in: np.ndarray, statistics: LayerStatistics, damping: float, intercept: bool, use: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return eq. (1) and the intercept: (outputs, kept inputs, ...) and (outputs,), float32.

    Args:
        weight: dense weight of one conv group, (outputs, inputs, ...).
        kept_in: kept positions on the input axis.
        statistics: statistics of the dense input. With kind "channel", a channel is predicted equally at all positions of the
            kernel; with kind "diagonal", only the mean of the removed inputs is compensated, by the intercept.
        damping: lambda, relative to the mean of the diagonal.
        intercept: whether there is an intercept; without it, the second result is zero.
        use: share of the kernel positions that an output reads on average; see `kernel_use`.
    """
    removed_in = np.setdiff1d(np.arange(weight.shape[1]), kept_in)
    device = weight.device
    rows = weight.double().reshape(*weight.shape[:2], -1)  # (outputs, inputs, area)
    if statistics.kind == DIAGONAL:
        mean = torch.from_numpy(statistics.moments[0, 0, removed_in]).to(device).double()
        shift = use * (rows[:, removed_in].sum(2) @ mean).float()
        return weight[:, kept_in].clone(), shift if intercept else torch.zeros_like(shift)
    per_channel = statistics.kind == CHANNEL
    rows = rows.transpose(1, 2).flatten(0, 1) if per_channel else rows.flatten(1)  # (outputs [x area], entries)
    kept, removed = (statistics.entries(positions) for positions in (kept_in, removed_in))
    moments = statistics.moments[0]
    fit = np.append(kept, len(moments) - 1) if intercept else kept
    second = torch.from_numpy(moments[np.ix_(fit, fit)]).to(device).double()
    cross = torch.from_numpy(moments[np.ix_(fit, removed)]).to(device).double()
    diagonal = second.diagonal()[: len(kept)]
    diagonal += damping * diagonal.mean().clamp_min(1e-12)
    change = torch.linalg.solve(second, cross @ rows[:, removed].T).T
    refitted = (rows[:, kept] + change[:, : len(kept)]).float()
    shift = change[:, -1].float() if intercept else weight.new_zeros(len(rows), dtype=torch.float32)
    if per_channel:
        area = weight[0, 0].numel()
        refitted = refitted.view(len(weight), area, len(kept_in)).transpose(1, 2)
        shift = use * shift.view(len(weight), area).sum(1)
    return refitted.reshape(len(weight), len(kept_in), *weight.shape[2:]).contiguous(), shift
