"""What the consumers of a group read of its units: second moments, and the channels themselves where a hook can see them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from secateur.envs.calibration.core import CHANNEL, DIAGONAL, NONE, LayerStatistics
from secateur.envs.model_graph.plan import ChannelGroup, TensorSlice
from secateur.envs.pruning.importance.common.unit_slices import named_parameters
from secateur.envs.pruning.importance.core import DenseModel

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Reader:
    """A layer, seen as outputs = weight times entries of its input.

    Attributes:
        weight: (conv_groups, rows, entries) float64. Where only moments of channels are known, each position of the kernel
            has rows of its own: errors at different positions of a kernel are added as if they were independent.
        moments: of the entries, float64: (conv_groups, entries, entries), or where only variances are known
            (conv_groups, entries). Around the mean, if the layer's output can be shifted: then a constant 1 is among the
            entries that are never removed, and eliminating it from E[[u, 1] [u, 1]^T] leaves the covariance.
        squares: (conv_groups, entries) float64: mean squares of the entries.
    """

    weight: Tensor
    moments: Tensor
    squares: Tensor

    @property
    def diagonal(self) -> bool:
        """Whether nothing is known about how the entries go together."""
        return self.moments.dim() == 2

    @cached_property
    def energy(self) -> float:
        """The mean square of all outputs (around their means), added up; positive."""
        if self.diagonal:
            energy = (self.weight.square().sum(1) * self.moments).sum()
        else:
            energy = ((self.weight @ self.moments) * self.weight).sum()
        # Moments are kept in float32: what is left of a constant output is rounding, and nothing to compare with.
        least = _ROUNDING * (self.weight.square().sum(1) * self.squares).sum()
        return float(torch.maximum(energy, least)) or 1.0


def reader(dense: DenseModel, name: str, after_norm: bool = False) -> Reader | None:
    """Return how a layer reads its input; None if its inputs were not calibrated.

    Args:
        dense: the network.
        name: of the layer.
        after_norm: whether each output is scaled as the batch norm behind the layer does, if that is its only reader.
    """
    statistics = dense.calibration.layers.get(name)
    if statistics is None or statistics.kind == NONE:
        return None
    layer, norm = dict(dense.model.named_modules())[name], _norm(dense, name)
    weight = layer.weight.detach().double()
    if after_norm and norm is not None:
        scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
        weight = weight * scale.detach().double().view(-1, *[1] * (weight.dim() - 1))
    rows = weight.reshape(len(statistics.moments), -1, weight.shape[1], statistics.area)  # (conv groups, outputs, inputs, area)
    per_channel = statistics.kind in (CHANNEL, DIAGONAL)
    rows = rows.transpose(2, 3).flatten(1, 2) if per_channel else rows.flatten(2)
    moments = torch.tensor(statistics.moments, dtype=torch.float64)
    squares = moments[:, 1] if statistics.kind == DIAGONAL else moments.diagonal(dim1=1, dim2=2)[:, :-1]
    return Reader(rows, _used_moments(statistics, moments, layer.bias is not None or norm is not None), squares)


def unit_entries(dense: DenseModel, group: ChannelGroup, name: str) -> np.ndarray | None:
    """Return which entries of a consumer's `Reader` each unit is, (units, block); None if none of its input axis."""
    place = input_place(dense.model, group, name)
    if place is None or place.axis != 1:
        return None
    statistics = dense.calibration.layers[name]
    if statistics.kind == DIAGONAL:
        return place.positions
    return statistics.entries(place.positions.ravel()).reshape(group.units, -1)


def unit_energy(found: Reader, entries: np.ndarray) -> np.ndarray:
    """Return what each unit contributes to the energy of all outputs, as a share, (units,); see `output_energy`, eq. (1).

    Args:
        found: how the layer reads its input.
        entries: those of each unit, (units, block).
    """
    rows = found.weight[:, :, torch.tensor(entries)]  # (conv groups, rows, units, block)
    if found.diagonal:
        energy = (rows.square().sum(1) * found.moments[:, entries]).sum((0, 2))
    else:
        blocks = found.moments[:, entries[:, :, None], entries[:, None]]  # (conv groups, units, block, block)
        energy = torch.einsum("gruk,gukl,grul->u", rows, blocks, rows)
    return (energy / found.energy).numpy()


def input_place(model: nn.Module, group: ChannelGroup, name: str) -> TensorSlice | None:
    """Return where a group's units sit on the input axis of a consumer's weight; None if it is no layer module.

    The plan may know a tied weight by another layer's name.
    """
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, (nn.Linear, _ConvNd)):
        return None
    parameters = named_parameters(model)
    axis = 0 if isinstance(layer, _ConvTransposeNd) else 1
    places = [s for s in group.slices if s.axis == axis and parameters.get(s.tensor) is layer.weight]
    return places[0] if places else None


def input_channels(model: nn.Module, group: ChannelGroup, name: str) -> Tensor | None:
    """Return which channels of a consumer's input each unit is, (units, channels per unit); None if it is no layer module.

    Channels are axis 1 of a convolution's input and the last axis of a linear layer's.
    """
    place = input_place(model, group, name)
    if place is None:
        return None
    layer = model.get_submodule(name)
    conv_groups = getattr(layer, "groups", 1) if place.axis == 1 else 1
    first = np.arange(conv_groups) * layer.weight.shape[1]
    return torch.from_numpy((first[:, None] + place.positions[:, None]).reshape(group.units, -1))


def _norm(dense: DenseModel, name: str) -> nn.Module | None:
    """Return the batch norm that is a layer's only reader, if there is one with running statistics."""
    norm = dict(dense.model.named_modules()).get(dict(dense.graph.batch_norms).get(name))
    return norm if getattr(norm, "running_mean", None) is not None else None


def _used_moments(statistics: LayerStatistics, moments: Tensor, centered: bool) -> Tensor:
    if statistics.kind == DIAGONAL:
        mean, square = moments.unbind(1)
        return (square - mean.square()).clamp_min(0) if centered else square
    inner, mean = moments[:, :-1, :-1], moments[:, -1, :-1]
    return inner - mean[:, :, None] * mean[:, None] if centered else inner
