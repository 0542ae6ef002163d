"""Simulated quantization: the float network computes with values that integers represent.

Weights are rounded once, in the parameter. Activations are rounded at the layer's input by a forward pre-hook, so the
architecture and the names of the tensors do not change. Both are preserved by deepcopy and pickle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.envs.quantization.quantizers.core import ActivationGrid, QuantizedWeight, check_bits


@dataclass(frozen=True)
class ActivationQuantizer:
    """A forward pre-hook that quantizes a layer's first input.

    The gradient is passed straight through inside the range and is zero outside (Jacob et al. 2018, arXiv:1712.05877).

    Attributes:
        grid: values of the quantized input.
    """

    grid: ActivationGrid

    def __call__(self, module: nn.Module, inputs: tuple) -> tuple:
        return self.round(inputs[0]), *inputs[1:]

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest values of the grid, same shape, precision and memory format."""
        if torch.is_inference_mode_enabled():
            return self._round_fast(x)
        # In float32, because codes from bfloat16 arithmetic may differ by one.
        rounded = torch.fake_quantize_per_tensor_affine(x.float(), self.grid.scale, self.grid.zero_point, 0, self.grid.max_code)
        return rounded.to(x.dtype)

    def _round_fast(self, x: Tensor) -> Tensor:
        """Return the same values without a gradient, by vectorized operations in place; torch's operator is a scalar loop."""
        return self._codes(x).mul_(self.grid.scale).to(x.dtype)

    def _codes(self, x: Tensor) -> Tensor:
        """Return code - zero point, float32."""
        lowest = -self.grid.zero_point
        codes = x.to(torch.float32, copy=True).mul_(self._inverse_scale).round_()
        return codes.clamp_(lowest, lowest + self.grid.max_code)

    @cached_property
    def _inverse_scale(self) -> float:
        """1 / scale in float32, as in torch's operator."""
        return float(1 / np.float32(self.grid.scale))


class IntegerInput(ActivationQuantizer):
    """A forward pre-hook that passes code - zero point to the layer, whose weight contains the scale. It has no gradient."""

    def round(self, x: Tensor) -> Tensor:
        """Return the integers in the precision of x; bfloat16 represents them exactly, but not all of their multiples."""
        return self._codes(x).to(x.dtype)


def use_integer_inputs(network: nn.Module) -> None:
    """Make quantized layers read integers, which are exact in bfloat16, and multiply their weights by the scale, in place."""
    for module in network.modules():
        for key, hook in module._forward_pre_hooks.items():
            if type(hook) is ActivationQuantizer:
                layer: Any = module
                layer.weight = nn.Parameter(layer.weight.detach() * hook.grid.scale, layer.weight.requires_grad)
                layer._forward_pre_hooks[key] = IntegerInput(hook.grid)


def is_quantized(module: nn.Module) -> bool:
    """Return whether the layer's weight or input is quantized."""
    return hasattr(module, "weight_codes") or activation_grid(module) is not None


def set_quantized_weight(module: nn.Module, quantized: QuantizedWeight) -> None:
    """Replace a layer's weight with a quantized weight; exported layers are restored with this function too."""
    check_bits(quantized.bits)
    layer: Any = module  # torch's type of a module's attributes is Tensor | Module
    # A new parameter: the old tensor may be shared with the dense model.
    layer.weight = nn.Parameter(quantized.dequantize().to(layer.weight.device), layer.weight.requires_grad)
    layer.weight_codes = quantized  # a plain attribute, so the state dict has no new names


def quantized_weight(module: nn.Module) -> QuantizedWeight | None:
    """Return a layer's quantized weight, where the weight is, or None if its weight is not quantized.

    Raises:
        ValueError: if the weight was changed after it was quantized (by folding or training, for example).
    """
    layer: Any = module
    quantized = getattr(layer, "weight_codes", None)
    if quantized is None:
        return None
    quantized = quantized.on(layer.weight.device)  # a network that moves takes its parameters along, not this attribute
    if not torch.equal(quantized.dequantize(), layer.weight.detach()):
        raise ValueError("A weight was changed after it was quantized. Read the codes before batch norms are folded.")
    return quantized


def set_activation_grid(module: nn.Module, grid: ActivationGrid) -> None:
    """Quantize a layer's input in all following forward passes."""
    module.register_forward_pre_hook(ActivationQuantizer(grid))


def activation_grid(module: nn.Module) -> ActivationGrid | None:
    """Return the grid of a layer's input, or None if its input is not quantized."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, ActivationQuantizer)]
    return hooks[0].grid if hooks else None
