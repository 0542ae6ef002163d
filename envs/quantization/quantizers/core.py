"""What a quantizer is: it puts weights and activations on grids that integers can stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from secateur.envs.calibration.core import LayerStatistics

MIN_BITS, MAX_BITS = 2, 8
"""Bit-widths that can be simulated; 32 everywhere else means "untouched"."""


@dataclass(frozen=True)
class ActivationGrid:
    """2^bits evenly spaced values, one of them exactly zero: (code - zero_point) * scale, code in 0 .. 2^bits - 1."""

    scale: float
    zero_point: int
    bits: int

    @property
    def max_code(self) -> int:
        """The largest code; the smallest is 0."""
        return 2**self.bits - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers; `dequantize` gives the parameter that the network computes with, bit for bit.

    Attributes:
        codes: shape of the weight, int8, in -2^(bits - 1) .. 2^(bits - 1) - 1.
        scale: (output channels,) float32.
        bits: how many bits a code takes.
        levels: (2^bits,) float32, the value of each code from the lowest on, in units of the scale; None: the code itself.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    levels: Tensor | None = None

    def dequantize(self) -> Tensor:
        """Return level * scale of each output channel (axis 0), float32; the same bits on every call."""
        if self.levels is None:
            values = self.codes.float()
        else:
            values = self.levels[self.codes.to(torch.int64) + 2 ** (self.bits - 1)]
        return values * self.scale.view(-1, *[1] * (self.codes.dim() - 1))


class Quantizer(Protocol):
    """Chooses grids. Instances are made from their frozen config alone and pickle."""

    needs_images: ClassVar[bool]
    """Whether `quantize_weight` needs the statistics."""

    def quantize_weight(self, weight: Tensor, bits: int, statistics: LayerStatistics | None = None) -> QuantizedWeight:
        """Return the weight on its grid.

        Args:
            weight: (outputs, inputs per conv group, ...) float32.
            bits: 2..8.
            statistics: of the layer's input, of the weight's own size; None or of any kind, if less is known.
        """
        ...

    def activation_grid(self, statistics: LayerStatistics, bits: int) -> ActivationGrid:
        """Return the grid for activations from what calibration saw (`low`, `high`, `samples`)."""
        ...


def check_bits(bits: int) -> None:
    """Raise ValueError unless `bits` can be simulated."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"Bit-widths must be in {MIN_BITS}..{MAX_BITS} (or 32, for untouched), but got {bits}.")
