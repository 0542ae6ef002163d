"""The contract of recoveries: the dense network, names and shapes stay, and the outputs come back."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.assembler import Assembler
from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.core import CompressionPolicy
from secateur.envs.model_graph import analyze
from secateur.envs.quantization.quantizers.uniform import Uniform
from secateur.envs.recovery import RECOVERIES
from secateur.envs.tasks import synthetic


def constructed_network(images):
    """Return an untrained network in which every second channel of `conv2` is large and nearly constant.

    The next batch norm subtracts what these channels add. Without them its inputs, and with them all outputs, are far off.
    """
    torch.manual_seed(1)
    model = synthetic.synthetic_net()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.3)
        norm.momentum = None  # the plain average
    model.bn2.bias.data[1::2] += 3
    nn.init.normal_(model.linear.weight)
    with torch.no_grad():
        model.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@pytest.fixture(scope="module")
def task():
    """Data, calibration images, and an assembler without recoveries that keeps every other unit first."""
    data = synthetic.load(calibration=256)
    images, _ = data.tensors(data.calibration)
    model = constructed_network(images)
    graph = analyze(model, (images[:1],))
    scores = tuple(np.arange(group.units) % 2 == 0 for group in graph.groups)
    calibration = calibrate(model, graph, images, CalibrationConfig())
    return data, Assembler(model, graph, tuple(s.astype(float) for s in scores), Uniform(), (), calibration, images)


def policy(assembler, groups=None, share=0.5, bits=(32, 32)):
    """Keep a share of each group, or of the named ones."""
    plan = assembler.graph
    widths = (round(share * g.units) if groups is None or g.name in groups else g.units for g in plan.groups)
    layers = len(plan.geometry.layers)
    return CompressionPolicy(tuple(widths), (bits[0],) * layers, (bits[1],) * layers)


def recovered(assembler, chosen, *names):
    recoveries = [RECOVERIES[name][1](RECOVERIES[name][0]()) for name in names]
    fields = {name: getattr(assembler, name) for name in ("model", "graph", "scores", "quantizer", "calibration", "images")}
    return Assembler(**fields, recoveries=recoveries).assemble(chosen)


@torch.no_grad()
def error(network, task):
    """Return the mean squared error of the outputs on other images, relative to the variance of the dense outputs."""
    data, assembler = task
    images, _ = data.tensors(data.test)
    dense = assembler.model(images)
    return float((network(images) - dense).square().mean() / dense.var(0).mean())


@pytest.mark.parametrize("bits", [(32, 32), (4, 8)])
@pytest.mark.parametrize("name", RECOVERIES)
def test_contract(name, bits, task):
    _, assembler = task
    config, make = RECOVERIES[name]
    recovery = pickle.loads(pickle.dumps(make(config())))
    assert isinstance(recovery.after_quantization, bool) and isinstance(recovery.needs_images, bool)
    model, images = assembler.model, assembler.images
    before, half = copy.deepcopy(model.state_dict()), policy(assembler, bits=bits)
    names = {key: tensor.shape for key, tensor in recovered(assembler, half).state_dict().items()}
    networks = [recovered(assembler, half, name) for _ in range(2)]
    for network in networks:
        assert {key: tensor.shape for key, tensor in network.state_dict().items()} == names
        assert not any(module.training for module in network.modules())
        assert all(parameter.requires_grad for parameter in network.parameters())
    outputs = [network(images) for network in networks]
    assert torch.equal(*outputs) and outputs[0].isfinite().all()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", RECOVERIES)
def test_nothing_removed_means_nothing_changed(name, task):
    _, assembler = task
    network = recovered(assembler, policy(assembler, share=1.0), name)
    if name == "batch_norm":  # it recomputes the statistics from batches
        assert error(network, task) < 0.01
    else:
        assert torch.equal(network(assembler.images), assembler.model(assembler.images))


@pytest.mark.numerics
@pytest.mark.parametrize("name", ["batch_norm", "least_squares", "sequential", "data_free"])
def test_recoveries_bring_the_outputs_back(name, task):
    _, assembler = task
    half = policy(assembler, {"conv2"})
    assert error(recovered(assembler, half, name), task) < 0.5 * error(recovered(assembler, half, "none"), task)


@pytest.mark.parametrize("name", RECOVERIES)
def test_gradients_reach_every_parameter_after_recovery(name, task):
    data, assembler = task
    network = recovered(assembler, policy(assembler), name)
    images, labels = data.tensors(data.calibration)
    F.cross_entropy(network.train()(images), labels).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
