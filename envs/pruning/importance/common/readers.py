"""The inputs of a group's consumers: second moments, and the channels of each unit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from secateur.envs.calibration.core import CHANNEL, DIAGONAL, NONE, LayerStatistics, required
from secateur.envs.model_graph.plan import ChannelGroup, TensorSlice
from secateur.envs.pruning.importance.common.unit_slices import named_parameters
from secateur.envs.pruning.importance.core import DenseModel
from secateur.envs.weight_layout import is_transposed, outputs_first

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Reader:
    """A layer as a product: outputs = weight times entries of its input.

    Attributes:
        weight: (conv_groups, rows, entries) float64. If only moments of channels are known, each position of the kernel has
            its own rows: errors at different positions of a kernel are added as if they were independent.
        moments: moments of the entries, float64: (conv_groups, entries, entries), or (conv_groups, entries) if only variances
            are known. They are taken around the mean if the layer's output can be shifted: a constant 1 is then one of the
            entries that are never removed, and its elimination from E[[u, 1] [u, 1]^T] gives the covariance.
        squares: (conv_groups, entries) float64: mean squares of the entries.
    """

    weight: Tensor
    moments: Tensor
    squares: Tensor

    @property
    def diagonal(self) -> bool:
        """Whether only variances are known, no covariances."""
        return self.moments.dim() == 2

    @cached_property
    def energy(self) -> float:
        """The sum of the mean squares of all outputs (around their means); positive."""
        if self.diagonal:
            energy = (self.weight.square().sum(1) * self.moments).sum()
        else:
            energy = ((self.weight @ self.moments) * self.weight).sum()
        # Moments are stored in float32: the energy of a constant output would be a rounding error.
        least = _ROUNDING * (self.weight.square().sum(1) * self.squares).sum()
        return float(torch.maximum(energy, least)) or 1.0


def reader(dense: DenseModel, name: str, after_norm: bool = False) -> Reader | None:
    """Return a layer as a product; None if its inputs were not calibrated.

    Args:
        dense: the network.
        name: name of the layer.
        after_norm: whether each output is scaled by the batch norm after the layer, if this is the layer's only reader.
    """
    statistics = required(dense.calibration, "a calibration").layers.get(name)
    if statistics is None or statistics.kind == NONE:
        return None
    layer: Any = dict(dense.model.named_modules())[name]
    norm = _norm(dense, name)
    weight = outputs_first(layer).double()
    if after_norm and norm is not None:
        scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
        weight = weight * scale.detach().double().view(-1, *[1] * (weight.dim() - 1))
    rows = weight.reshape(len(statistics.moments), -1, weight.shape[1], statistics.area)  # (conv groups, outputs, inputs, area)
    per_channel = statistics.kind in (CHANNEL, DIAGONAL)
    rows = rows.transpose(2, 3).flatten(1, 2) if per_channel else rows.flatten(2)
    moments = torch.tensor(statistics.moments, dtype=torch.float64, device=weight.device)
    squares = moments[:, 1] if statistics.kind == DIAGONAL else moments.diagonal(dim1=1, dim2=2)[:, :-1]
    return Reader(rows, _used_moments(statistics, moments, layer.bias is not None or norm is not None), squares)


def unit_entries(dense: DenseModel, group: ChannelGroup, name: str) -> np.ndarray | None:
    """Return the entries of each unit in a consumer's `Reader`, (units, block); None if the units are not on its input axis."""
    place = input_place(dense.model, group, name)
    if place is None:
        return None
    statistics = required(dense.calibration, "a calibration").layers[name]
    if statistics.kind == DIAGONAL:
        return place.positions
    return statistics.entries(place.positions.ravel()).reshape(group.units, -1)


def unit_energy(found: Reader, entries: np.ndarray) -> np.ndarray:
    """Return each unit's share of the energy of all outputs, (units,); eq. (1) of the importance `output_energy`.

    Args:
        found: the layer that reads the units.
        entries: entries of each unit, (units, block).
    """
    rows = found.weight[:, :, torch.tensor(entries, device=found.weight.device)]  # (conv groups, rows, units, block)
    if found.diagonal:
        energy = (rows.square().sum(1) * found.moments[:, entries]).sum((0, 2))
    else:
        blocks = found.moments[:, entries[:, :, None], entries[:, None]]  # (conv groups, units, block, block)
        energy = torch.einsum("gruk,gukl,grul->u", rows, blocks, rows)
    return (energy / found.energy).cpu().numpy()


def input_place(model: nn.Module, group: ChannelGroup, name: str) -> TensorSlice | None:
    """Return the positions of a group's units on the input axis of a consumer's weight; None if it is no layer module.

    The graph may use another layer's name for a tied weight.
    """
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, (nn.Linear, _ConvNd)):
        return None
    parameters = named_parameters(model)
    axis = 0 if is_transposed(layer) else 1
    places = [s for s in group.slices if s.axis == axis and parameters.get(s.tensor) is layer.weight]
    return places[0] if places else None


def input_channels(model: nn.Module, group: ChannelGroup, name: str) -> Tensor | None:
    """Return the channels of each unit in a consumer's input, (units, channels per unit); None if it is no layer module.

    The channel axis is axis 1 of a convolution's input and the last axis of a linear layer's input.
    """
    place = input_place(model, group, name)
    if place is None:
        return None
    layer: Any = model.get_submodule(name)
    conv_groups = getattr(layer, "groups", 1) if place.axis == 1 else 1
    first = np.arange(conv_groups) * layer.weight.shape[1]
    positions = (first[:, None] + place.positions[:, None]).reshape(group.units, -1)
    return torch.from_numpy(positions).to(layer.weight.device)


def _norm(dense: DenseModel, name: str) -> Any:
    """Return the batch norm that is a layer's only reader and has running statistics, or None."""
    norm = dict(dense.model.named_modules()).get(dict(dense.graph.batch_norms).get(name, ""))
    return norm if getattr(norm, "running_mean", None) is not None else None


def _used_moments(statistics: LayerStatistics, moments: Tensor, centered: bool) -> Tensor:
    if statistics.kind == DIAGONAL:
        mean, square = moments.unbind(1)
        return (square - mean.square()).clamp_min(0) if centered else square
    inner, mean = moments[:, :-1, :-1], moments[:, -1, :-1]
    return inner - mean[:, :, None] * mean[:, None] if centered else inner
