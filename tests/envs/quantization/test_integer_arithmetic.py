"""The simulation in float32 agrees with integer arithmetic: products and sums of codes, and one rescaling at the end."""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.model_graph import analyze
from secateur.envs.quantization.fake_quantize import activation_grid, quantized_weight, set_activation_grid, set_quantized_weight
from secateur.envs.quantization.quantizers import QUANTIZERS

LAYERS = {
    "conv": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1, dilation=2, bias=False),
    "grouped": lambda: nn.Conv2d(8, 4, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 16, 5, padding=2, groups=8),
    "linear": lambda: nn.Linear(8 * 36, 10),
}


class Net(nn.Module):
    """A convolution, a leaky activation (so that inputs have both signs), the layer in question, a classifier."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer = nn.Conv2d(3, 8, 3), layer
        self.classes = nn.Identity() if isinstance(layer, nn.Linear) else nn.Linear(layer.out_channels, 5)

    def inner(self, images):
        x = F.leaky_relu(self.first(images), 0.2)
        return x.flatten(1) if isinstance(self.layer, nn.Linear) else x

    def forward(self, images):
        y = self.layer(self.inner(images))
        return y if isinstance(self.layer, nn.Linear) else self.classes(y.mean((2, 3)))


def integer_levels(weight):
    """Return the weight as int64 and the step they count: 1, 1/2 (odd numbers), or the smallest power of two (shifts)."""
    if weight.levels is None:
        return weight.codes.long(), 1.0
    step = float(weight.levels.abs()[weight.levels != 0].min())
    counts = weight.levels.double() / step
    assert torch.equal(counts, counts.round()) and counts.abs().max() < 2**24
    return counts.long()[weight.codes.long() + 2 ** (weight.bits - 1)], step


def integer_outputs(layer, x, weight, grid):
    """Return the layer's outputs from int64 products and sums alone, rescaled once in float64."""
    codes = (x / grid.scale).round().add(grid.zero_point).clamp(0, grid.max_code).long()
    counts, step = integer_levels(weight)
    assert codes.min() >= 0 and codes.max() <= 2**grid.bits - 1
    signed = codes - grid.zero_point
    factor = weight.scale.double() * step * grid.scale
    if isinstance(layer, nn.Linear):
        return (signed @ counts.T) * factor + layer.bias.detach().double()
    # Unfolding only copies: integers below 2^53 stay exact in float64.
    rows = F.unfold(signed.double(), layer.kernel_size, layer.dilation, layer.padding, layer.stride).long()
    rows = rows.view(len(x), layer.groups, -1, rows.shape[2])
    sums = counts.flatten(1).view(layer.groups, len(counts) // layer.groups, -1) @ rows  # int64
    outputs = sums.flatten(1, 2) * factor[:, None]
    return outputs if layer.bias is None else outputs + layer.bias.detach().double()[:, None]


@cache
def calibrated(kind):
    """Return the model of a layer, its images, and the statistics of the layer's input."""
    torch.manual_seed(0)
    model, images = Net(LAYERS[kind]()).eval(), torch.randn(24, 3, 8, 8)
    graph = analyze(model, (images[:1],))
    return model, images, calibrate(model, graph, images, CalibrationConfig()).layers["layer"]


@pytest.mark.numerics
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 8), (3, 4), (2, 2)])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_layers_compute_what_integers_do(name, kind, weight_bits, activation_bits):
    model, images, statistics = calibrated(kind)
    config, make = QUANTIZERS[name]
    layer, quantizer = copy.deepcopy(model.layer), make(config())
    set_quantized_weight(layer, quantizer.quantize_weight(layer.weight.detach(), weight_bits, statistics))
    set_activation_grid(layer, quantizer.activation_grid(statistics, activation_bits))
    weight, grid = quantized_weight(layer), activation_grid(layer)

    x = model.inner(images).detach()
    expected = integer_outputs(layer, x, weight, grid)
    found = layer(x).detach().double().view_as(expected)
    largest = float(expected.abs().max())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * largest)
    steps = expected / (largest / 100)  # an 8-bit grid that the next layer might read
    tied = ((steps - steps.floor()) - 0.5).abs() < 1e-3
    assert torch.equal((found / (largest / 100)).round()[~tied], steps.round()[~tied]) and tied.float().mean() < 0.01
