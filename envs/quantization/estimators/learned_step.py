"""Learned step sizes (LSQ): the scales of weights and inputs are trained with the weights.

Esser et al. 2020, arXiv:1902.08153. With the step s and the smallest and largest codes -Qn and Qp, eq. (1) to (3) and 2.2:

    v_hat = s round(clip(v / s, -Qn, Qp))
    d v_hat / d s = round(v / s) - v / s, inside the range; -Qn or Qp outside
    d v_hat / d v = 1 inside the range, 0 outside

The gradient of s is multiplied by 1 / sqrt(N Qp), where N is the number of values that share s, so that steps move about as fast
as weights. Here every output channel of a weight has its own step, and all of them start at those of the quantized network (for
example from GPTQ) and not at 2 mean|v| / sqrt(Qp) as in the paper: after a repair they are better than that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from secateur.envs.quantization.estimators.core import WeightEstimator
from secateur.envs.quantization.fake_quantize import ActivationQuantizer
from secateur.envs.quantization.quantizers.core import ActivationGrid, QuantizedWeight

STEP = "input_step"
"""Name of the parameter (scalar) of a layer whose input has a learned step."""


class LearnedStep(WeightEstimator):
    """Rounds to a grid whose scales are trained; grids with levels of their own keep their scales."""

    learns_inputs = True

    def __init__(self, quantized: QuantizedWeight):
        super().__init__(quantized)
        if quantized.levels is None:
            del self.scale
            self.scale = nn.Parameter(quantized.scale.clone())

    def forward(self, master: Tensor) -> Tensor:
        """Return the rounded weight."""
        if self.levels is not None:
            return self.rounded(master)
        step = scaled_gradient(self.scale, master[0].numel() * self.largest)
        clipped = (master / self._column(torch.where(step == 0, 1.0, step), master)).clamp(-self.largest, self.largest)
        return round_through(clipped) * self._column(step, master)


class LearnedInput(ActivationQuantizer):
    """A forward pre-hook that rounds a layer's first input to a grid with a learned step: the layer's parameter `input_step`."""

    def __call__(self, module: nn.Module, inputs: tuple) -> tuple:
        learned: Tensor = getattr(module, STEP)
        x, lowest = inputs[0].float(), -self.grid.zero_point
        step = scaled_gradient(learned, x[0].numel() * self.grid.max_code)
        codes = round_through((x / step).clamp(lowest, lowest + self.grid.max_code))
        return (codes * step).to(inputs[0].dtype), *inputs[1:]


def learn_input(module: nn.Module) -> None:
    """Give a layer's quantized input a learned step, in place; nothing happens if its input is not quantized."""
    for key, hook in module._forward_pre_hooks.items():
        if type(hook) is ActivationQuantizer:
            weight = next(iter(module.parameters()))
            module.register_parameter(STEP, nn.Parameter(weight.new_tensor(hook.grid.scale)))
            module._forward_pre_hooks[key] = LearnedInput(hook.grid)
            return


def fix_input(module: nn.Module) -> None:
    """Make a learned step a fixed grid, in place: the reverse of `learn_input`."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, LearnedInput):
            step = module._parameters.pop(STEP)
            assert step is not None, "learn_input has made it"
            grid = ActivationGrid(abs(step.item()), hook.grid.zero_point, hook.grid.bits)
            module._forward_pre_hooks[key] = ActivationQuantizer(grid)
            return


def scaled_gradient(step: Tensor, count: int) -> Tensor:
    """Return the steps, positive or zero, with gradients that are divided by the square root of a number.

    Args:
        step: the parameter.
        count: number of values that share a step, times the largest code.
    """
    positive = step.abs()
    if positive.requires_grad:
        positive.register_hook(lambda gradient: gradient / math.sqrt(max(count, 1)))
    return positive


def round_through(x: Tensor) -> Tensor:
    """Return the rounded values, with the gradient of x."""
    return x.round().detach() + (x - x.detach())
