"""Bias correction: the mean of a quantized layer's output is the dense one's again."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.model_graph import analyze
from secateur.envs.piece_cache import PieceCache
from secateur.envs.quantization.quantizers.uniform import Uniform
from secateur.envs.recovery.bias_correction import BiasCorrection


class Layers(nn.Module):
    """Every kind of layer with something to correct, and two without: no intercept, or inputs that are not known."""

    def __init__(self):
        super().__init__()
        self.biased = nn.Conv2d(3, 8, 3, stride=2)
        self.normed, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8)
        self.bare = nn.Conv2d(16, 8, 1, bias=False)
        self.transposed = nn.ConvTranspose2d(8, 8, 2)
        self.tokens = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.normed(F.relu(self.biased(x)))))
        x = F.relu(self.transposed(F.relu(self.bare(F.relu(self.depthwise(x))))))
        return self.head(F.gelu(self.tokens(x.flatten(2).transpose(1, 2))).mean(1))


NAMES = ("biased", "normed", "depthwise", "bare", "transposed", "tokens", "head")


def make_candidate(names=NAMES, **calibration):
    torch.manual_seed(0)
    model = Layers().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    images = torch.randn(40, 3, 13, 13) + 0.5
    graph = analyze(model, (images[:1],))
    statistics = calibrate(model, graph, images, CalibrationConfig(positions=10_000, **calibration))
    bits, kept = dict.fromkeys(names, (3, 32)), [np.arange(group.units) for group in graph.groups]
    candidate = CandidateNetwork(copy.deepcopy(model), model, graph, kept, bits, Uniform(), statistics, images, PieceCache())
    candidate.quantize_weights()
    return candidate


def inputs(model, images):
    """Return {layer: its input}."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]})) for name in NAMES
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


def mean_outputs(model, seen):
    """Return {layer: (outputs,)}, each layer on the given input, and behind its batch norm if it has one."""
    means = {}
    for name in NAMES:
        y = model.get_submodule(name)(seen[name])
        y = model.norm(y) if name == "normed" else y
        means[name] = y.detach().flatten(0, -2).mean(0) if y.dim() <= 3 else y.detach().mean((0, 2, 3))
    return means


def test_means_of_outputs_are_the_dense_ones_where_they_can_be():
    candidate = make_candidate()
    model, network = candidate.dense_model, candidate.network
    before = copy.deepcopy(model.state_dict())
    seen = inputs(model, candidate.images)
    expected, quantized = mean_outputs(model, seen), mean_outputs(network, seen)
    weights = {name: layer.weight for name, layer in candidate.layers.items() if name in NAMES}
    recovery = pickle.loads(pickle.dumps(BiasCorrection()))
    assert recovery.after_quantization and recovery.needs_images
    recovery.apply(candidate)
    corrected = mean_outputs(network, seen)
    for name in ("biased", "normed", "depthwise", "transposed", "tokens", "head"):
        before_correction, after = ((means[name] - expected[name]).abs().max() for means in (quantized, corrected))
        assert after < 0.05 * before_correction and before_correction > 1e-4, name
    assert torch.equal(corrected["bare"], quantized["bare"])
    assert all(candidate.layers[name].weight is weight for name, weight in weights.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_in_float_stay_as_they_are():
    candidate = make_candidate(names=("depthwise",))
    BiasCorrection().apply(candidate)
    for name, tensor in candidate.network.state_dict().items():
        assert torch.equal(tensor, candidate.dense_model.state_dict()[name]) != name.startswith("depthwise")


@pytest.mark.numerics
@pytest.mark.parametrize(("most", "kind"), [(2_600, "channel"), (300, "diagonal")])
def test_means_of_channels_do_away_from_borders(most, kind):
    candidate = make_candidate(names=("depthwise", "tokens", "head"), max_matrix_bytes=most)
    assert kind in {layer.kind for layer in candidate.calibration.layers.values()}
    seen = inputs(candidate.dense_model, candidate.images)
    expected = mean_outputs(candidate.dense_model, seen)
    before = mean_outputs(candidate.network, seen)
    BiasCorrection().apply(candidate)
    after = mean_outputs(candidate.network, seen)
    for name in ("depthwise", "tokens", "head"):
        assert (after[name] - expected[name]).norm() < 0.5 * (before[name] - expected[name]).norm()
