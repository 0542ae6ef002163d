"""Batch-norm scale: |gamma| of the batch norms of a channel.

Source: Liu et al. 2017 (network slimming), arXiv:1708.06519, section 3.

Where we differ and why:
1. The network is not trained with a sparsity penalty on the scales first.
2. Coupled channels get the mean over all of their batch norms, because they can only be removed together.
3. A group without batch norm is ranked by the L1 norm of its producers; scores are never compared across groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.envs.model_graph.plan import ChannelGroup
from secateur.envs.pruning.importance.common.unit_slices import mean_l1_norm, unit_rows
from secateur.envs.pruning.importance.core import DenseModel


@dataclass(frozen=True)
class BnScaleConfig:
    """No options."""


@dataclass(frozen=True)
class BnScale:
    """Mean |gamma| over the group's batch norms; L1 norm of the producers for a group without batch norm."""

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


def _group_scores(model: nn.Module, group: ChannelGroup, scales: Mapping[str, Tensor]) -> np.ndarray:
    per_norm = [unit_rows(scales[place.tensor], place).abs().mean(1) for place in group.slices if place.tensor in scales]
    if not per_norm:
        return mean_l1_norm(model, group)
    return torch.stack(per_norm).mean(0).cpu().numpy()
