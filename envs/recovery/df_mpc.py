"""Mixed-precision compensation without data: layers that read a low-precision layer scale its channels.

If a reader has more bits than the layer whose channels it reads, its weight for input channel j is multiplied by c_j >= 0 of
envs/recovery/common/channel_scales.py, eq. (1), before the reader is rounded. c_j follows from the layer's filters and offsets
before and after its quantization.

Source: Chen et al. 2023 (DF-MPC), arXiv:2307.00498, eq. (27).

Where we differ and why:
1. The bits of the layers determine which layers have low and high precision; in the paper they alternate.
2. The quantizer plug-in chooses the low-precision grid. At 2 bits, `uniform` has -s, 0, s for each output channel: the paper's
   ternary weights, but s has the least squared error and the threshold is s / 2, not 0.7 E|W|.
3. The paper does not describe how the mean and variance after a low-precision layer are estimated again. Here they are
   computed by envs/recovery/common/moments.py, for all bits: on CIFAR ResNet-56 (dense 93.5 % of 8,000 test images), with
   the first layer of every block at 2 bits and the others at 6, 80.9 %; with unchanged batch norms 52.3 %, and without any
   compensation 46.7 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np

from secateur.cost_models.core import FLOAT_BITS, NonNegative, Range, check_fields
from secateur.envs.calibration.patches import is_plain
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.model_graph.plan import ChannelGroup, TensorSlice
from secateur.envs.recovery.common.channel_scales import ScaleEstimator, filters, reading_places, scale_inputs
from secateur.envs.recovery.common.moments import cached_moments, current_state, quantize_in_place, restate_statistics


@dataclass(frozen=True)
class DFMPCConfig:
    """Configuration of the compensation.

    Attributes:
        statistics: how the statistics of the batch norm after a quantized layer are estimated again. "moments": by
            envs/recovery/common/moments.py; "norms": the variance follows the squared norms of the filters, the mean is kept;
            "kept": mean and variance are kept.
        lambda1: weight of the offsets.
        lambda2: damping of the scales.
        spatial_correlation: correlation of neighboring pixels, in [0, 1).
    """

    statistics: Literal["moments", "norms", "kept"] = "moments"
    lambda1: NonNegative = 0.5
    lambda2: NonNegative = 0.0
    spatial_correlation: Annotated[float, Range(least=0, below=1)] = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "the recovery `df_mpc`")


@dataclass(frozen=True)
class DFMPC:
    """Scales the inputs of convolutions and linear layers that read layers with fewer bits, and quantizes all layers."""

    config: DFMPCConfig = DFMPCConfig()
    after_quantization: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    makes_statistics: ClassVar[bool] = True  # for a quantizer that needs statistics, if there are no images

    def apply(self, candidate: CandidateNetwork) -> None:
        """See `Recovery.apply`."""
        estimator = ScaleEstimator(self.config.lambda1, self.config.lambda2)
        moments = cached_moments(candidate, self.config.spatial_correlation) if self.config.statistics == "moments" else {}
        readings: dict[str, list[tuple[ChannelGroup, np.ndarray, TensorSlice]]] = {}
        for group, kept in zip(candidate.graph.groups, candidate.kept, strict=True):
            for name, place in reading_places(candidate, group):
                readings.setdefault(name, []).append((group, kept, place))
        for name in (layer.name for layer in candidate.graph.geometry.layers if layer.name in candidate.layers):
            before = current_state(candidate, name, moments.get(name))
            for group, kept, place in readings.get(name, ()):
                if producers := low_producers(candidate, group, name):
                    scale_inputs(candidate, name, place, kept, estimator.scales(candidate, group, kept, producers))
            layer, norm = candidate.layers[name], candidate.norm(name)
            rounded_from = filters(layer, norm) if norm is not None and is_plain(layer) else None
            quantize_in_place(candidate, name, moments.get(name), self.config.spatial_correlation)
            if rounded_from is not None and name in candidate.float_weights:
                if self.config.statistics != "kept":
                    restate_statistics(candidate, name, before, moments.get(name), self.config.spatial_correlation)
                estimator.before[name], estimator.after[name] = rounded_from, filters(layer, norm)


def low_producers(candidate: CandidateNetwork, group: ChannelGroup, reader: str) -> list[str]:
    """Return the quantized producers with a batch norm if all of them have fewer bits than the reader, otherwise []."""
    done = [name for name in group.producers if name in candidate.float_weights and candidate.norm(name) is not None]
    bits = candidate.layer_bits.get(reader, (FLOAT_BITS, FLOAT_BITS))[0]
    return done if all(candidate.layer_bits[name][0] < bits for name in done) else []
