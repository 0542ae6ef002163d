"""Batch-norm recalibration: the running statistics are estimated again on the compressed network.

Source: Li et al. 2020 (EagleEye), arXiv:2007.02491, section 3.3 ("adaptive batch normalization").

Where we differ and why:
1. Statistics are the mean over all batches (momentum None), not an exponential average: all batches have equal weight, and
   the dense network's statistics have no effect.
2. In a search, the forward passes use the number format of the evaluations, with channels last. Sums, means and variances are
   always float32. The difference between two number formats is smaller than between two batch sizes: CIFAR ResNet-56 at half
   the multiply-accumulates, 512 images, bfloat16 instead of float32 changes means by at most 0.007 standard deviations and
   variances by 1.4 % (batches of 64 instead of 256: 0.008 and 3.5 %).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.cost_models.core import Range, check_fields
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.inputs import call_model, map_inputs
from secateur.envs.number_format import convert_network, prepare_images
from secateur.envs.pruning.slicing import share_tensors


@dataclass(frozen=True)
class BatchNormConfig:
    """Batches for the statistics.

    Attributes:
        batch_size: images per batch; the variance is taken within batches, so small batches underestimate it.
        max_images: largest number of calibration images.
    """

    batch_size: Annotated[int, Range(least=2)] = 128
    max_images: Annotated[int, Range(least=2)] = 1024

    def __post_init__(self) -> None:
        check_fields(self, "the recovery `batch_norm`")


@dataclass(frozen=True)
class BatchNorm:
    """Estimates mean and variance of every batch norm again; a network without batch norms is not changed."""

    config: BatchNormConfig = BatchNormConfig()
    after_quantization: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True

    def apply(self, candidate: CandidateNetwork) -> None:
        """See `Recovery.apply`."""
        names = [name for name, module in candidate.layers.items() if _is_estimated(module)]
        if not names:
            return
        found = self._statistics(candidate, names)
        for name in names:
            norm = candidate.layers[name]
            norm.running_mean, norm.running_var, norm.num_batches_tracked = found[name]

    def _statistics(self, candidate: CandidateNetwork, names: list[str]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return the new buffers of the batch norms, from forward passes of a copy of the network."""
        network = share_tensors(candidate.network)
        norms: dict[str, Any] = {name: network.get_submodule(name) for name in names}
        convert_network(network, candidate.dtype, keep=tuple(norms.values()))
        for norm in norms.values():
            # New tensors, because the old ones are shared with the candidate and possibly with the dense model.
            norm.running_mean = torch.zeros_like(norm.running_mean)
            norm.running_var = torch.ones_like(norm.running_var)
            norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)
            norm.train()
            norm.momentum = None
        images = candidate.given_images()[: self.config.max_images]
        # Batches of equal size, because all batches have equal weight in the mean.
        parts = np.array_split(np.arange(len(images)), -(-len(images) // max(self.config.batch_size // candidate.parts, 2)))
        with torch.inference_mode():
            for part in parts:
                batch = map_inputs(lambda x: prepare_images(x, candidate.dtype), images[part[0] : part[-1] + 1])
                call_model(network, batch)
        return {name: (norm.running_mean, norm.running_var, norm.num_batches_tracked) for name, norm in norms.items()}


def _is_estimated(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats
