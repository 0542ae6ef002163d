"""One model sliced many times: every slice is fresh, however its tree is copied."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from secateur.envs.model_graph import analyze
from secateur.envs.pruning.slicing import Slicer, kept_positions, masked_model

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3, groups=2), nn.Linear(6, 4)
        self.scale, self.names = nn.Parameter(torch.ones(8, 1, 1)), ["a"]

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x)) * self.scale))).mean((2, 3)))


class Unpicklable(Plain):
    def __init__(self):
        super().__init__()
        self.twice = lambda x: 2 * x  # a deepcopy shares it, a pickle refuses it

    def forward(self, x):
        return self.twice(super().forward(x))


class OwnCopy(Plain):
    def __deepcopy__(self, memo):
        new = copy.copy(self)
        new._modules = copy.deepcopy(self._modules, memo)
        new._parameters = copy.deepcopy(self._parameters, memo)
        new.copied = True
        return new


def kept_units(graph, share):
    return [np.arange(0, group.units, share) for group in graph.groups]


@pytest.mark.parametrize("kind", [Plain, Unpicklable, OwnCopy])
def test_every_slice_is_its_own_network(kind):
    model = kind().eval()
    before = copy.deepcopy(model.state_dict())
    graph = analyze(model, (IMAGES[:1],))
    slicer = Slicer(model, graph)
    for share in (2, 1, 3):
        kept = kept_units(graph, share)
        network, positions = slicer.slice(kept)
        assert type(network) is kind and not network.training
        assert torch.allclose(network(IMAGES), masked_model(model, graph, kept)(IMAGES), atol=1e-5)
        assert all(network.get_parameter(n).requires_grad == p.requires_grad for n, p in model.named_parameters())
        assert network.names is not model.names or kind is OwnCopy
        expected = kept_positions(model, graph, kept)
        assert positions.keys() == expected.keys()
        assert all((positions[t][a] == e).all() for t, axes in expected.items() for a, e in axes.items())
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data.zero_()  # nobody else may notice
        network.names.append("b") if kind is Plain else None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.names == ["a"] and (kind is not OwnCopy or network.copied)


def test_tied_tensors_stay_tied():
    class Tied(Plain):
        def __init__(self):
            super().__init__()
            self.again = self.head

    for kind in (Tied, Plain):
        model = kind().eval()
        model.norm.bias = model.norm.weight
        graph = analyze(model, (IMAGES[:1],))
        network, _ = Slicer(model, graph).slice(kept_units(graph, 2))
        assert network.norm.bias is network.norm.weight
        assert kind is Plain or network.again is network.head
