"""Mixed-precision compensation without data: the reader of a low-precision layer scales its channels before it is rounded.

A reader of more bits than the layer whose channels it reads scales input channel j by c_j >= 0 of
envs/recovery/common/channel_scales.py, eq. (1), from the layer's filters and offsets before and after its quantization.

Source: Chen et al. 2023 (DF-MPC), arXiv:2307.00498, eq. (27).

Where we differ and why:
1. Which layers are low and which high follows from their bits; the paper alternates.
2. The low-precision grid is the quantizer plug-in's. At 2 bits `uniform` gives -s, 0, s per output channel: the paper's ternary
   weights, but s has the least squared error and threshold s / 2, instead of 0.7 E|W|.
3. The paper does not say how it estimates the mean and variance behind a low-precision layer again. Ours follow from
   envs/recovery/common/moments.py, whatever the bits: on CIFAR ResNet-56 (dense 93.5 % of 8,000 test images), with the first
   layer of every block at 2 bits and the others at 6, 80.9 %; with the batch norms left as they are 52.3 %, and without
   any compensation 46.7 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from secateur.cost_models.core import FLOAT_BITS, NonNegative, Range, check_fields
from secateur.envs.calibration.patches import is_plain
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.model_graph.plan import ChannelGroup
from secateur.envs.recovery.common.channel_scales import ScaleBook, filters, reading_places, scale_inputs
from secateur.envs.recovery.common.moments import cached_moments, current_state, quantize_in_place, restate_statistics


@dataclass(frozen=True)
class DFMPCConfig:
    """How readers are compensated.

    Attributes:
        statistics: how the statistics of the batch norm behind a quantized layer are estimated again. "moments": by
            envs/recovery/common/moments.py; "norms": the variance follows the squared norms of the filters, the mean is kept;
            "kept": mean and variance are kept.
        lambda1: weight of the offsets.
        lambda2: damping of the scales.
        spatial_correlation: of neighbouring pixels, in [0, 1).
    """

    statistics: Literal["moments", "norms", "kept"] = "moments"
    lambda1: NonNegative = 0.5
    lambda2: NonNegative = 0.0
    spatial_correlation: Annotated[float, Range(least=0, below=1)] = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "the recovery `df_mpc`")


@dataclass(frozen=True)
class DFMPC:
    """Scales the inputs of ordinary convolutions and linear layers behind layers of fewer bits, and quantizes all layers."""

    config: DFMPCConfig = DFMPCConfig()
    after_quantization: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    makes_statistics: ClassVar[bool] = True  # for a quantizer that needs some, where there are no images

    def apply(self, candidate: CandidateNetwork) -> None:
        """See `Recovery.apply`."""
        book = ScaleBook(self.config.lambda1, self.config.lambda2)
        known = cached_moments(candidate, self.config.spatial_correlation) if self.config.statistics == "moments" else {}
        readings: dict[str, list] = {}
        for group, kept in zip(candidate.graph.groups, candidate.kept, strict=True):
            for name, place in reading_places(candidate, group):
                readings.setdefault(name, []).append((group, kept, place))
        for name in (layer.name for layer in candidate.graph.geometry.layers if layer.name in candidate.layers):
            before = current_state(candidate, name, known.get(name))
            for group, kept, place in readings.get(name, ()):
                if producers := low_producers(candidate, group, name):
                    scale_inputs(candidate, name, place, kept, book.scales(candidate, group, kept, producers))
            layer, norm = candidate.layers[name], candidate.norm(name)
            rounded_from = filters(layer, norm) if norm is not None and is_plain(layer) else None
            quantize_in_place(candidate, name, known.get(name), self.config.spatial_correlation)
            if rounded_from is not None and name in candidate.float_weights:
                if self.config.statistics != "kept":
                    restate_statistics(candidate, name, before, known.get(name), self.config.spatial_correlation)
                book.before[name], book.after[name] = rounded_from, filters(layer, norm)


def low_producers(candidate: CandidateNetwork, group: ChannelGroup, reader: str) -> list[str]:
    """Return the producers with a batch norm that have been quantized, if all of them have fewer bits than the reader."""
    done = [name for name in group.producers if name in candidate.float_weights and candidate.norm(name) is not None]
    bits = candidate.layer_bits.get(reader, (FLOAT_BITS, FLOAT_BITS))[0]
    return done if all(candidate.layer_bits[name][0] < bits for name in done) else []
