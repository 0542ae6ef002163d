"""Training of quantized weights: rounding in the forward pass, straight through in the backward pass.

The trainable form keeps a float weight, the *master weight*, beside each quantized one. The forward pass computes with the master
weight rounded to the grid of the quantized weight: same bits, same scales. The gradient passes the rounding unchanged (Bengio et
al. 2013, arXiv:1308.3432), also outside the range of the grid, so that a clipped weight can come back. The master weights start
at the quantized values, so the trainable form first computes exactly what the quantized network does. Inputs with bits are
rounded by their forward pre-hooks, which pass gradients already (envs/quantization/fake_quantize.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.envs.quantization.fake_quantize import quantized_weight, set_quantized_weight
from secateur.envs.quantization.quantizers.core import QuantizedWeight


class StraightThrough(nn.Module):
    """Rounds a master weight to a grid; a parametrization of a layer's weight.

    Args:
        quantized: has the bits, scales and levels of the grid.
    """

    scale: Tensor
    levels: Tensor | None

    def __init__(self, quantized: QuantizedWeight):
        super().__init__()
        self.bits = quantized.bits
        self.register_buffer("scale", quantized.scale.clone(), persistent=False)
        self.register_buffer("levels", None if quantized.levels is None else quantized.levels.clone(), persistent=False)

    def forward(self, master: Tensor) -> Tensor:
        """Return the rounded weight; its gradient is that of the master weight."""
        rounded = self.quantize(master).dequantize()
        return rounded + (master - master.detach())  # exactly the rounded weight, because the bracket is zero

    def quantize(self, master: Tensor) -> QuantizedWeight:
        """Return the nearest quantized weight with these scales."""
        # A channel of zeros has the scale 0, and stays zero.
        scale = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)
        relative = master.detach().float() / scale.view(-1, *[1] * (master.dim() - 1))
        if self.levels is None:
            largest = 2 ** (self.bits - 1) - 1
            codes = relative.round_().clamp_(-largest, largest)
        else:
            values, order = self.levels.sort()  # unused codes have the level 0, which is as good as the code of zero
            nearest = torch.bucketize(relative.contiguous(), (values[1:] + values[:-1]) / 2)
            codes = order[nearest] - 2 ** (self.bits - 1)
        return QuantizedWeight(codes.to(torch.int8), self.scale, self.bits, self.levels)


def make_trainable(network: nn.Module) -> None:
    """Give every quantized weight a master weight, and let all parameters have gradients, in place.

    The names of quantized weights change until `make_quantized`: `conv.weight` becomes `conv.parametrizations.weight.original`.
    """
    for module in list(network.modules()):
        quantized = quantized_weight(module)
        if quantized is not None:
            layer: Any = module
            del layer.weight_codes
            parametrize.register_parametrization(layer, "weight", StraightThrough(quantized))
    network.requires_grad_(True)


def make_quantized(network: nn.Module) -> None:
    """Round every master weight for good, in place: the network computes the same as before, with its names of before."""
    for module in list(network.modules()):
        rounding = _rounding(module)
        if rounding is not None:
            layer: Any = module
            master = layer.parametrizations.weight.original
            # Not torch's `remove_parametrizations`: it changes the class, which deep copies of the module share.
            layer.__class__ = type(layer).__bases__[0]
            del layer.parametrizations
            others = dict(layer._parameters)
            layer._parameters.clear()
            layer.weight = nn.Parameter(master.detach(), master.requires_grad)  # the weight comes first, as before
            layer._parameters.update(others)
            set_quantized_weight(layer, rounding.quantize(master))


def _rounding(module: nn.Module) -> StraightThrough | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    first: Any = module.parametrizations.weight[0]  # type: ignore[union-attr, index]
    return first if isinstance(first, StraightThrough) else None
