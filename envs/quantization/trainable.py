"""Training of quantized weights: rounding in the forward pass, a gradient all the same in the backward pass.

The trainable form keeps a float weight, the *master weight*, beside each quantized one. An estimator
(envs/quantization/estimators) makes from it the weight that the layer computes with. The master weights start at the quantized
values, so the trainable form first computes what the quantized network does. Inputs with bits are rounded by their forward
pre-hooks, which pass gradients already (envs/quantization/fake_quantize.py); the estimator `learned_step` trains their steps too.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from secateur.envs.quantization.estimators import ESTIMATORS, WeightEstimator
from secateur.envs.quantization.estimators.learned_step import fix_input, learn_input
from secateur.envs.quantization.fake_quantize import quantized_weight, set_quantized_weight

DEFAULT = "straight_through"
"""Name of the estimator where none is named."""


def make_trainable(network: nn.Module, estimator: str = DEFAULT) -> None:
    """Give every quantized weight a master weight, and let all parameters have gradients, in place.

    The names of quantized weights change until `make_quantized`: `conv.weight` becomes `conv.parametrizations.weight.original`.

    Args:
        network: with quantized weights, or without.
        estimator: a name in `ESTIMATORS`.
    """
    for module in list(network.modules()):
        quantized = quantized_weight(module)
        if quantized is not None:
            layer: Any = module
            del layer.weight_codes
            parametrize.register_parametrization(layer, "weight", ESTIMATORS[estimator](quantized))
        if ESTIMATORS[estimator].learns_inputs:
            learn_input(module)
    network.requires_grad_(True)


def set_progress(network: nn.Module, share: float) -> None:
    """Tell the estimators of a network which share of the training is done, in [0, 1]."""
    for module in network.modules():
        if isinstance(module, WeightEstimator):
            module.progress(share)


def make_quantized(network: nn.Module) -> None:
    """Round every master weight for good, in place: the network computes the same as before, with its names of before."""
    for module in list(network.modules()):
        fix_input(module)
        estimator = _estimator(module)
        if estimator is not None:
            layer: Any = module
            master = layer.parametrizations.weight.original
            # Not torch's `remove_parametrizations`: it changes the class, which deep copies of the module share.
            layer.__class__ = type(layer).__bases__[0]
            del layer.parametrizations
            others = dict(layer._parameters)
            layer._parameters.clear()
            layer.weight = nn.Parameter(master.detach(), master.requires_grad)  # the weight comes first, as before
            layer._parameters.update(others)
            set_quantized_weight(layer, estimator.quantize(master))


def _estimator(module: nn.Module) -> WeightEstimator | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    first: Any = module.parametrizations.weight[0]  # type: ignore[union-attr, index]
    return first if isinstance(first, WeightEstimator) else None
