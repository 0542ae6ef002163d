"""From a policy to a network: slice, recover, quantize. The original model is never touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import nn

from secateur.cost_models.core import FLOAT_BITS
from secateur.envs.calibration.core import Calibration
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.core import CompressionPolicy
from secateur.envs.model_graph.plan import ModelGraph
from secateur.envs.piece_cache import PieceCache
from secateur.envs.pruning.slicing import Slicer
from secateur.envs.quantization.quantizers.core import Quantizer
from secateur.envs.recovery.core import Recovery


@dataclass(frozen=True)
class Assembler:
    """Everything that is computed once per search and needed for each candidate. Picklable, shared with the workers.

    Attributes:
        model: the dense network, eval mode.
        graph: its plan.
        scores: importance of every unit, one array (units,) per group; the largest are kept.
        quantizer: plug-in of envs/quantization/quantizers.
        recoveries: plug-ins of envs/recovery, applied in this order.
        calibration: statistics of every layer's input; None if nothing needs images.
        images: normalised calibration images, (N, C, H, W) float32; None likewise.
        cache: pieces that candidates have in common; every process fills its own.
        dtype: number format in which recoveries may run images; see `CandidateNetwork`.
    """

    model: nn.Module
    graph: ModelGraph
    scores: tuple[np.ndarray, ...]
    quantizer: Quantizer
    recoveries: Sequence[Recovery]
    calibration: Calibration | None = None
    images: torch.Tensor | None = None
    cache: PieceCache = field(default_factory=PieceCache)
    dtype: torch.dtype = torch.float32

    @cached_property
    def _slicer(self) -> Slicer:
        return Slicer(self.model, self.graph)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_slicer"}

    def kept(self, policy: CompressionPolicy) -> list[np.ndarray]:
        """Return the kept unit indices of every group, sorted; ties go to the lower index."""
        return [
            np.sort(np.argsort(-scores, kind="stable")[:width]) for scores, width in zip(self.scores, policy.widths, strict=True)
        ]

    def layer_bits(self, policy: CompressionPolicy) -> dict[str, tuple[int, int]]:
        """Return {layer: (weight_bits, activation_bits)} of the layers that are quantized at all."""
        layers = zip(self.graph.geometry.layers, policy.weight_bits, policy.activation_bits, strict=True)
        return {layer.name: (weight, act) for layer, weight, act in layers if min(weight, act) < FLOAT_BITS}

    def candidate(self, policy: CompressionPolicy) -> CandidateNetwork:
        """Return the policy's sliced network, nothing quantized or repaired."""
        kept = self.kept(policy)
        network, positions = self._slicer.slice(kept)
        return CandidateNetwork(
            network,
            self.model,
            self.graph,
            kept,
            self.layer_bits(policy),
            self.quantizer,
            self.calibration,
            self.images,
            self.cache,
            positions,
            self.dtype,
        )

    def assemble(self, policy: CompressionPolicy) -> nn.Module:
        """Return the compressed network, float32, eval mode, batch norms in place, quantization simulated.

        Order: slice; inputs on their grids; recoveries that rewrite weights; weights on their grids; the other recoveries.
        So nothing that a recovery writes leaves the grid, and the last ones see the whole error.
        """
        candidate = self.candidate(policy)
        for _, step in self.steps():
            step(candidate)
        return candidate.network.eval()

    def steps(self) -> list[tuple[str, Callable[[CandidateNetwork], None]]]:
        """Return what happens to a sliced candidate, by name and in order."""
        before, after = (
            [(type(recovery).__name__, recovery.apply) for recovery in self.recoveries if recovery.after_quantization is late]
            for late in (False, True)
        )
        inputs, weights = (
            ("quantized inputs", CandidateNetwork.quantize_inputs),
            ("quantized weights", CandidateNetwork.quantize_weights),
        )
        return [inputs, *before, weights, *after]
