"""What a quantizer is: it puts weights and activations on grids that integers can stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

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


class Quantizer(Protocol):
    """Chooses grids. Instances are made from their frozen config alone and pickle."""

    def quantize_weight(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Return codes (shape of `weight`) int8 and one scale per output channel (axis 0) float32.

        `dequantize(codes, scale)` is the weight that the network computes with.
        """
        ...

    def activation_grid(self, low: float, high: float, bits: int) -> ActivationGrid:
        """Return the grid for activations that calibration found in [low, high]."""
        ...


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Return codes * scale of each output channel, float32; the same bits on every call."""
    return codes.float() * scale.view(-1, *[1] * (codes.dim() - 1))


def check_bits(bits: int) -> None:
    """Raise ValueError unless `bits` can be simulated."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"Bit-widths must be in {MIN_BITS}..{MAX_BITS} (or 32, for untouched), but got {bits}.")
