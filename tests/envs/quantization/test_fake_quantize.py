"""Simulated quantization computes what integers would, survives copying, and trains straight through."""

import copy
import pickle

import pytest
import torch
from torch import nn

from envs.quantization.calibration import calibrate_activations
from envs.quantization.fake_quantize import (
    ActivationQuantizer,
    activation_grid,
    is_quantized,
    quantize_model,
    quantized_weight,
    set_activation_grid,
    set_quantized_weight,
)
from envs.quantization.quantizers import ActivationGrid, dequantize
from envs.quantization.quantizers.uniform import Uniform
from envs.tasks.synthetic import synthetic_net

LAYERS = ("conv1", "conv2", "conv3", "conv4", "linear")


@pytest.fixture
def images():
    return torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quantized(images):
    torch.manual_seed(0)
    model = synthetic_net().eval()
    ranges = calibrate_activations(model, LAYERS, images)
    quantize_model(model, {name: (4, 8) for name in LAYERS}, ranges, Uniform())
    return model


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 8), (2, 3)])
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "padding": 1, "bias": False}, {"groups": 4}])
def test_convolution_equals_exact_integer_arithmetic(weight_bits, activation_bits, options):
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, **options).double()
    x = torch.randn(3, 4, 9, 9, generator=generator).double()
    model = nn.Sequential(copy.deepcopy(conv).float())
    quantize_model(model, {"0": (weight_bits, activation_bits)}, {"0": (-1.5, 2.0)}, Uniform())
    grid, weight = activation_grid(model[0]), quantized_weight(model[0])

    codes = (x.float() / grid.scale).round().add(grid.zero_point).clamp(0, grid.max_code).long()
    assert codes.min() >= 0 and codes.max() < 2**activation_bits
    unpadded = (codes - grid.zero_point).double()  # integers; sums below 2^53 are exact in float64
    integers = nn.functional.conv2d(
        unpadded, weight.codes.double(), stride=conv.stride, padding=conv.padding, groups=conv.groups
    )
    assert torch.equal(integers, integers.round())
    expected = integers * grid.scale * weight.scale.double().view(1, -1, 1, 1)
    expected += 0 if conv.bias is None else conv.bias.detach().view(1, -1, 1, 1)
    assert torch.allclose(model(x.float()).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_activations_are_rounded_to_at_most_2_to_the_bits_levels(bits):
    grid = Uniform().activation_grid(-0.7, 2.1, bits)
    quantize = ActivationQuantizer(grid).round
    x = torch.linspace(-3, 4, 20_001)
    rounded = quantize(x)
    assert len(rounded.unique()) == 2**bits
    inside = (x >= -0.7) & (x <= 2.1)
    assert (rounded - x).abs()[inside].max() <= grid.scale / 2 * 1.0001
    assert torch.equal(quantize(rounded), rounded)
    assert quantize(torch.zeros(3)).tolist() == [0.0] * 3


def test_gradient_is_one_inside_the_range_and_zero_outside():
    grid = ActivationGrid(scale=0.1, zero_point=5, bits=4)  # -0.5 .. 1.0
    x = torch.tensor([-2.0, -0.6, -0.49, 0.0, 0.33, 0.99, 1.2, 7.0], requires_grad=True)
    (ActivationQuantizer(grid).round(x) * torch.arange(1.0, 9.0)).sum().backward()
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 0, 0]


def test_copies_and_pickles_compute_the_same(quantized, images):
    expected = quantized(images)
    assert torch.equal(copy.deepcopy(quantized)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quantized))(images), expected)
    assert torch.allclose(
        copy.deepcopy(quantized).to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last)),
        expected,
        atol=1e-4,
    )
    assert set(quantized.state_dict()) == set(synthetic_net().state_dict())


def test_memory_format_and_precision_are_kept():
    round_ = ActivationQuantizer(ActivationGrid(0.01, 3, 8)).round
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    assert round_(x).is_contiguous(memory_format=torch.channels_last)
    assert round_(x.bfloat16()).dtype == torch.bfloat16


def test_quantized_parameter_is_its_codes_times_its_scale_bit_for_bit(quantized):
    for name in LAYERS:
        module = quantized.get_submodule(name)
        weight = quantized_weight(module)
        assert torch.equal(dequantize(weight.codes, weight.scale), module.weight)
        assert weight.bits == 4 and weight.codes.abs().max() <= 8
        assert len(module.weight[0].unique()) <= 16


def test_restored_layers_compute_the_same(quantized, images):
    torch.manual_seed(1)
    restored = synthetic_net().eval()
    restored.load_state_dict(quantized.state_dict())
    for name in LAYERS:
        source, target = quantized.get_submodule(name), restored.get_submodule(name)
        weight = quantized_weight(source)
        set_quantized_weight(target, weight.codes, weight.scale, weight.bits)
        set_activation_grid(target, activation_grid(source))
    assert torch.equal(restored(images), quantized(images))


def test_bits_of_32_leave_a_layer_alone_and_shared_tensors_are_not_written(images):
    dense = synthetic_net().eval()
    before = copy.deepcopy(dense.state_dict())
    model = copy.deepcopy(dense)
    model.conv2.weight = dense.conv2.weight
    ranges = calibrate_activations(dense, LAYERS, images)
    quantize_model(model, {"conv1": (32, 32), "conv2": (4, 32), "conv3": (32, 6)}, ranges, Uniform())
    assert not is_quantized(model.conv1) and quantized_weight(model.conv1) is None
    assert activation_grid(model.conv2) is None and quantized_weight(model.conv2).bits == 4
    assert activation_grid(model.conv3).bits == 6 and quantized_weight(model.conv3) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_misuse_is_refused(quantized, images):
    with pytest.raises(ValueError, match="no layer `conv9`"):
        quantize_model(quantized, {"conv9": (8, 8)}, {}, Uniform())
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(quantized, {"conv1": (8, 32)}, {}, Uniform())
    with pytest.raises(ValueError, match="16"):
        quantize_model(synthetic_net(), {"conv1": (16, 32)}, {}, Uniform())
    quantized.conv1.weight.data *= 1.5
    with pytest.raises(ValueError, match="left its grid"):
        quantized_weight(quantized.conv1)
