"""CUDA graphs in trainings: which calls they take, and on a real GPU that they train as the network itself does."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

from secateur.envs.devices import CPU, find_device
from secateur.envs.quantization.trainable import make_trainable
from secateur.envs.tasks import synthetic
from secateur.envs.tasks.classification import Classification
from secateur.envs.training import distillation, graphs
from secateur.envs.training.graphs import MOST_SHAPES, Graphed, with_graphs
from secateur.envs.training.samples import labeled_samples
from tests.envs.training.test_distillation import DATA, Net, quantized, same, tensors, training

CUDA = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU")


@pytest.fixture
def captured(monkeypatch):
    """The shapes that were captured; a captured network doubles its outputs, which shows that it was called."""
    shapes = []

    def capture(network, x):
        shapes.append(tuple(x.shape))
        return lambda x: 2 * network(x)

    monkeypatch.setattr(graphs, "_capture", capture)
    return shapes


def test_every_shape_is_captured_once_and_only_some(captured):
    network = nn.Linear(4, 2)
    call = Graphed(network)
    inputs = [torch.randn(samples, 4) for samples in (3, 5, 3, 6, 5)]
    assert [torch.equal(call(x), 2 * network(x)) for x in inputs] == [True, True, True, False, True]
    assert captured == [(3, 4), (5, 4)] and len(captured) == MOST_SHAPES


def test_other_calls_go_to_the_network(captured):
    network = nn.Bilinear(4, 4, 2)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(Graphed(network)(x, y), network(x, y))
    assert torch.equal(Graphed(nn.Identity())(input=x), x)
    assert not captured


def test_a_network_that_cannot_be_captured_is_called_itself(monkeypatch):
    tried = []

    def capture(network, x):
        tried.append(x)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "_capture", capture)
    network = nn.Linear(4, 2)
    call, x = Graphed(network), torch.randn(3, 4)
    assert torch.equal(call(x), network(x)) and torch.equal(call(x), network(x)) and len(tried) == 1


def test_a_full_memory_is_left_to_the_halving_of_batches(monkeypatch):
    def capture(network, x):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(graphs, "_capture", capture)
    with pytest.raises(torch.OutOfMemoryError):
        Graphed(nn.Linear(4, 2))(torch.randn(3, 4))


def test_the_garbage_collector_waits_for_the_end_of_a_capture():
    with pytest.raises(ValueError), graphs._without_collector():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()


def test_graphs_are_for_float_networks_on_a_gpu():
    network = Net()
    assert with_graphs(network, CPU) is network
    assert with_graphs(network, CUDA).network is network
    rounded = quantized(copy.deepcopy(network))
    make_trainable(rounded)
    assert with_graphs(rounded, CUDA) is rounded


def small(seed):
    """A network without random numbers: a capture may draw some."""
    torch.manual_seed(seed)
    conv, norm = nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(36, synthetic.NUM_CLASSES)).eval().to(CUDA)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore")  # PyTorch warns of streams and contexts of its own
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_with_graphs_is_the_training_without(precision, monkeypatch):
    find_device("cuda")  # without TF32
    data, network, teacher, used = DATA.on(CUDA), small(1), small(2), []
    samples = labeled_samples(data, data.train)
    assert samples.count % 5, "five batches have two sizes"

    def trained():
        options = {"epochs": 3, "batch_size": -(-samples.count // 5), "precision": precision}
        return training(teacher, samples, Classification(data), **options).run(network)

    capture = graphs._capture
    monkeypatch.setattr(graphs, "_capture", lambda network, x: used.append(x.shape) or capture(network, x))
    fast = trained()
    assert set(used) == {(20, 3, 8, 8), (19, 3, 8, 8)}
    monkeypatch.setattr(distillation, "with_graphs", lambda network, device: network)
    captures = len(used)
    plain = trained()
    assert len(used) == captures
    tolerance = 1e-4 if precision == "float32" else 2e-2
    assert [one.loss for one in fast.epochs] == pytest.approx([one.loss for one in plain.epochs], rel=tolerance)
    for name, tensor in tensors(plain.network).items():
        assert torch.allclose(tensors(fast.network)[name].float(), tensor.float(), rtol=tolerance, atol=tolerance), name


@pytest.mark.gpu
@needs_gpu
def test_capture_leaves_buffers_as_they_were():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(CUDA).train()
    before = copy.deepcopy(network)
    graphs._capture(network, torch.randn(2, 3, 8, 8, device=CUDA) + 3)
    assert same(network, before)
