"""Scales of quantized channels: the filters of a layer and its batch norm are compared before and after quantization.

A channel is x = gamma W u / sigma + (beta - gamma mu / sigma), where u is its layer's input. With X = gamma W / sigma and
y = beta - gamma mu / sigma, and X^, y^ for the layer after quantization, a reader multiplies the channel by

    c = (<X^, X> + lambda_1 y^ y) / (|X^|^2 + lambda_1 y^2 + lambda_2)                                                 (1)

which minimizes |c X^ - X|^2 + lambda_1 (c y^ - y)^2 + lambda_2 c^2.

Source: Chen et al. 2023 (DF-MPC), arXiv:2307.00498, eq. (27) for one channel; with mu^ = mu, sigma^ = sigma, lambda_2 = 0 it
is the scale of Bai et al. 2023 (UDFC), arXiv:2308.07209, eq. (21).

If several layers produce a channel: for a sum, the filters of all layers are stacked; a depthwise convolution follows the other
layers, so its own scale is a factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.envs.calibration.patches import is_plain
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.model_graph.plan import ChannelGroup, TensorSlice
from secateur.envs.pruning.importance.common.unit_slices import producer_weights, unit_rows


@dataclass(frozen=True)
class Filters:
    """A layer's filters and offsets after its batch norm.

    Attributes:
        rows: X, (outputs, entries) float64.
        offsets: y, (outputs,) float64.
    """

    rows: Tensor
    offsets: Tensor


def filters(layer: Any, norm: Any) -> Filters:
    """Return X and y of a layer and the batch norm after it."""
    beta, gamma, bias = (None if tensor is None else tensor.detach().double() for tensor in (norm.bias, norm.weight, layer.bias))
    scale = (1 if gamma is None else gamma) / (norm.running_var.double() + norm.eps).sqrt()
    offsets = (0 if beta is None else beta) - scale * (norm.running_mean.double() - (0 if bias is None else bias))
    return Filters(layer.weight.detach().double().flatten(1) * scale[:, None], offsets)


def is_depthwise(layer: nn.Module) -> bool:
    """Return whether every conv group has one input channel."""
    return is_plain(layer) and not isinstance(layer, nn.Linear) and 1 < layer.groups == layer.in_channels


def normed_producers(candidate: CandidateNetwork, group: ChannelGroup) -> Iterator[tuple[str, TensorSlice]]:
    """Yield (layer, positions of the group's units) of the producers that are followed by a batch norm."""
    for place in producer_weights(candidate.dense_model, group):
        name = place.tensor.removesuffix(".weight")
        if is_plain(candidate.layers.get(name)) and place.axis == 0 and candidate.norm(name) is not None:
            yield name, place


def reading_places(candidate: CandidateNetwork, group: ChannelGroup) -> Iterator[tuple[str, TensorSlice]]:
    """Yield (layer, positions of the group's units) of the plain layers, without conv groups, that read them."""
    for place in group.slices:
        name = place.tensor.removesuffix(".weight")
        layer = candidate.layers.get(name)
        if name in group.consumers and place.axis == 1 and is_plain(layer) and getattr(layer, "groups", 1) == 1:
            yield name, place


@dataclass
class ScaleEstimator:
    """Computes the scales of quantized channels from the filters before and after quantization.

    Attributes:
        lambda1, lambda2: weights in eq. (1).
        before, after: {layer: filters} before and after the quantization of the layer.
    """

    lambda1: float
    lambda2: float = 0.0
    before: dict[str, Filters] = field(default_factory=dict)
    after: dict[str, Filters] = field(default_factory=dict)

    def scales(self, candidate: CandidateNetwork, group: ChannelGroup, kept: np.ndarray, producers: list[str]) -> Tensor:
        """Return the scales c of the kept units, (units,) float64, at least 0.

        Args:
            candidate: the candidate.
            group: a channel group.
            kept: kept units of the group.
            producers: the quantized layers among the group's producers.
        """
        device = candidate.layers[producers[0]].weight.device
        product, square, factor = (torch.full((len(kept),), x, dtype=torch.float64, device=device) for x in (0.0, 0.0, 1.0))
        for name, place in normed_producers(candidate, group):
            if name not in producers:
                continue
            units = TensorSlice(place.tensor, 0, np.searchsorted(candidate.kept_axes(name).outputs, place.positions[kept]))
            parts = self._sums(self.before[name], self.after[name], units)
            if is_depthwise(candidate.layers[name]):
                factor = factor * self._ratio(*parts)
            else:
                product, square = product + parts[0], square + parts[1]
        return factor * self._ratio(product, square)

    def _sums(self, before: Filters, after: Filters, units: TensorSlice) -> tuple[Tensor, Tensor]:
        """Return numerator and denominator of eq. (1) without lambda_2, each (units,)."""
        rows, rows_after = unit_rows(before.rows, units), unit_rows(after.rows, units)
        y, y_after = unit_rows(before.offsets, units), unit_rows(after.offsets, units)
        product = (rows_after * rows).sum(1) + self.lambda1 * (y_after * y).sum(1)
        return product, rows_after.square().sum(1) + self.lambda1 * y_after.square().sum(1)

    def _ratio(self, product: Tensor, square: Tensor) -> Tensor:
        square = square + self.lambda2
        return torch.where(square > 0, product / square, 1).clamp_min(0)


def scale_inputs(candidate: CandidateNetwork, name: str, place: TensorSlice, kept: np.ndarray, scales: Tensor) -> None:
    """Multiply a layer's weights for a group's kept units by the scales, (units,)."""
    weight = candidate.layers[name].weight.detach()
    factors = weight.new_ones(weight.shape[1])
    positions = np.searchsorted(candidate.kept_axes(name).inputs, place.positions[kept])
    factors[torch.from_numpy(positions).to(weight.device)] = scales.float()[:, None].expand(positions.shape)
    candidate.set_weight(name, weight * factors.view(1, -1, *[1] * (weight.dim() - 2)))
