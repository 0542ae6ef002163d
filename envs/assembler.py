"""From a policy to a network: slice, recover, quantize. The original model is never touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from cost_models.core import FLOAT_BITS
from envs.core import CompressionPolicy
from envs.model_graph.plan import ModelGraph
from envs.pruning.slicing import slice_model
from envs.quantization.fake_quantize import quantize_model


@dataclass(frozen=True)
class Assembler:
    """Everything that is computed once per search and needed for each candidate. Picklable, shared with the workers.

    Attributes:
        model: the dense network, eval mode.
        graph: its plan.
        scores: importance of every unit, one array (units,) per group; the largest are kept.
        ranges: calibrated (low, high) of each quantizable layer's input.
        quantizer: plug-in of envs/quantization/quantizers.
        recoveries: (plug-in of envs/recovery, what its `prepare` returned) pairs, applied in this order.
        images: normalised calibration images, (N, C, H, W) float32.
    """

    model: nn.Module
    graph: ModelGraph
    scores: tuple[np.ndarray, ...]
    ranges: Mapping[str, tuple[float, float]]
    quantizer: Any
    recoveries: Sequence[tuple[Any, Any]]
    images: torch.Tensor

    def kept(self, policy: CompressionPolicy) -> list[np.ndarray]:
        """Return the kept unit indices of every group, sorted; ties go to the lower index."""
        return [
            np.sort(np.argsort(-scores, kind="stable")[:width])
            for scores, width in zip(self.scores, policy.widths, strict=True)
        ]

    def layer_bits(self, policy: CompressionPolicy) -> dict[str, tuple[int, int]]:
        """Return {layer: (weight_bits, activation_bits)} of the layers that are quantized at all."""
        layers = zip(self.graph.geometry.layers, policy.weight_bits, policy.activation_bits, strict=True)
        return {layer.name: (weight, act) for layer, weight, act in layers if min(weight, act) < FLOAT_BITS}

    def assemble(self, policy: CompressionPolicy) -> nn.Module:
        """Return the compressed network, float32, eval mode, batch norms in place, quantization simulated.

        Order: slice; quantize weights and activations; recover in the configured order. A recovery that rewrites weights is
        marked `before_quantization` and runs between the two, so that nothing it writes leaves the grid.
        """
        kept = self.kept(policy)
        network = slice_model(self.model, self.graph, kept)
        before = [pair for pair in self.recoveries if pair[0].before_quantization]
        after = [pair for pair in self.recoveries if not pair[0].before_quantization]
        for recovery, prepared in before:
            recovery.apply(network, self.model, self.graph, kept, prepared, self.images)
        quantize_model(network, self.layer_bits(policy), self.ranges, self.quantizer)
        for recovery, prepared in after:
            recovery.apply(network, self.model, self.graph, kept, prepared, self.images)
        return network.eval()
