"""The result of a calibration pass: for each layer, second moments and a sample of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, TypeVar

import numpy as np

from secateur.cost_models.core import Count, Range, check_fields

FULL, CHANNEL, DIAGONAL, NONE = "full", "channel", "diagonal", "none"
"""Kinds of statistics; see `LayerStatistics.kind`."""


T = TypeVar("T")


def required(value: T | None, what: str) -> T:
    """Return calibration data that a plug-in needs.

    Args:
        value: statistics, images or labels; None if there are no calibration images.
        what: name of the data for the message.
    Raises:
        ValueError: if there are no data.
    """
    if value is None:
        raise ValueError(f"A plug-in needs {what}, but there are no calibration images.")
    return value


@dataclass(frozen=True)
class CalibrationConfig:
    """How the statistics are collected.

    Attributes:
        max_images: largest number of calibration images.
        positions: number of output positions (for linear layers: tokens) that are sampled per image and layer.
        max_matrix_bytes: memory limit for the moments of a layer. If the full moments need more, the moments of the channels
            are computed; if these need more too, the mean and the mean square.
        samples: number of input values that are kept per layer, for the clipping points of activations.
        batch_size: images per forward pass.
        seed: random seed for sampling positions and values.
    """

    max_images: Count = 1024
    positions: Annotated[int, Range(least=1, most=100_000)] = 32
    max_matrix_bytes: Count = 32_000_000
    samples: Annotated[int, Range(least=1, most=1_000_000)] = 4096
    batch_size: Annotated[int, Range(least=1, most=100_000)] = 64
    seed: Annotated[int, Range(least=0)] = 0

    def __post_init__(self) -> None:
        check_fields(self, "the calibration")


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the input of a convolution or linear layer. The arrays are read-only: torch needs a copy (`torch.tensor`).

    u denotes the inputs of one output of one conv group at one position, in the order of `outputs_first(layer)[0].flatten()`. It
    has n = input channels per conv group x kernel area entries; `channels` = n / kernel area is the weight's number of inputs.

    Attributes:
        kind: contents of `moments`; all are means over images and sampled positions, float32:
            "full": (conv_groups, n + 1, n + 1), mean of [u, 1] [u, 1]^T;
            "channel": (conv_groups, channels + 1, channels + 1), mean of [x, 1] [x, 1]^T, with the channels x at one pixel;
            "diagonal": (conv_groups, 2, channels), means of x and of x^2;
            "none": (0,), for layers with a forward pass of their own and for weights that are used outside of their module.
        moments: see `kind`.
        low, high: smallest and largest value of the whole input.
        samples: (up to CalibrationConfig.samples,) float32, sorted: random values of the input.
        area: kernel area; 1 for linear layers.
        count: number of rows in the means.
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
            array.flags.writeable = False  # Ray's workers share the arrays and cannot write to them

    @property
    def channels(self) -> int:
        """Positions on the weight's input axis; 0 if `kind` is "none"."""
        if self.kind in (DIAGONAL, NONE):
            return self.moments.shape[-1]
        return (self.moments.shape[-1] - 1) // (self.area if self.kind == FULL else 1)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays in bytes."""
        return self.moments.nbytes + self.samples.nbytes

    def mean(self) -> np.ndarray:
        """Return the mean input, (conv_groups, n) float32; unless `kind` is "full", it is equal at all positions of a kernel.

        Raises:
            ValueError: if `kind` is "none".
        """
        if self.kind == NONE:
            raise ValueError("This layer has no moments.")
        if self.kind == FULL:
            return self.moments[:, -1, :-1]
        means = self.moments[:, 0] if self.kind == DIAGONAL else self.moments[:, -1, :-1]
        return np.repeat(means, self.area, axis=1)

    def entries(self, kept_in: np.ndarray) -> np.ndarray:
        """Return the rows of a "full" or "channel" matrix for these positions of the input axis, without the constant."""
        if self.kind == CHANNEL:
            return np.asarray(kept_in)
        return (np.asarray(kept_in)[:, None] * self.area + np.arange(self.area)).ravel()

    def restricted(self, kept_in: np.ndarray, kept_conv_groups: np.ndarray | None = None) -> LayerStatistics:
        """Return the statistics of the layer after slicing: the kept rows and columns.

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
    """The statistics of all layers from the calibration images; immutable, shared by all candidates and workers.

    Attributes:
        layers: statistics by layer name, of every convolution and linear layer that was executed.
        images: number of images.
        config: configuration of the pass.
    """

    layers: Mapping[str, LayerStatistics]
    images: int
    config: CalibrationConfig

    @property
    def nbytes(self) -> int:
        """Memory of all arrays in bytes."""
        return sum(layer.nbytes for layer in self.layers.values())
