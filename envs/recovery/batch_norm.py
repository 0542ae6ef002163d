"""Batch-norm recalibration: the running statistics are estimated again on the compressed network.

Source: Li et al. 2020 (EagleEye), arXiv:2007.02491, section 3.3 ("adaptive batch normalization").

Where we differ and why:
1. Statistics are the plain average over all batches (momentum None), not an exponential one: the last batches count no
   more than the first, and nothing is left of the dense network's statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from envs.core import InputError
from envs.model_graph.plan import ModelGraph


@dataclass(frozen=True)
class BatchNormConfig:
    """How the statistics are estimated.

    Attributes:
        batch_size: images per batch; the variance is that within batches, so small batches underestimate it.
        max_images: at most this many of the calibration images are used.
    """

    batch_size: int = 128
    max_images: int = 1024

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_images"):
            if getattr(self, name) < 2:
                raise InputError(
                    f"`{name}` of the recovery `batch_norm` must be at least 2, but got {getattr(self, name)}."
                )


@dataclass(frozen=True)
class BatchNorm:
    """Re-estimates mean and variance of every batch norm; does nothing to a network without any."""

    config: BatchNormConfig = BatchNormConfig()
    before_quantization: ClassVar[bool] = False

    def prepare(self, model: nn.Module, graph: ModelGraph, images: Tensor) -> None:
        """See `Recovery.prepare`; there is nothing to compute beforehand."""

    def apply(
        self,
        network: nn.Module,
        dense_model: nn.Module,
        graph: ModelGraph,
        kept: Sequence[np.ndarray],
        prepared: None,
        images: Tensor,
    ) -> None:
        """See `Recovery.apply`."""
        norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if not norms:
            return
        images = images[: self.config.max_images]
        before = [(norm, norm.training, norm.momentum) for norm in norms]
        for norm in norms:
            # New tensors: the old ones may be shared with the dense model.
            norm.running_mean = torch.zeros_like(norm.running_mean)
            norm.running_var = torch.ones_like(norm.running_var)
            norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)
            norm.train()
            norm.momentum = None
        try:
            with torch.no_grad():
                # Batches of equal size, because each counts the same in the average.
                for batch in images.tensor_split(-(-len(images) // self.config.batch_size)):
                    network(batch)
        finally:
            for norm, training, momentum in before:
                norm.train(training)
                norm.momentum = momentum
