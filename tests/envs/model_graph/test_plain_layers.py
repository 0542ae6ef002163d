"""Wrappers are removed, computed weights become plain ones with the same outputs, and what stays computed is listed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from secateur.envs.model_graph import analyze
from secateur.envs.model_graph.plain_layers import make_weights_plain, unwrapped
from secateur.envs.pruning.slicing import masked_model, slice_model
from secateur.envs.tasks.models import load_model
from secateur.search.export.load import build_dense


class StandardizedConv(nn.Conv2d):
    """Weight standardization with a gain per channel, as in ResNetV2 and NF-ResNet."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels))

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, weight=self.gain, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledLinear(nn.Linear):
    """A linear layer with equalized learning rate."""

    def forward(self, x):
        return F.linear(x, self.weight * 0.5, bias=self.bias)


class PaddedConv(StandardizedConv):
    """Pads its input itself: more than a plain layer."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 2, 0, 2)))


class DynamicConv(nn.Conv2d):
    """The weight depends on the input."""

    def forward(self, x):
        return F.conv2d(x, self.weight * x.mean(), self.bias, padding=1)


class TracedConv(nn.Conv2d):
    """A subclass with a plain weight."""

    def forward(self, x):
        return super().forward(x)


def masked(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


LAYERS = {
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3, groups=2)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    "spectral_norm hook": lambda: nn.utils.spectral_norm(nn.Conv2d(4, 6, 3)),
    "mask": lambda: masked(nn.Conv2d(4, 6, 3)),
    "transposed": lambda: parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3, 2)),
    "standardized": lambda: StandardizedConv(4, 6, 3, stride=2, dilation=2, bias=False),
    "standardized and normalized": lambda: parametrizations.weight_norm(StandardizedConv(4, 6, 3)),
    "scaled": lambda: ScaledLinear(4, 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_computed_weights_become_plain_and_the_outputs_stay(name):
    layer = LAYERS[name]()
    x = torch.randn(2, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 9, 9)
    model = nn.Sequential(layer)
    for _ in range(3):
        model.train()(x)  # spectral norm estimates its vectors in training
    expected = model.eval()(x)
    assert make_weights_plain(model) == ["0"]
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert type(model[0]) in (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    assert set(model.state_dict()) <= {"0.weight", "0.bias"}
    assert make_weights_plain(model) == []


@pytest.mark.parametrize(
    "layer", [PaddedConv(4, 6, 3), DynamicConv(4, 6, 3), TracedConv(4, 6, 3)], ids=lambda m: type(m).__name__
)
def test_layers_that_are_more_than_a_plain_layer_or_are_plain_already_stay(layer):
    kind, names = type(layer), list(layer.state_dict())
    assert make_weights_plain(layer) == []
    assert (type(layer), list(layer.state_dict())) == (kind, names)


def make_network():
    norm = parametrizations.spectral_norm
    return nn.Sequential(
        norm(nn.Conv2d(3, 8, 3)),
        nn.ReLU(),
        StandardizedConv(8, 12, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def make_wrapped_network():
    return nn.DataParallel(make_network())


@pytest.mark.parametrize("factory", ["make_network", "make_wrapped_network"])
def test_a_network_of_computed_weights_is_loaded_pruned_and_rebuilt(factory, tmp_path, caplog):
    source = make_network().eval()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = load_model(f"{__name__}:{factory}", tmp_path / "weights.pth")
    assert "stored as plain weights in the searched network: 0, 2." in caplog.text
    assert ("returns DataParallel: the Sequential inside it is used" in caplog.text) == (factory == "make_wrapped_network")
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(images), source(images))
    graph = analyze(model, (images,))
    assert [(group.name, group.units) for group in graph.groups] == [("0", 8), ("2", 12)]
    kept = [np.arange(1, 8), np.arange(10)]
    torch.testing.assert_close(slice_model(model, graph, kept)(images), masked_model(model, graph, kept)(images))
    rebuilt = build_dense({"factory": f"{__name__}:{factory}", "args": {}}, trust=[__name__])
    assert {name: x.shape for name, x in rebuilt.state_dict().items()} == {
        name: x.shape for name, x in model.state_dict().items()
    }


def test_wrappers_of_pytorch_are_removed_and_modules_of_users_are_not():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = nn.Conv2d(3, 4, 1)
    assert unwrapped(torch.compile(nn.DataParallel(model))) is model
    assert unwrapped(AveragedModel(model)).state_dict().keys() == model.state_dict().keys()
    for kept in (Wrapper(model), nn.Sequential(model), model):
        assert unwrapped(kept) is kept


@pytest.mark.parametrize(("kind", "reader"), [(PaddedConv, "conv2d, whose weight is computed"), (DynamicConv, "mean")])
def test_layers_whose_weight_stays_computed_are_listed_as_frozen(kind, reader):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    frozen = {f.layer: (f.channels, f.reason) for f in analyze(net, (torch.zeros(1, 3, 8, 8),)).frozen}
    assert frozen["1"] == (6, "the weight of its conv2d is computed in the forward pass")
    assert frozen["0"][1].startswith(f"enters {reader}")
