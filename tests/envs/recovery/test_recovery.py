"""What every recovery keeps to: the dense network, names and shapes stay, and accuracy comes back."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from secateur.envs.assembler import Assembler
from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.core import CompressionPolicy
from secateur.envs.model_graph import analyze
from secateur.envs.quantization.quantizers.uniform import Uniform
from secateur.envs.recovery import RECOVERIES
from secateur.envs.tasks import synthetic
from secateur.envs.tasks.training import Recipe, train


@pytest.fixture(scope="module")
def task():
    """Data, calibration images, and an assembler without recoveries that keeps every other unit first."""
    data = synthetic.load(calibration=256)
    model = train(synthetic.synthetic_net(), data, synthetic.RECIPE)
    images, _ = data.tensors(data.calibration)
    graph = analyze(model, (images[:1],))
    scores = tuple(np.arange(group.units) % 2 == 0 for group in graph.groups)
    known = calibrate(model, graph, images, CalibrationConfig())
    return data, Assembler(model, graph, tuple(s.astype(float) for s in scores), Uniform(), (), known, images)


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


def top1(model, data):
    images, labels = data.tensors(data.test)
    with torch.inference_mode():
        return float((model(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("bits", [(32, 32), (4, 8)])
@pytest.mark.parametrize("name", RECOVERIES)
def test_contract(name, bits, task):
    data, assembler = task
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
    data, assembler = task
    network = recovered(assembler, policy(assembler, share=1.0), name)
    assert top1(network, data) == pytest.approx(top1(assembler.model, data), abs=0.01)
    if name != "batch_norm":
        assert torch.equal(network(assembler.images), assembler.model(assembler.images))


def test_recoveries_recover(task):
    data, assembler = task
    half = policy(assembler, {"conv2", "conv4"})
    none, *others = (
        top1(recovered(assembler, half, name), data) for name in ("none", "batch_norm", "least_squares", "sequential")
    )
    assert all(top1 > none + 0.2 for top1 in others)


@pytest.mark.parametrize("name", RECOVERIES)
def test_training_goes_on_after_recovery(name, task):
    data, assembler = task
    network = recovered(assembler, policy(assembler), name)
    images, labels = data.tensors(data.calibration)
    F.cross_entropy(network.train()(images), labels).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert train(network, data, Recipe(epochs=1)) is not network
