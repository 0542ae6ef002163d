"""What one pass over the calibration images leaves: per layer, second moments and a sample of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from secateur.cost_models.core import Count, Range, check_fields

FULL, CHANNEL, DIAGONAL, NONE = "full", "channel", "diagonal", "none"
"""How much is known about a layer's input; see `LayerStatistics.kind`."""


@dataclass(frozen=True)
class CalibrationConfig:
    """How the statistics are collected.

    Attributes:
        max_images: at most this many of the calibration images are used.
        positions: output positions (of linear layers: tokens) sampled per image and layer.
        max_matrix_bytes: a layer whose moments would take more falls back to those of its channels, and if these take
            more as well, to mean and mean square.
        samples: input values kept per layer, for the clipping points of activations.
        batch_size: images per forward pass.
        seed: of the sampled positions.
    """

    max_images: Count = 1024
    positions: Count = 32
    max_matrix_bytes: Count = 32_000_000
    samples: Count = 4096
    batch_size: Count = 64
    seed: Annotated[int, Range(least=0)] = 0

    def __post_init__(self) -> None:
        check_fields(self, "the calibration")


@dataclass(frozen=True)
class LayerStatistics:
    """What a convolution or linear layer reads. The arrays cannot be written to: torch wants a copy (`torch.tensor`).

    u is what one output of one conv group reads at one position, in the order of `weight[0].flatten()`: n = input channels
    per conv group x kernel area entries. The weight's input axis (axis 1) has `channels` = n / kernel area positions.

    Attributes:
        kind: what `moments` holds, each a mean over images and sampled positions, float32:
            "full": (conv_groups, n + 1, n + 1), of [u, 1] [u, 1]^T;
            "channel": (conv_groups, channels + 1, channels + 1), of [x, 1] [x, 1]^T, x the channels at one pixel;
            "diagonal": (conv_groups, 2, channels), of x and of x^2;
            "none": (0,), for layers of other types (transposed convolutions, padding other than zeros, forward passes of
            their own) and for weights that are used outside of their module.
        moments: see `kind`.
        low, high: smallest and largest value of the whole input.
        samples: (up to CalibrationConfig.samples,) float32, sorted: random values of the input.
        area: kernel area; 1 for linear layers.
        count: rows behind the means.
    """

    kind: str
    moments: np.ndarray
    low: float
    high: float
    samples: np.ndarray
    area: int
    count: int

    def __post_init__(self) -> None:
        for array in (self.moments, self.samples):
            array.flags.writeable = False  # as in Ray's workers, which share them

    @property
    def channels(self) -> int:
        """Positions on the weight's input axis; 0 if `kind` is "none"."""
        if self.kind in (DIAGONAL, NONE):
            return self.moments.shape[-1]
        return (self.moments.shape[-1] - 1) // (self.area if self.kind == FULL else 1)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return self.moments.nbytes + self.samples.nbytes

    def mean(self) -> np.ndarray:
        """Return the mean input, (conv_groups, n) float32; all positions of a kernel alike unless `kind` is "full".

        Raises:
            ValueError: if `kind` is "none".
        """
        if self.kind == NONE:
            raise ValueError("There are no moments of this layer.")
        if self.kind == FULL:
            return self.moments[:, -1, :-1]
        means = self.moments[:, 0] if self.kind == DIAGONAL else self.moments[:, -1, :-1]
        return np.repeat(means, self.area, axis=1)

    def entries(self, kept_in: np.ndarray) -> np.ndarray:
        """Return which rows of a "full" or "channel" matrix belong to positions of the input axis, without the constant."""
        if self.kind == CHANNEL:
            return np.asarray(kept_in)
        return (np.asarray(kept_in)[:, None] * self.area + np.arange(self.area)).ravel()

    def restricted(self, kept_in: np.ndarray, kept_conv_groups: np.ndarray | None = None) -> LayerStatistics:
        """Return the statistics of the layer after slicing: the rows and columns that are left.

        Args:
            kept_in: kept positions on the weight's input axis, sorted.
            kept_conv_groups: kept conv groups; None keeps all.
        """
        moments = self.moments if kept_conv_groups is None else self.moments[kept_conv_groups]
        if self.kind == DIAGONAL:
            moments = moments[:, :, kept_in]
        elif self.kind != NONE and len(kept_in) < self.channels:
            left = np.append(self.entries(kept_in), moments.shape[-1] - 1)
            moments = moments[:, left[:, None], left]
        return LayerStatistics(self.kind, moments, self.low, self.high, self.samples, self.area, self.count)


@dataclass(frozen=True)
class Calibration:
    """Everything that is learned from the calibration images; immutable, shared by all candidates and workers.

    Attributes:
        layers: statistics by layer name, for every convolution and linear layer that ran.
        images: how many images were seen.
        config: how.
    """

    layers: Mapping[str, LayerStatistics]
    images: int
    config: CalibrationConfig

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        return sum(layer.nbytes for layer in self.layers.values())

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """Return the names of the layers whose statistics are of this kind."""
        return tuple(name for name, layer in self.layers.items() if layer.kind == kind)
