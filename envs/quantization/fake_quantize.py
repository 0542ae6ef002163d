"""Simulated quantization: the float network computes with values that integers stand for.

Weights are rounded once, in the parameter. Activations are rounded at the layer's input by a forward pre-hook, so that
the architecture and the names of the tensors stay as they are. Both survive deepcopy and pickling.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from secateur.envs.quantization.quantizers.core import ActivationGrid, QuantizedWeight, check_bits


@dataclass(frozen=True)
class ActivationQuantizer:
    """A forward pre-hook that puts a layer's first input on its grid.

    The gradient is passed straight through inside the range and is zero outside (Jacob et al. 2018, arXiv:1712.05877).
    """

    grid: ActivationGrid

    def __call__(self, module: nn.Module, inputs: tuple) -> tuple:
        return self.round(inputs[0]), *inputs[1:]

    def round(self, x: Tensor) -> Tensor:
        """Return the nearest values of the grid, same shape, precision and memory format."""
        if torch.is_inference_mode_enabled():
            return self._round_fast(x)
        # In float32, because a code of bfloat16 arithmetic may be off by one.
        rounded = torch.fake_quantize_per_tensor_affine(x.float(), self.grid.scale, self.grid.zero_point, 0, self.grid.max_code)
        return rounded.to(x.dtype)

    def _round_fast(self, x: Tensor) -> Tensor:
        """Return the same values without any gradient: vectorized steps in place, where the operator is a scalar loop."""
        return self._codes(x).mul_(self.grid.scale).to(x.dtype)

    def _codes(self, x: Tensor) -> Tensor:
        """Return the codes less the zero point, float32."""
        lowest = -self.grid.zero_point
        codes = x.to(torch.float32, copy=True).mul_(self._inverse_scale).round_()
        return codes.clamp_(lowest, lowest + self.grid.max_code)

    @cached_property
    def _inverse_scale(self) -> float:
        """As the operator has it: in float32."""
        return float(1 / np.float32(self.grid.scale))


class IntegerInput(ActivationQuantizer):
    """A forward pre-hook that gives the layer the codes less the zero point; the scale is in its weight. No gradient."""

    def round(self, x: Tensor) -> Tensor:
        """Return the integers in the precision of x: bfloat16 holds all of them, but not all their multiples."""
        return self._codes(x).to(x.dtype)


def use_integer_inputs(network: nn.Module) -> None:
    """Let layers read integers instead of multiples of their scale, in place: the same function, exact in bfloat16."""
    for module in network.modules():
        for key, hook in module._forward_pre_hooks.items():
            if type(hook) is ActivationQuantizer:
                module.weight = nn.Parameter(module.weight.detach() * hook.grid.scale, module.weight.requires_grad)
                module._forward_pre_hooks[key] = IntegerInput(hook.grid)


def is_quantized(module: nn.Module) -> bool:
    """Whether the layer's weight or input is on a grid."""
    return hasattr(module, "weight_codes") or activation_grid(module) is not None


def set_quantized_weight(module: nn.Module, quantized: QuantizedWeight) -> None:
    """Make a layer compute with these codes: also how an exported layer is restored."""
    check_bits(quantized.bits)
    # A new parameter: the old tensor may be shared with the dense model.
    module.weight = nn.Parameter(quantized.dequantize().to(module.weight.device), module.weight.requires_grad)
    module.weight_codes = quantized  # a plain attribute: no new names in the state dict


def quantized_weight(module: nn.Module) -> QuantizedWeight | None:
    """Return the integers behind a layer's weight, or None if it is in float.

    Raises:
        ValueError: if the weight has been changed since it was quantized (by folding or training, status).
    """
    quantized = getattr(module, "weight_codes", None)
    if quantized is not None and not torch.equal(quantized.dequantize(), module.weight.detach()):
        raise ValueError("A weight has left its grid since it was quantized. Take the codes before batch norms are folded.")
    return quantized


def set_activation_grid(module: nn.Module, grid: ActivationGrid) -> None:
    """Put a layer's input on a grid from now on."""
    module.register_forward_pre_hook(ActivationQuantizer(grid))


def activation_grid(module: nn.Module) -> ActivationGrid | None:
    """Return the grid of a layer's input, or None if it is in float."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, ActivationQuantizer)]
    return hooks[0].grid if hooks else None
