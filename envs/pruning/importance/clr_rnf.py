"""Reciprocal nearest filters: the filters that are among the nearest neighbors of all filters of a layer are kept.

Each filter has a list of all filters, ordered by distance; the first entry is the filter itself. With increasing k, filter j
enters the intersection of all lists' first k entries when k reaches the largest place that j has in any list. To keep m
filters, k is increased until the intersection has m filters:

    score_j = - max over i of (place of j in the list of i)                                                      (1)

ranks the filters in the order in which they enter, for all m at once.

Source: Lin et al. 2022 (CLR-RNF), TNNLS, the k-reciprocal nearest filter selection.

Where we differ and why:
1. If several filters enter at the same k, those with the smaller mean place come first.
2. Coupled channels are compared by the weights of all of their producers, because they can only be removed together. The
   weights of each producer are divided by the norm of all of its filters together.
Small filters are near to all others and are therefore often kept: this criterion is for networks that are fine-tuned
afterwards (ResNet-56 on CIFAR-10, half of every block's inner channels removed and refitted, 8,000 test images: 31.7 %, while
the L1 norm has 85.4 %).

The paper's other part, the number of filters that each layer keeps, is the agent `clr_rnf`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.envs.model_graph.plan import ChannelGroup
from secateur.envs.pruning.importance.common.unit_slices import named_parameters, producer_weights, unit_rows
from secateur.envs.pruning.importance.core import DenseModel


@dataclass(frozen=True)
class ClrRnfConfig:
    """No options."""


@dataclass(frozen=True)
class ClrRnf:
    """Minus the largest place in the lists of nearest neighbors."""

    config: ClrRnfConfig = ClrRnfConfig()
    needs_images: ClassVar[bool] = False

    def scores(self, dense: DenseModel) -> tuple[np.ndarray, ...]:
        """See `Importance.scores`; reads the weights only."""
        return tuple(reciprocal_scores(_filters(dense.model, group)) for group in dense.graph.groups)


def _filters(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Return the weights that produce each unit, (units, elements)."""
    parameters = named_parameters(model)
    per_producer = [unit_rows(parameters[place.tensor], place) for place in producer_weights(model, group)]
    return torch.cat([rows / rows.norm().clamp_min(torch.finfo(rows.dtype).tiny) for rows in per_producer], dim=1)


def reciprocal_scores(filters: Tensor) -> np.ndarray:
    """Return eq. (1) plus units - 1, plus a number below 1 that is larger for a smaller mean place, (units,).

    Args:
        filters: (units, elements) float64.
    """
    units = len(filters)
    # Computed from differences, not from products, so the distance of equal filters is exactly 0.
    distances = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(-1.0)
    order = distances.argsort(dim=1, stable=True)
    places = torch.empty_like(order).scatter_(1, order, torch.arange(units, device=order.device).expand(units, units))
    return (units - 1 - places.amax(0) + (1 - places.double().mean(0) / units)).cpu().numpy()
