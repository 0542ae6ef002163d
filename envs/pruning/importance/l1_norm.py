"""L1 norm of the weights that produce a channel.

Source: Li et al. 2017, arXiv:1608.08710, section 3.1.

Where we differ and why:
1. Coupled channels are ranked by the mean over all layers that produce them, because they can only be removed together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from secateur.envs.pruning.importance.common.unit_slices import mean_l1_norm
from secateur.envs.pruning.importance.core import DenseModel


@dataclass(frozen=True)
class L1NormConfig:
    """No options."""


@dataclass(frozen=True)
class L1Norm:
    """Mean over the group's producers of sum |w| over each unit's filter."""

    config: L1NormConfig = L1NormConfig()
    needs_images: ClassVar[bool] = False

    def scores(self, dense: DenseModel) -> tuple[np.ndarray, ...]:
        """See `Importance.scores`; reads the weights only."""
        return tuple(mean_l1_norm(dense.model, group) for group in dense.graph.groups)
