"""Assembly of a policy's network: slice, recover, quantize. The dense model is never changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.cost_models.core import FLOAT_BITS
from secateur.envs.calibration.core import Calibration
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.core import CompressionPolicy
from secateur.envs.devices import move, move_network
from secateur.envs.inputs import Inputs, map_inputs
from secateur.envs.memory import REPAIR, halving
from secateur.envs.model_graph.plan import ModelGraph
from secateur.envs.piece_cache import PieceCache
from secateur.envs.pruning.slicing import Slicer
from secateur.envs.quantization.quantizers.core import Quantizer
from secateur.envs.recovery.core import Recovery


@dataclass(frozen=True)
class Assembler:
    """Assembles the networks of policies. It holds everything that is computed once per search, and can be pickled.

    Attributes:
        model: the dense network, in eval mode.
        graph: structure of the dense network.
        scores: importance of every unit, one array (units,) per group; units with the largest scores are kept.
        quantizer: plug-in of envs/quantization/quantizers.
        recoveries: plug-ins of envs/recovery, applied in this order.
        calibration: statistics of every layer's input; None if no plug-in needs images.
        images: calibration inputs, usually (N, C, H, W) float32 normalized; None if no plug-in needs images.
        cache: cache of pieces that several candidates need; every process fills its own cache.
        dtype: number format of the recoveries' forward passes; see `CandidateNetwork`.
    """

    model: nn.Module
    graph: ModelGraph
    scores: tuple[np.ndarray, ...]
    quantizer: Quantizer
    recoveries: Sequence[Recovery]
    calibration: Calibration | None = None
    images: Inputs | None = None
    cache: PieceCache = field(default_factory=PieceCache)
    dtype: torch.dtype = torch.float32

    @cached_property
    def _slicer(self) -> Slicer:
        return Slicer(self.model, self.graph)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_slicer"}

    def on(self, device: torch.device) -> Assembler:
        """Return an assembler whose networks are on a device; its cache is its own."""
        images = None if self.images is None else map_inputs(lambda x: move(x, device), self.images)
        return replace(self, model=move_network(self.model, device), images=images, cache=PieceCache(self.cache.max_bytes))

    def kept(self, policy: CompressionPolicy) -> list[np.ndarray]:
        """Return the kept unit indices of every group, sorted; of units with equal scores, those with lower indices are kept."""
        return [
            np.sort(np.argsort(-scores, kind="stable")[:width]) for scores, width in zip(self.scores, policy.widths, strict=True)
        ]

    def layer_bits(self, policy: CompressionPolicy) -> dict[str, tuple[int, int]]:
        """Return {layer: (weight_bits, activation_bits)} of the quantized layers."""
        layers = zip(self.graph.geometry.layers, policy.weight_bits, policy.activation_bits, strict=True)
        return {layer.name: (weight, act) for layer, weight, act in layers if min(weight, act) < FLOAT_BITS}

    def candidate(self, policy: CompressionPolicy) -> CandidateNetwork:
        """Return the policy's sliced network before quantization and recovery."""
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
        """Return the compressed network: float32, eval mode, batch norms not folded, quantization simulated.

        Order: slicing; quantization of inputs; recoveries that change weights; quantization of weights; the other recoveries.
        No recovery changes a quantized weight, and the recoveries at the end can correct the whole error.
        """

        def run(parts: int) -> nn.Module:
            candidate = self.candidate(policy)
            candidate.parts = parts
            for _, step in self.steps():
                step(candidate)
            return candidate.network.eval()

        return halving(REPAIR, run)

    def steps(self) -> list[tuple[str, Callable[[CandidateNetwork], None]]]:
        """Return the steps after slicing, with their names and in order."""
        before, after = (
            [(type(recovery).__name__, recovery.apply) for recovery in self.recoveries if recovery.after_quantization is late]
            for late in (False, True)
        )
        inputs, weights = (
            ("quantized inputs", CandidateNetwork.quantize_inputs),
            ("quantized weights", CandidateNetwork.quantize_weights),
        )
        return [inputs, *before, weights, *after]
