"""The interface of quantizers: they round weights and activations to values that integers represent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from secateur.envs.calibration.core import LayerStatistics

MIN_BITS, MAX_BITS = 2, 8
"""Range of the bit-widths that can be simulated; elsewhere, 32 means "not quantized"."""


@dataclass(frozen=True)
class ActivationGrid:
    """2^bits evenly spaced values: (code - zero_point) * scale, code in 0 .. 2^bits - 1; one of them is exactly zero.

    Attributes:
        scale: distance between two values.
        zero_point: code of the value zero.
        bits: bits of a code.
    """

    scale: float
    zero_point: int
    bits: int

    @property
    def max_code(self) -> int:
        """The largest code; the smallest is 0."""
        return 2**self.bits - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers; `dequantize` returns exactly the parameter that the network computes with.

    Attributes:
        codes: shape of the weight, int8, in -2^(bits - 1) .. 2^(bits - 1) - 1.
        scale: (output channels,) float32.
        bits: bits of a code.
        levels: (2^bits,) float32, values of all codes in ascending order, in units of the scale; None: the codes themselves.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    levels: Tensor | None = None

    def on(self, device: torch.device) -> QuantizedWeight:
        """Return the quantized weight with its tensors on a device."""
        levels = None if self.levels is None else self.levels.to(device)
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), levels=levels)

    def dequantize(self) -> Tensor:
        """Return level * scale for each output channel (axis 0), float32; every call returns identical bits."""
        if self.levels is None:
            values = self.codes.float()
        else:
            values = self.levels[self.codes.to(torch.int64) + 2 ** (self.bits - 1)]
        return values * self.scale.view(-1, *[1] * (self.codes.dim() - 1))


class Quantizer(Protocol):
    """Chooses grids. Instances are made from a frozen config only, and can be pickled."""

    needs_images: ClassVar[bool]
    """Whether `quantize_weight` needs statistics."""

    def quantize_weight(self, weight: Tensor, bits: int, statistics: LayerStatistics | None = None) -> QuantizedWeight:
        """Return the quantized weight.

        Args:
            weight: (outputs, inputs per conv group, ...) float32.
            bits: 2..8.
            statistics: statistics of the layer's input, for the size of the weight; None if there are no statistics.
        """
        ...

    def activation_grid(self, statistics: LayerStatistics, bits: int) -> ActivationGrid:
        """Return the grid for a layer's input, from the calibration's `low`, `high` and `samples`."""
        ...


def check_bits(bits: int) -> None:
    """Check a bit-width.

    Raises:
        ValueError: if it cannot be simulated.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"Bit-widths must be in {MIN_BITS}..{MAX_BITS}, or 32 for no quantization, but got {bits}.")
