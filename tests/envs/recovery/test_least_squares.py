"""Independent refits are least-squares solutions, one by one, and reach every layer that lost inputs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.assembler import Assembler
from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.core import CompressionPolicy, InputError
from secateur.envs.model_graph import analyze
from secateur.envs.quantization.quantizers.uniform import Uniform
from secateur.envs.recovery.least_squares import LeastSquares, LeastSquaresConfig

EXACT = LeastSquares(LeastSquaresConfig(damping=1e-9))


class Chain(nn.Module):
    """Readers of every kind: dilated, strided, padded, grouped and depthwise convolutions, linear layers after a flatten."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 5, (3, 2), stride=2, padding=(2, 1), dilation=(2, 1), bias=bias)
        self.depthwise = nn.Conv2d(5, 5, 3, padding="same", groups=5)
        self.third = nn.Conv2d(5, 4, 3, padding="same", dilation=2)
        self.grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=bias)
        self.hidden = nn.Linear(6 * 16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.third(F.relu(self.depthwise(F.relu(self.second(F.relu(self.first(x)))))))
        return self.head(F.relu(self.hidden(F.relu(self.grouped(F.relu(x))).flatten(1))))


@pytest.fixture(scope="module", params=[True, False], ids=["bias", "no bias"])
def chain(request):
    torch.manual_seed(0)
    model = Chain(request.param).eval()
    images = torch.randn(50, 2, 8, 7)
    return model, analyze(model, (images[:1],)), images


def refitted(chain, recovery, kept, **calibration):
    """Return the network in which the named groups keep these units."""
    model, graph, images = chain
    scores = tuple(np.isin(np.arange(g.units), kept.get(g.name, np.arange(g.units))).astype(float) for g in graph.groups)
    known = calibrate(model, graph, images, CalibrationConfig(**{"positions": 1000, **calibration}))
    layers = len(graph.geometry.layers)
    policy = CompressionPolicy(tuple(int(s.sum()) for s in scores), (32,) * layers, (32,) * layers)
    return Assembler(model, graph, scores, Uniform(), [recovery], known, images).assemble(policy)


def unfolded(layer, x):
    """Return every input of a layer, (samples, inputs), by torch's own unfold."""
    if isinstance(layer, nn.Linear):
        return x
    extra = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    padding = layer.padding
    if padding == "same":
        x = F.pad(x, (extra[1] // 2, extra[1] - extra[1] // 2, extra[0] // 2, extra[0] - extra[0] // 2))
        padding = 0
    return F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).transpose(1, 2).flatten(0, 1)


def inputs_of(model, name, images):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    model(images)
    hook.remove()
    return seen[0]


def best_outputs(rows, kept, weight, bias):
    """Return numpy's least-squares fit, from these entries of the rows, to what the dense weight makes of all of them."""
    left, target = rows[:, kept], rows @ weight.T
    if bias is not None:
        left, target = np.c_[left, np.ones(len(left))], target + bias
    return left @ np.linalg.lstsq(left, target, rcond=None)[0]


@pytest.mark.parametrize(
    ("group", "kept", "reader"), [("first", [0, 2, 3], "second"), ("third", [0], "grouped"), ("hidden", [1, 2, 5], "head")]
)
def test_refit_is_the_least_squares_solution(group, kept, reader, chain):
    """Against numpy's solver on the samples themselves, with almost no damping; nothing else is touched."""
    model, graph, images = chain
    units = {g.name: g.units for g in graph.groups}[group]
    network = refitted(chain, EXACT, {group: kept})
    layer, new = model.get_submodule(reader), network.get_submodule(reader)
    conv_groups = getattr(layer, "groups", 1)  # a unit is one channel of each conv group
    biases = [[None] * conv_groups if m.bias is None else m.bias.detach().numpy().reshape(conv_groups, -1) for m in (layer, new)]
    weights = [m.weight.detach().double().flatten(1).numpy().reshape(conv_groups, -1, m.weight[0].numel()) for m in (layer, new)]
    for index, inputs in enumerate(inputs_of(model, reader, images).chunk(conv_groups, 1)):
        rows = unfolded(layer, inputs).double().numpy()
        entries = np.arange(rows.shape[1]).reshape(units, -1)[kept].ravel()
        expected = best_outputs(rows, entries, weights[0][index], biases[0][index])
        outputs = rows[:, entries] @ weights[1][index].T + (0 if new.bias is None else biases[1][index])
        assert outputs == pytest.approx(expected, abs=2e-3)
    for name in {"second", "third", "grouped", "hidden", "head"} - {reader, group}:
        assert torch.equal(network.get_submodule(name).weight, model.get_submodule(name).weight)


def test_duplicated_channel_is_absorbed_exactly_with_its_constant():
    """Channel 1 is twice channel 0 plus 3, so removing it must not change the output, batch norm's mean included."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 16, 3)
    ).eval()
    model[0].weight.data[1] = 2 * model[0].weight.data[0]
    model[0].bias.data[1] = 2 * model[0].bias.data[0] + 3
    images = torch.randn(40, 3, 8, 8)
    kept = {"0": [0, 2, 3], "1": [0, 2, 4]}
    network = refitted((model, analyze(model, (images[:1],)), images), LeastSquares(LeastSquaresConfig(damping=1e-8)), kept)
    expected = model[2](model[1](model[0](images)))[:, ::2]
    assert torch.allclose(network[2](network[1](network[0](images))), expected, atol=1e-3)


def test_refits_are_remembered_by_what_is_kept(chain):
    """Two policies that share a layer's inputs give it the same tensor values; other inputs give others."""
    first, same, other = (refitted(chain, LeastSquares(), {"first": kept}) for kept in ([0, 2], [0, 2], [1, 2]))
    assert torch.equal(first.second.weight, same.second.weight)
    assert not torch.allclose(first.second.weight, other.second.weight, atol=1e-3)


@pytest.mark.numerics
def test_without_full_moments_a_refit_still_lowers_the_error(chain):
    """Moments of the channels at one pixel, or the means alone, are used when larger ones do not fit."""
    model, graph, images = chain

    def loss(recovery, limit):
        network = refitted(chain, recovery, {"first": [0, 2, 3, 5]}, max_matrix_bytes=limit).requires_grad_(False)
        x = F.relu(model.first(images)).detach()
        return float((network.second(x[:, [0, 2, 3, 5]]) - model.second(x).detach()).square().mean())

    full, channel, diagonal = (loss(LeastSquares(), limit) for limit in (10**6, 400, 100))
    nothing = loss(LeastSquares(LeastSquaresConfig(damping=1e12)), 10**6)
    assert full < channel
    if model.second.bias is not None:
        assert channel < diagonal
    else:
        assert channel < nothing


def test_damping_pulls_towards_the_old_weights(chain):
    model = chain[0]
    network = refitted(chain, LeastSquares(LeastSquaresConfig(damping=1e9)), {"first": [0, 2, 4]})
    assert torch.allclose(network.second.weight, model.second.weight[:, ::2], atol=1e-6)


@pytest.mark.parametrize("damping", [0, -1.0, float("nan")])
def test_damping_out_of_range_is_an_input_error(damping):
    with pytest.raises(InputError, match="damping"):
        LeastSquaresConfig(damping=damping)
