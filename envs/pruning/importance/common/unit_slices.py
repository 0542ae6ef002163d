"""The entries of a group's units in the model's tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from secateur.envs.model_graph.plan import ChannelGroup, TensorSlice
from secateur.envs.weight_layout import is_transposed


def unit_rows(tensor: Tensor, place: TensorSlice) -> Tensor:
    """Return all entries of each unit in one tensor, (units, elements) float64."""
    positions = torch.as_tensor(place.positions, device=tensor.device)
    picked = tensor.detach().double().movedim(place.axis, 0)[positions.reshape(-1)]
    return picked.reshape(len(positions), -1)


def producer_weights(model: nn.Module, group: ChannelGroup) -> list[TensorSlice]:
    """Return the positions of a group's units on the output axis of its producers' weights.

    A weight can appear twice in a group, with its output and its input axis. If no weight has the name of a producer (a tied
    weight has another name in the graph), all parameters of the group are returned.
    """
    modules, parameters = dict(model.named_modules()), set(named_parameters(model))
    places = [place for place in group.slices if place.tensor in parameters]
    named = []
    for place in places:
        layer = place.tensor.removesuffix("weight").rstrip("._")
        output_axis = 1 if is_transposed(modules.get(layer)) else 0
        if layer in group.producers and place.axis == output_axis:
            named.append(place)
    return named or places


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters by all of their names: the graph uses one name of a tied tensor."""
    return dict(model.named_parameters(remove_duplicate=False))


def mean_over_producers(model: nn.Module, group: ChannelGroup, norm: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Return the mean over the producers of `norm` of each unit's weights, (units,) float64.

    Args:
        norm: (units, elements) -> (units,).
    """
    parameters = named_parameters(model)
    per_producer = [norm(unit_rows(parameters[place.tensor], place)) for place in producer_weights(model, group)]
    return torch.stack(per_producer).mean(0).cpu().numpy()


def mean_l1_norm(model: nn.Module, group: ChannelGroup) -> np.ndarray:
    """Return the mean over the producers of the L1 norm of each unit's weights, (units,) float64."""
    return mean_over_producers(model, group, lambda rows: rows.abs().sum(1))
