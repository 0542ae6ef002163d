"""Bias correction: rounding a weight moves the mean of the layer's outputs, and its bias moves it back.

    shift = E[(W - Q(W)) u] = (W - Q(W)) E[u]                                                                         (1)

goes to the layer's bias, or to the running mean of the batch norm behind it.

Source: Nagel et al. 2019 (data-free quantization), arXiv:1906.04721, section 4.2, with measured means.

Where we differ and why:
1. E[u] is the dense network's, from the calibration images: one product per layer, nothing runs through the network.
2. Away from borders only, where a layer's statistics are those of its channels (see `LayerStatistics.mean`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from secateur.envs.calibration.core import NONE
from secateur.envs.candidate import CandidateNetwork


@dataclass(frozen=True)
class BiasCorrectionConfig:
    """Nothing to set."""


@dataclass(frozen=True)
class BiasCorrection:
    """Corrects every quantized layer that has an intercept and whose inputs are known."""

    config: BiasCorrectionConfig = BiasCorrectionConfig()
    after_quantization: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True

    def apply(self, candidate: CandidateNetwork) -> None:
        """See `Recovery.apply`."""
        for name, weight in candidate.float_weights.items():
            statistics = candidate.statistics(name)
            if statistics is None or statistics.kind == NONE or not candidate.has_intercept(name):
                continue
            mean = torch.tensor(statistics.mean())  # (conv groups, n)
            error = (weight - candidate.layers[name].weight.detach()).view(len(mean), -1, mean.shape[1])
            candidate.shift(name, (error @ mean[:, :, None]).flatten())
