"""Batch-norm scale: |gamma| of the batch norms on a channel.

Source: Liu et al. 2017 (network slimming), arXiv:1708.06519, section 3.

Where we differ and why:
1. Networks are taken as they come, without the sparsity training that drives scales to zero.
2. Coupled channels get the mean over all batch norms that act on them, because they can only be removed together.
3. A group without batch norm is ranked by the L1 norm of its producers; scores are never compared across groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.envs.model_graph.plan import ChannelGroup
from secateur.envs.pruning.importance.common.unit_slices import mean_over_producers, unit_rows
from secateur.envs.pruning.importance.core import DenseModel


@dataclass(frozen=True)
class BnScaleConfig:
    """Nothing to set."""


@dataclass(frozen=True)
class BnScale:
    """Mean |gamma| over the group's batch norms; L1 norm of the producers where there is none."""

    config: BnScaleConfig = BnScaleConfig()
    needs_images: ClassVar[bool] = False

    def scores(self, dense: DenseModel) -> tuple[np.ndarray, ...]:
        """See `Importance.scores`; reads the parameters only."""
        scales = {
            f"{name}.weight": module.weight
            for name, module in dense.model.named_modules()
            if isinstance(module, _BatchNorm) and module.affine
        }
        return tuple(_group_scores(dense.model, group, scales) for group in dense.graph.groups)


def _group_scores(model: nn.Module, group: ChannelGroup, scales: dict[str, Tensor]) -> np.ndarray:
    per_norm = [unit_rows(scales[place.tensor], place).abs().mean(1) for place in group.slices if place.tensor in scales]
    if not per_norm:
        return mean_over_producers(model, group, lambda rows: rows.abs().sum(1))
    return torch.stack(per_norm).mean(0).numpy()
