"""L2 norm of the weights that produce a channel.

Source: the l2 criterion of He et al. 2018 (soft filter pruning), arXiv:1808.06866, eq. (2) with p = 2.

Where we differ and why:
1. Coupled channels are ranked by the mean over all layers that produce them, because they can only be removed together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from secateur.envs.pruning.importance.common.unit_slices import mean_over_producers
from secateur.envs.pruning.importance.core import DenseModel


@dataclass(frozen=True)
class L2NormConfig:
    """No options."""


@dataclass(frozen=True)
class L2Norm:
    """Mean over the group's producers of sqrt(sum w^2) over each unit's filter."""

    config: L2NormConfig = L2NormConfig()
    needs_images: ClassVar[bool] = False

    def scores(self, dense: DenseModel) -> tuple[np.ndarray, ...]:
        """See `Importance.scores`; reads the weights only."""
        return tuple(mean_over_producers(dense.model, group, lambda rows: rows.norm(dim=1)) for group in dense.graph.groups)
