"""HRank: the mean rank of a channel's feature maps, as matrices of height x width.

Source: Lin et al. 2020, arXiv:2002.10179, eq. (5)-(6).

Where we differ and why:
1. The maps are the inputs of the group's first reader, after the nonlinearity: a coupled group has one such map per unit,
   but several producers.
2. Features of linear layers, tokens, sequences and maps smaller than 2 x 2 have rank 0 or 1. Their score is the share of
   nonzero entries.
3. A unit that is several channels of its reader (grouped convolutions) gets the mean over these channels.
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
from secateur.envs.inputs import call_model
from secateur.envs.pruning.importance.common.readers import input_channels
from secateur.envs.pruning.importance.common.unit_slices import mean_l1_norm
from secateur.envs.pruning.importance.core import DenseModel


@dataclass(frozen=True)
class HRankConfig:
    """Images for the feature maps.

    Attributes:
        max_images: largest number of calibration images.
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
        images = dense.first_images(self.config.max_images)
        totals: list[Tensor | None] = [None] * len(dense.graph.groups)
        hooks = []
        for index, group in enumerate(dense.graph.groups):
            readers = ((name, input_channels(dense.model, group, name)) for name in group.consumers)
            name, channels = next(((name, found) for name, found in readers if found is not None), ("", None))
            if channels is not None:
                adder = _adder(totals, index, channels)
                hooks.append(dense.model.get_submodule(name).register_forward_pre_hook(adder))
        try:
            with torch.inference_mode():
                for batch in images.split(dense.fitting(self.config.batch_size)):
                    call_model(dense.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(
            mean_l1_norm(dense.model, group) if total is None else total.cpu().numpy() / len(images)
            for group, total in zip(dense.graph.groups, totals, strict=True)
        )


def _adder(totals: list[Tensor | None], index: int, channels: Tensor) -> Callable:
    """Return a forward pre-hook that adds the ranks of a batch to `totals[index]`."""

    def add(layer: nn.Module, inputs: tuple) -> None:
        ranks, total = map_ranks(layer, inputs[0], channels).sum(0), totals[index]
        totals[index] = ranks if total is None else total + ranks

    return add


def map_ranks(layer: nn.Module, x: Tensor, channels: Tensor) -> Tensor:
    """Return the rank of each unit's feature map in a layer's input, (images, units) float64; see the top of this file.

    Args:
        layer: the layer that reads x.
        x: input of the layer.
        channels: (units, channels per unit), see `input_channels`.
    """
    if isinstance(layer, nn.Linear):
        features = x.reshape(len(x), -1, x.shape[-1])[:, :, channels]
        return (features != 0).double().mean((1, 3))
    maps = x[:, channels]  # (images, units, channels per unit, height, width)
    if maps.dim() < 5 or min(maps.shape[-2:]) == 1:
        return (maps != 0).double().flatten(2).mean(2)
    return torch.linalg.matrix_rank(maps.contiguous()).double().flatten(2).mean(2)
