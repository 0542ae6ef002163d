"""First-order Taylor importance: the squared change of the loss, to first order, when a unit is set to zero.

Source: Molchanov et al. 2019, arXiv:1906.10771, eq. (8): I_S = (sum over s in S of g_s w_s)^2, averaged over batches.

Where we differ and why:
1. If a channel has batch norms, S is their scale and shift. This equals the paper's gate after the batch norm, because
   x * dloss/dx summed over a channel x = gamma * x^ + beta equals gamma * g_gamma + beta * g_beta.
2. Otherwise S is the unit's weights and biases in the layers that *produce* it. The weights of the layers that read it are
   not in S, because they would count the same removal a second time.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.cost_models.core import Count, check_fields
from secateur.envs.model_graph.plan import ChannelGroup, TensorSlice
from secateur.envs.pruning.importance.common.unit_slices import named_parameters, producer_weights, unit_rows
from secateur.envs.pruning.importance.core import DenseModel


@dataclass(frozen=True)
class TaylorConfig:
    """Batches for the gradient.

    Attributes:
        batch_size: images per gradient; it changes the scores, because the square is taken per batch.
        max_images: largest number of calibration images.
    """

    batch_size: Count = 32
    max_images: Count = 512

    def __post_init__(self) -> None:
        check_fields(self, "the importance `taylor`")


@dataclass(frozen=True)
class Taylor:
    """Mean over batches of (sum w * dloss/dw)^2 over each unit's scales and shifts, or over its weights."""

    config: TaylorConfig = TaylorConfig()
    needs_images: ClassVar[bool] = True

    def scores(self, dense: DenseModel) -> tuple[np.ndarray, ...]:
        """See `Importance.scores`; the loss is taken in eval mode, so batch statistics have no effect."""
        model = copy.deepcopy(dense.model).eval().requires_grad_(True)
        parameters = named_parameters(model)
        places = [_gates(model, group) for group in dense.graph.groups]
        totals = [np.zeros(group.units) for group in dense.graph.groups]
        batches = dense.first_batches(self.config.max_images, dense.fitting(self.config.batch_size))
        for batch in batches:
            model.zero_grad()
            dense.loss(model, batch).backward()
            for total, group_places in zip(totals, places, strict=True):
                total += _first_order(parameters, group_places) ** 2 / len(batches)
        return tuple(totals)


def _gates(model: nn.Module, group: ChannelGroup) -> list[TensorSlice]:
    """Return the positions of the set S of the group's units, see the top of this file."""
    modules, parameters = dict(model.named_modules()), named_parameters(model)
    vectors = [p for p in group.slices if p.tensor in parameters and parameters[p.tensor].dim() == 1]
    scales = [p for p in vectors if isinstance(modules.get(p.tensor.rpartition(".")[0]), _BatchNorm)]
    weights = [p for p in producer_weights(model, group) if parameters[p.tensor].dim() > 1]
    return scales or weights + vectors


def _first_order(parameters: dict[str, nn.Parameter], places: list[TensorSlice]) -> np.ndarray:
    """Return sum of w * g over each unit's elements, (units,)."""
    products = []
    for place in places:
        parameter = parameters[place.tensor]
        if parameter.grad is not None:
            products.append(unit_rows(parameter * parameter.grad, place).sum(1))
    return torch.stack(products).sum(0).cpu().numpy()
