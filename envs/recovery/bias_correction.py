"""Bias correction: the layer's bias compensates the shift of the mean output that rounding the weight causes.

    shift = E[(W - Q(W)) u] = (W - Q(W)) E[u]                                                                         (1)

is added to the layer's bias, or subtracted from the running mean of the batch norm after it.

Source: Nagel et al. 2019 (data-free quantization), arXiv:1906.04721, section 4.2, with measured means.

Where we differ and why:
1. E[u] is the dense network's mean on the calibration images: the correction is one product per layer, without a forward
   pass.
2. If a layer has only statistics of its channels, the correction is exact only away from the borders (see
   `LayerStatistics.mean`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.envs.calibration.core import NONE
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.weight_layout import outputs_first


@dataclass(frozen=True)
class BiasCorrectionConfig:
    """No options."""


@dataclass(frozen=True)
class BiasCorrection:
    """Corrects every quantized layer that has an intercept and statistics of its inputs."""

    config: BiasCorrectionConfig = BiasCorrectionConfig()
    after_quantization: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True

    def apply(self, candidate: CandidateNetwork) -> None:
        """See `Recovery.apply`."""
        for name, weight in candidate.float_weights.items():
            statistics = candidate.statistics(name)
            if statistics is None or statistics.kind == NONE or not candidate.has_intercept(name):
                continue
            layer = candidate.layers[name]
            mean = torch.tensor(statistics.mean(), device=layer.weight.device)  # (conv groups, n)
            error = (outputs_first(layer, weight) - outputs_first(layer)).view(len(mean), -1, mean.shape[1])
            candidate.shift(name, (error @ mean[:, :, None]).flatten())
