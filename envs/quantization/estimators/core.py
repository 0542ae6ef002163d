"""What all estimators share: a float weight is rounded to a grid in the forward pass, and has a gradient all the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.envs.quantization.quantizers.core import QuantizedWeight


class WeightEstimator(nn.Module, ABC):
    """Turns a float *master weight* into the weight that a layer computes with; a parametrization of the layer's weight.

    In eval mode it is exactly the quantized weight. In training mode an estimator may use something softer.

    Args:
        quantized: has the bits, scales and levels of the grid.
    """

    learns_inputs: ClassVar[bool] = False
    """Whether the steps of quantized inputs are learned too."""

    scale: Tensor
    levels: Tensor | None

    def __init__(self, quantized: QuantizedWeight):
        super().__init__()
        self.bits = quantized.bits
        self.register_buffer("scale", quantized.scale.clone(), persistent=False)
        self.register_buffer("levels", None if quantized.levels is None else quantized.levels.clone(), persistent=False)

    def progress(self, share: float) -> None:
        """Take notice of the share of the training that is done, in [0, 1]; most estimators need not know."""

    @abstractmethod
    def forward(self, master: Tensor) -> Tensor:
        """Return the weight to compute with, same shape."""

    def quantize(self, master: Tensor) -> QuantizedWeight:
        """Return the nearest quantized weight."""
        scale = self.scale.detach()
        relative = master.detach().float() / self._column(_nonzero(scale), master)
        if self.levels is None:
            codes = relative.round_().clamp_(-self.largest, self.largest)
        else:
            values, order = self.levels.sort()  # unused codes have the level 0, which is as good as the code of zero
            nearest = torch.bucketize(relative.contiguous(), (values[1:] + values[:-1]) / 2)
            codes = order[nearest] - 2 ** (self.bits - 1)
        return QuantizedWeight(codes.to(torch.int8), scale.clone(), self.bits, self.levels)

    @property
    def largest(self) -> int:
        """The largest code of a grid without levels; the smallest is its negative."""
        return 2 ** (self.bits - 1) - 1

    def rounded(self, master: Tensor) -> Tensor:
        """Return the quantized weight; its gradient is that of the master weight."""
        # Exactly the quantized weight, because the bracket is zero.
        return self.quantize(master).dequantize() + (master - master.detach())

    def relative(self, master: Tensor) -> Tensor:
        """Return the master weight in units of the scale; a channel of zeros has the scale 0 and stays zero."""
        return master / self._column(_nonzero(self.scale), master)

    @staticmethod
    def _column(scale: Tensor, weight: Tensor) -> Tensor:
        """Return one number per output channel in the shape that multiplies a weight."""
        return scale.view(-1, *[1] * (weight.dim() - 1))


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
