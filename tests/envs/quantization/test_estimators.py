"""Estimators: what quantized weights compute while they are trained, their gradients, and that training lowers the loss."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from secateur.envs.quantization.estimators import ESTIMATORS
from secateur.envs.quantization.estimators.asymptotic import Asymptotic
from secateur.envs.quantization.estimators.learned_step import STEP, LearnedStep
from secateur.envs.quantization.estimators.soft import ALPHA, Soft
from secateur.envs.quantization.fake_quantize import activation_grid, quantized_weight, set_activation_grid, set_quantized_weight
from secateur.envs.quantization.quantizers import QUANTIZERS, ActivationGrid, QuantizedWeight
from secateur.envs.quantization.trainable import make_quantized, make_trainable, set_progress


def grid(bits=3, scales=(0.5, 2.0)):
    scale = torch.tensor(scales)
    return QuantizedWeight(torch.zeros(len(scales), 4, dtype=torch.int8), scale, bits)


def quantized_network(seed, quantizer="uniform", bits=2):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    config, made = QUANTIZERS[quantizer]
    for layer in (network[0], network[2]):
        set_quantized_weight(layer, made(config()).quantize_weight(layer.weight.detach(), bits))
    set_activation_grid(network[2], ActivationGrid(0.2, 0, 3))
    return network.eval()


@pytest.mark.parametrize("quantizer", ["uniform", "power_of_two"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_trainable_network_starts_and_ends_as_a_quantized_one(name, quantizer):
    network, x = quantized_network(0, quantizer), torch.randn(8, 16)
    wanted, names = network(x), list(network.state_dict())
    trainable = copy.deepcopy(network)
    make_trainable(trainable, name)
    torch.testing.assert_close(trainable(x), wanted, rtol=0, atol=1e-6)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter.mul_(1.1)
    found = trainable(x)
    make_quantized(trainable)
    torch.testing.assert_close(trainable(x), found, rtol=0, atol=1e-6)
    assert list(trainable.state_dict()) == names
    assert all(quantized_weight(trainable[index]) is not None for index in (0, 2))
    assert activation_grid(trainable[2]).scale == pytest.approx(0.22 if name == "learned_step" else 0.2)


def test_learned_steps_have_the_gradients_of_the_paper():
    estimator = LearnedStep(grid())
    master = nn.Parameter(torch.tensor([[0.1, 0.7, -1.6, 9.0], [0.3, -5.2, -40.0, 1.1]]))
    upstream = torch.tensor([[1.0, -2.0, 3.0, 0.5], [2.0, 1.0, -1.0, 4.0]])
    estimator(master).backward(upstream)
    relative = master.detach() / torch.tensor([[0.5], [2.0]])
    inside = relative.abs() <= 3
    assert torch.equal(master.grad, upstream * inside)
    slope = torch.where(inside, relative.round() - relative, 3 * relative.sign())
    torch.testing.assert_close(estimator.scale.grad, (slope * upstream).sum(1) / math.sqrt(4 * 3))


def test_a_channel_of_zeros_stays_zero_with_learned_steps():
    estimator = LearnedStep(grid(scales=(0.0, 1.0)))
    master = nn.Parameter(torch.tensor([[0.0] * 4, [1.0] * 4]))
    estimator(master).sum().backward()
    assert torch.equal(estimator(master)[0], torch.zeros(4))
    assert estimator.scale.grad.isfinite().all()
    assert estimator.scale.grad[0] == 0


def test_the_soft_gradient_is_that_of_the_staircase():
    def staircase(relative):
        """eq. (3) of the paper, in codes."""
        code, sharpness = math.floor(relative), math.log(2 / ALPHA - 1)
        return code + 0.5 + math.tanh(sharpness * (relative - code - 0.5)) / (1 - ALPHA) / 2

    values = torch.tensor([[0.1, 0.45, -1.3, 2.7], [0.9, -2.2, 1.5, -0.6]])
    master = nn.Parameter(values * torch.tensor([[0.5], [2.0]]))
    Soft(grid())(master).sum().backward()
    step = 1e-4
    slopes = [[(staircase(v + step) - staircase(v - step)) / (2 * step) for v in row] for row in values.double().tolist()]
    torch.testing.assert_close(master.grad, torch.tensor(slopes), rtol=1e-3, atol=1e-3)


def test_the_asymptotic_weight_moves_from_float_to_the_grid():
    estimator = Asymptotic(grid(scales=(1.0,)))
    master = nn.Parameter(torch.tensor([[0.2, 1.4, -2.6, 7.0]]))
    rounded = torch.tensor([[0.0, 1.0, -3.0, 3.0]])
    distances = []
    for share in (0, 0.3, 0.6, 0.9, 1):
        estimator.progress(share)
        master.grad = None
        estimator(master).sum().backward()
        torch.testing.assert_close(master.grad, torch.tensor([[1.0, 1.0, 1.0, 0.0]]) * 2 * estimator.alpha)
        distances.append(float((estimator(master).detach() - rounded).abs().sum()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] == pytest.approx(float((master.detach() - rounded).abs().sum()) / 2)
    assert distances[-1] == distances[-2] == 0
    estimator.progress(0)
    assert torch.equal(estimator.eval()(master), rounded), "scores are those of quantized weights at any time"


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("seed", range(3))
def test_training_lowers_the_loss_of_the_quantized_network(name, seed):
    network = quantized_network(seed)
    x = torch.randn(256, 16)
    torch.manual_seed(seed + 100)
    targets = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))(x).detach()
    before = (network(x) - targets).square().mean()
    make_trainable(network, name)
    optimizer, steps = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9), 200
    network.train()
    for step in range(steps):
        set_progress(network, step / steps)
        loss = (network(x) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    make_quantized(network.eval())
    assert (network(x) - targets).square().mean() < 0.7 * before


def test_learned_steps_of_inputs_are_trained():
    network = quantized_network(0)
    make_trainable(network, "learned_step")
    step = getattr(network[2], STEP)
    network(torch.randn(64, 16)).square().mean().backward()
    assert step.grad != 0
    with torch.no_grad():
        step.mul_(0.5)
    make_quantized(network)
    assert activation_grid(network[2]) == ActivationGrid(pytest.approx(0.1), 0, 3)
