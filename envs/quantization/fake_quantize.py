"""Simulated quantization: the float network computes with values that integers stand for.

Weights are rounded once, in the parameter. Activations are rounded at the layer's input by a forward pre-hook, so that
the architecture and the names of the tensors stay as they are. Both survive deepcopy and pickling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from envs.quantization.quantizers.core import ActivationGrid, Quantizer, check_bits, dequantize

UNTOUCHED = 32
"""The bit-width that means "leave it alone"."""


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
        # In float32, because a code of bfloat16 arithmetic may be off by one.
        rounded = torch.fake_quantize_per_tensor_affine(
            x.float(), self.grid.scale, self.grid.zero_point, 0, self.grid.max_code
        )
        return rounded.to(x.dtype)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers: `dequantize(codes, scale)` is the parameter, bit for bit.

    Attributes:
        codes: shape of the weight, int8.
        scale: (output channels,) float32.
        bits: how many bits a code takes.
    """

    codes: Tensor
    scale: Tensor
    bits: int


def quantize_model(
    model: nn.Module,
    layers: Mapping[str, tuple[int, int]],
    ranges: Mapping[str, tuple[float, float]],
    quantizer: Quantizer,
) -> None:
    """Quantize layers of `model` in place; layers that are not named stay in float.

    Args:
        model: network whose convolutions and linear layers have the names used below.
        layers: {layer: (weight_bits, activation_bits)}, each 2..8, or 32 for untouched.
        ranges: {layer: (low, high)} of the layer's input, from `calibrate_activations`.
        quantizer: chooses the grids.
    Raises:
        ValueError: if a layer does not exist, was quantized before, or a bit-width cannot be simulated.
    """
    modules = dict(model.named_modules())
    for name, (weight_bits, activation_bits) in layers.items():
        if name not in modules:
            raise ValueError(f"The model has no layer `{name}` to quantize.")
        module = modules[name]
        if is_quantized(module):
            raise ValueError(f"Layer `{name}` is quantized already; start from the float network.")
        if weight_bits != UNTOUCHED:
            set_quantized_weight(module, *quantizer.quantize_weight(module.weight, weight_bits), weight_bits)
        if activation_bits != UNTOUCHED:
            set_activation_grid(module, quantizer.activation_grid(*ranges[name], activation_bits))


def is_quantized(module: nn.Module) -> bool:
    """Whether the layer's weight or input is on a grid."""
    return hasattr(module, "weight_scale") or activation_grid(module) is not None


def set_quantized_weight(module: nn.Module, codes: Tensor, scale: Tensor, bits: int) -> None:
    """Make a layer compute with these codes: also how an exported layer is restored."""
    check_bits(bits)
    # A new parameter: the old tensor may be shared with the dense model.
    module.weight = nn.Parameter(dequantize(codes, scale).to(module.weight.device), module.weight.requires_grad)
    module.weight_scale, module.weight_bits = scale, bits  # plain attributes: no new names in the state dict


def quantized_weight(module: nn.Module) -> QuantizedWeight | None:
    """Return the integers behind a layer's weight, or None if it is in float.

    Raises:
        ValueError: if the weight has been changed since it was quantized (by folding or training, say).
    """
    if not hasattr(module, "weight_scale"):
        return None
    weight = module.weight.detach()
    codes = (weight / module.weight_scale.view(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8)
    if not torch.equal(dequantize(codes, module.weight_scale), weight):
        raise ValueError(
            "A weight has left its grid since it was quantized. Take the codes before batch norms are folded."
        )
    return QuantizedWeight(codes, module.weight_scale, module.weight_bits)


def set_activation_grid(module: nn.Module, grid: ActivationGrid) -> None:
    """Put a layer's input on a grid from now on."""
    module.register_forward_pre_hook(ActivationQuantizer(grid))


def activation_grid(module: nn.Module) -> ActivationGrid | None:
    """Return the grid of a layer's input, or None if it is in float."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, ActivationQuantizer)]
    return hooks[0].grid if hooks else None
