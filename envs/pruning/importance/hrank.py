"""HRank: the mean rank of a channel's feature maps, as matrices of height x width.

Source: Lin et al. 2020, arXiv:2002.10179, eq. (5)-(6).

Where we differ and why:
1. The maps are those that the group's first reader sees, behind the nonlinearity: a coupled group has one such map per
   unit, but several producers.
2. What is no map of at least 2 x 2 (features of linear layers, tokens, sequences, pooled maps) has rank 0 or 1. There the
   score is the share of entries that are not zero.
3. A unit that is several channels of its reader (grouped convolutions) gets the mean over them.
4. Groups that no layer module reads are ranked by the L1 norm of their producers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.cost_models.core import Count, check_fields
from secateur.envs.pruning.importance.common.readers import input_channels
from secateur.envs.pruning.importance.common.unit_slices import mean_over_producers
from secateur.envs.pruning.importance.core import DenseModel


@dataclass(frozen=True)
class HRankConfig:
    """How many maps are looked at.

    Attributes:
        max_images: at most this many of the calibration images are used.
        batch_size: images per forward pass.
    """

    max_images: Count = 128
    batch_size: Count = 32

    def __post_init__(self) -> None:
        check_fields(self, "the importance `hrank`")


@dataclass(frozen=True)
class HRank:
    """Mean rank of each unit's feature maps over the images."""

    config: HRankConfig = HRankConfig()
    needs_images: ClassVar[bool] = True

    def scores(self, dense: DenseModel) -> tuple[np.ndarray, ...]:
        """See `Importance.scores`; runs the network once over the images."""
        totals: list[Tensor | None] = [None] * len(dense.graph.groups)
        hooks = []
        for index, group in enumerate(dense.graph.groups):
            seen = ((name, input_channels(dense.model, group, name)) for name in group.consumers)
            name, channels = next(((name, found) for name, found in seen if found is not None), (None, None))
            if name is not None:
                hook = _adder(totals, index, channels)
                hooks.append(dense.model.get_submodule(name).register_forward_pre_hook(hook))
        try:
            with torch.inference_mode():
                for batch in dense.images[: self.config.max_images].split(self.config.batch_size):
                    dense.model(batch)
        finally:
            for hook in hooks:
                hook.remove()
        images = min(self.config.max_images, len(dense.images))
        return tuple(
            mean_over_producers(dense.model, group, lambda rows: rows.abs().sum(1)) if total is None else total.numpy() / images
            for group, total in zip(dense.graph.groups, totals, strict=True)
        )


def _adder(totals: list[Tensor | None], index: int, channels: Tensor) -> Callable:
    """Return a forward pre-hook that adds the ranks of a batch to `totals[index]`."""

    def add(layer: nn.Module, inputs: tuple) -> None:
        ranks = map_ranks(layer, inputs[0], channels).sum(0)
        totals[index] = ranks if totals[index] is None else totals[index] + ranks

    return add


def map_ranks(layer: nn.Module, x: Tensor, channels: Tensor) -> Tensor:
    """Return the rank of each unit's map in a layer's input, (images, units) float64; see the module for what is no map.

    Args:
        layer: that reads x.
        x: its input.
        channels: (units, channels per unit), see `input_channels`.
    """
    if isinstance(layer, nn.Linear):
        features = x.reshape(len(x), -1, x.shape[-1])[:, :, channels]
        return (features != 0).double().mean((1, 3))
    maps = x[:, channels]  # (images, units, channels per unit, height, width)
    if maps.dim() < 5 or min(maps.shape[-2:]) == 1:
        return (maps != 0).double().flatten(2).mean(2)
    return torch.linalg.matrix_rank(maps.contiguous()).double().flatten(2).mean(2)
