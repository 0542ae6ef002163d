"""Simulated quantization survives copying, trains straight through, and leaves everything else alone."""

import copy
import pickle
from functools import cache

import numpy as np
import pytest
import torch

from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.model_graph import analyze
from secateur.envs.piece_cache import PieceCache
from secateur.envs.quantization.fake_quantize import (
    ActivationQuantizer,
    activation_grid,
    is_quantized,
    quantized_weight,
    set_activation_grid,
    set_quantized_weight,
)
from secateur.envs.quantization.quantizers import QUANTIZERS, ActivationGrid
from secateur.envs.quantization.quantizers.uniform import Uniform
from secateur.envs.tasks.synthetic import synthetic_net

LAYERS = ("conv1", "conv2", "conv3", "conv4", "linear")


@pytest.fixture
def images():
    return torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@cache
def synthetic_graph():
    """Return the plan of the network, which does not depend on its weights."""
    return analyze(synthetic_net().eval(), (torch.zeros(1, 3, 8, 8),))


def make_candidate(model, bits, images, quantizer=None, network=None):
    """Return a candidate from which nothing is removed."""
    graph = synthetic_graph()
    calibration = calibrate(model, graph, images, CalibrationConfig())
    kept = [np.arange(group.units) for group in graph.groups]
    network = copy.deepcopy(model) if network is None else network
    return CandidateNetwork(network, model, graph, kept, bits, quantizer or Uniform(), calibration, images, PieceCache())


def quantize(candidate):
    candidate.quantize_inputs()
    candidate.quantize_weights()
    return candidate.network


@pytest.fixture(params=QUANTIZERS)
def quantized(images, request):
    torch.manual_seed(0)
    config, make = QUANTIZERS[request.param]
    bits = {name: (2 if name == "conv3" else 4, 8) for name in LAYERS}
    return quantize(make_candidate(synthetic_net().eval(), bits, images, make(config())))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_activations_are_rounded_to_at_most_2_to_the_bits_levels(bits):
    scale = 2.8 / (2**bits - 1)
    grid = ActivationGrid(scale, round(0.7 / scale), bits)
    quantize = ActivationQuantizer(grid).round
    x = torch.linspace(-3, 4, 20_001)
    rounded = quantize(x)
    assert len(rounded.unique()) == 2**bits
    inside = (x >= -grid.zero_point * scale) & (x <= (grid.max_code - grid.zero_point) * scale)
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


def test_quantized_parameter_is_its_codes_bit_for_bit(quantized):
    for name in LAYERS:
        module = quantized.get_submodule(name)
        weight = quantized_weight(module)
        assert torch.equal(weight.dequantize(), module.weight)
        assert weight.bits == (2 if name == "conv3" else 4)
        assert len(module.weight[0].unique()) <= 2**weight.bits


def test_restored_layers_compute_the_same(quantized, images):
    torch.manual_seed(1)
    restored = synthetic_net().eval()
    restored.load_state_dict(quantized.state_dict())
    for name in LAYERS:
        source, target = quantized.get_submodule(name), restored.get_submodule(name)
        set_quantized_weight(target, quantized_weight(source))
        set_activation_grid(target, activation_grid(source))
    assert torch.equal(restored(images), quantized(images))


def test_bits_of_32_leave_a_layer_alone_and_shared_tensors_are_not_written(images):
    dense = synthetic_net().eval()
    before = copy.deepcopy(dense.state_dict())
    network = copy.deepcopy(dense)
    network.conv2.weight = dense.conv2.weight
    bits = {"conv1": (32, 32), "conv2": (4, 32), "conv3": (32, 6)}
    model = quantize(make_candidate(dense, bits, images, network=network))
    assert not is_quantized(model.conv1) and quantized_weight(model.conv1) is None
    assert activation_grid(model.conv2) is None and quantized_weight(model.conv2).bits == 4
    assert activation_grid(model.conv3).bits == 6 and quantized_weight(model.conv3) is None
    assert not is_quantized(model.conv4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_a_layer_is_quantized_once_from_the_statistics_that_are_given(images):
    torch.manual_seed(0)
    model = synthetic_net().eval()
    config, make = QUANTIZERS["gptq"]
    once, twice = (make_candidate(model, {"conv2": (3, 32)}, images, make(config())) for _ in range(2))
    once.quantize("conv2")
    before = once.network.conv2.weight
    once.quantize("conv2", once.statistics("conv4"))
    assert once.network.conv2.weight is before
    assert torch.equal(once.float_weights["conv2"], model.conv2.weight)
    twice.quantize("conv2", twice.statistics("conv3"))
    assert not torch.equal(twice.network.conv2.weight, before)


def test_misuse_is_refused(quantized, images):
    with pytest.raises(ValueError, match="`conv1` is already quantized"):
        make_candidate(synthetic_net().eval(), {"conv1": (8, 8)}, images, network=quantized).quantize_inputs()
    with pytest.raises(ValueError, match="16"):
        make_candidate(synthetic_net().eval(), {"conv1": (16, 32)}, images).quantize_weights()
    candidate = make_candidate(synthetic_net().eval(), {"conv1": (8, 8)}, images)
    candidate.calibration = None
    with pytest.raises(ValueError, match="`conv1` was not calibrated"):
        candidate.quantize_inputs()
    quantized.conv1.weight.data *= 1.5
    with pytest.raises(ValueError, match="was changed after it was quantized"):
        quantized_weight(quantized.conv1)
