"""Slicing is exact: on every kind of coupling, permuting units changes nothing and sliced equals masked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.cost_models.core import InputError
from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.model_graph import analyze, fold_batch_norms
from secateur.envs.piece_cache import PieceCache
from secateur.envs.policy_space import PolicySpace, SpaceConfig
from secateur.envs.pruning.slicing import masked_model, resize_model, slice_model
from secateur.envs.quantization.quantizers.uniform import Uniform
from secateur.envs.recovery.least_squares import LeastSquares
from secateur.search.benchmarks.support import random_inputs, slicing_error
from tests.envs.small_networks import SMALL_NETWORKS, small_network


def conv(inputs, outputs, kernel=3, **options):
    options.setdefault("padding", kernel // 2)
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer, self.head = conv(3, 8), conv(8, 6), nn.Conv2d(6, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.outer(self.inner(x)))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.norm, self.last = conv(3, 6), conv(3, 4), nn.BatchNorm2d(10), conv(10, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1))
        return self.head(F.adaptive_avg_pool2d(self.last(x), 1).flatten(1))


class Depthwise(nn.Sequential):
    def __init__(self):
        pool = nn.AdaptiveAvgPool2d(1)
        super().__init__(conv(3, 6), conv(6, 6, groups=6), conv(6, 12, groups=6), pool, nn.Flatten(), nn.Linear(12, 5))


class Grouped(nn.Sequential):
    def __init__(self):
        super().__init__(conv(3, 8), conv(8, 12, groups=4), conv(12, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))


class Flat(nn.Sequential):
    def __init__(self):
        hidden = nn.Linear(6 * 4, 9)
        super().__init__(conv(3, 6, stride=2), nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), hidden, nn.Tanh(), nn.Linear(9, 5))


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down, self.up, self.head = conv(3, 8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        scale = torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head((scale * x).amax((2, 3)))


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.last, self.head = conv(3, 8), conv(4, 4), conv(8, 6), nn.Linear(6, 5)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat([left, self.branch(right)], 1)
        n, channels, height, width = x.shape
        x = x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)
        return self.head(self.last(x).mean((2, 3)))


class SlicedHalves(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.last, self.head = conv(3, 8), conv(4, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        half = x.shape[1] // 2
        return self.head(self.last(x[:, :half] * x[:, half:]).mean((2, 3)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = conv(3, 8), conv(1, 8), nn.Linear(8, 5)

    def forward(self, image, depth):
        return self.head((self.first(image) * self.second(depth)).mean((2, 3)))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.twice(self.twice(self.stem(x))).mean((2, 3)))


class ZeroPadded(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer, self.head = conv(3, 6), conv(6, 8), conv(8, 10), nn.Linear(10, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.outer(self.inner(x)) + F.pad(x, (0, 0, 0, 0, 2, 2))
        return self.head(x.mean((2, 3)))


class Normalized(nn.Module):
    """Channels last, layer norm, a layer scale, and an MLP: ConvNeXt's block."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.up, self.down = conv(3, 6), nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.scale, self.hidden_scale = nn.Parameter(torch.rand(6, 1, 1)), nn.Parameter(torch.rand(4, 4, 12))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 2)
        y = self.up(self.norm(x.permute(0, 2, 3, 1))) * self.hidden_scale
        x = x + self.scale * self.down(F.gelu(y)).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(6, 8, 1), nn.Linear(2, 5)
        self.slope = nn.PReLU(6)

    def forward(self, x):
        x = F.pixel_shuffle(self.last(self.slope(F.glu(self.stem(x), dim=1))), 2)
        return self.head(x.mean((2, 3)))


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.up, self.norm, self.head = (
            conv(3, 6),
            nn.ConvTranspose2d(6, 7, 2, stride=2),
            nn.BatchNorm2d(7),
            nn.Linear(7, 5),
        )

    def forward(self, x):
        return self.head(F.relu(self.norm(self.up(self.stem(x)))).mean((2, 3)))


class Tokens(nn.Module):
    """A class token and position embeddings that are joined and added without any normalization in between."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down, self.head = (
            nn.Conv2d(3, 8, 2, 2),
            nn.Linear(8, 12),
            nn.Linear(12, 8),
            nn.Linear(8, 5),
        )
        self.token, self.position = nn.Parameter(torch.rand(1, 1, 8)), nn.Parameter(torch.rand(1, 17, 8))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head((x + self.down(F.relu(self.up(x))))[:, 0])


class Renamed(nn.Module):
    """Modules that are registered twice and run under their second name, `twice` under both."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.twice = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.stem = nn.Sequential(self.conv, self.norm, nn.ReLU(), self.twice)
        self.block = conv(6, 7)
        self.last = nn.Sequential(self.block)
        self.linear = nn.Linear(7, 5)

    def forward(self, x):
        return self.linear(self.last(self.twice(self.stem(x)).relu()).mean((2, 3)))


NETWORKS = [
    Residual, Concat, Depthwise, Grouped, Flat, SqueezeExcite, Shuffle, SlicedHalves, TwoInputs, Shared, ZeroPadded,
    Normalized, Gated, Transposed, Tokens, Renamed,
]  # fmt: skip


def randomized(model):
    """Return the model in eval mode and float64, with norms and biases that hide no mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.is_floating_point():
                tensor.add_(torch.empty_like(tensor).uniform_(-0.3, 0.5, generator=generator))
    return model.double().eval()


def images(model, batch=3):
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(batch, 3, 8, 8, dtype=torch.float64, generator=generator)]
    if isinstance(model, TwoInputs):
        found.append(torch.randn(batch, 1, 8, 8, dtype=torch.float64, generator=generator))
    return tuple(found)


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda network: network.__name__)
def analyzed(request):
    torch.manual_seed(0)
    model = randomized(request.param())
    # Without the proof by trying, so that a wrong coupling cannot hide behind a frozen group.
    return model, analyze(model, images(model), verify=False)


def some_units(graph, seed=0):
    rng = np.random.default_rng(seed)
    return [np.sort(rng.choice(g.units, rng.integers(1, g.units), replace=False)) for g in graph.groups]


def test_sliced_network_equals_the_masked_one(analyzed):
    model, graph = analyzed
    kept = some_units(graph)
    inputs = images(model)
    with torch.no_grad():
        expected, found = masked_model(model, graph, kept)(*inputs), slice_model(model, graph, kept)(*inputs)
        assert (expected - model(*inputs)).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_permuting_the_units_of_a_group_changes_nothing(analyzed):
    model, graph = analyzed
    inputs, rng = images(model), np.random.default_rng(0)
    assert graph.groups
    for group in graph.groups:
        permuted = slice_model(model, graph, [np.arange(g.units) for g in graph.groups])
        order = np.roll(np.arange(group.units), rng.integers(1, group.units))
        tensors = dict(permuted.state_dict())
        for s in group.slices:
            index = torch.arange(tensors[s.tensor].shape[s.axis])
            index[s.positions.ravel()] = torch.from_numpy(s.positions[order].ravel())
            tensors[s.tensor] = tensors[s.tensor].index_select(s.axis, index)
        permuted.load_state_dict(tensors)
        with torch.no_grad():
            torch.testing.assert_close(permuted(*inputs), model(*inputs), rtol=1e-9, atol=1e-9)


def test_geometry_predicts_the_shapes_of_the_sliced_network(analyzed):
    model, graph = analyzed
    kept = some_units(graph)
    sliced = slice_model(model, graph, kept)
    shapes = graph.geometry.shapes([len(units) for units in kept])
    for index, layer in enumerate(graph.geometry.layers):
        assert shapes.weights[0, index] == sliced.get_submodule(layer.name).weight.numel(), layer.name
    biases = shapes.out_channels[0] @ [layer.has_bias for layer in graph.geometry.layers]
    total = shapes.weights.sum() + biases + shapes.other_parameters[0]
    assert total == sum(p.numel() for p in sliced.parameters())


def test_sliced_network_trains_without_touching_the_original(analyzed):
    model, graph = analyzed
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sliced = slice_model(model, graph, some_units(graph)).train()
    optimizer = torch.optim.SGD(sliced.parameters(), lr=0.1)
    sliced(*images(model, batch=2)).square().sum().backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_folding_batch_norms_keeps_the_output(analyzed):
    model, graph = analyzed
    sliced = slice_model(model, graph, some_units(graph))
    with torch.no_grad():
        expected = sliced(*images(model))
        fold_batch_norms(sliced, graph)
        torch.testing.assert_close(sliced(*images(model)), expected, rtol=1e-9, atol=1e-9)
    names = [name for _, name in graph.batch_norms]
    assert all(isinstance(sliced.get_submodule(name), nn.Identity) for name in names)
    assert all(isinstance(model.get_submodule(name), nn.BatchNorm2d) for name in names)


def test_resize_rebuilds_a_sliced_and_folded_network_from_its_tensors():
    model = randomized(Residual())
    graph = analyze(model, images(model))
    sliced = slice_model(model, graph, some_units(graph))
    again = resize_model(Residual().double().eval(), sliced.state_dict())
    assert torch.equal(again(*images(model)), sliced(*images(model)))
    assert (again.inner[0].in_channels, again.inner[1].num_features) == (
        sliced.inner[0].weight.shape[1],
        sliced.inner[0].weight.shape[0],
    )


def test_resize_keeps_a_depthwise_multiplier():
    model = resize_model(nn.Conv2d(6, 12, 3, groups=6), {"weight": torch.zeros(8, 1, 3, 3), "bias": torch.zeros(8)})
    assert (model.in_channels, model.out_channels, model.groups) == (4, 8, 4)


def test_resize_refuses_weights_of_another_architecture():
    with pytest.raises(InputError, match="no tensor 'features.0.weight'"):
        resize_model(Residual(), {"features.0.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="another architecture"):
        resize_model(Residual(), {"head.weight": torch.zeros(5)})


def test_tied_weights_stay_tied():
    model = randomized(Shared())
    model.again = model.twice
    graph = analyze(model, images(model))
    sliced = slice_model(model, graph, some_units(graph))
    assert sliced.again[0].weight is sliced.twice[0].weight


def test_kept_must_fit_the_groups():
    model = randomized(Residual())
    graph = analyze(model, images(model), verify=False)
    full = [np.arange(g.units) for g in graph.groups]
    with pytest.raises(ValueError, match="one entry per group"):
        slice_model(model, graph, full[:-1])
    for wrong in ([], [0, 99], [3, 2], [1, 1]):
        with pytest.raises(ValueError, match="ascending unit indices"):
            slice_model(model, graph, [np.array(wrong, dtype=int), *full[1:]])


@pytest.mark.numerics
@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_families_of_networks_are_sliced_exactly(name):
    found = small_network(name)
    kept = [np.arange(max(1, round(group.units * 0.7))) for group in found.graph.groups]
    if name == "vit":
        assert [group.units for group in found.graph.groups] == [2, 24, 2, 24], "heads and MLP widths"
    inputs = random_inputs([torch.zeros(1, 3, found.size, found.size)])
    assert found.graph.groups and slicing_error(found.model, found.graph, kept, inputs) <= 1e-5


def test_layers_go_by_the_names_of_their_weights():
    model = randomized(Renamed())
    graph = analyze(model, images(model))
    names = [layer.name for layer in graph.geometry.layers]
    assert names == ["conv", "twice", "block.0", "linear"] and all(layer.quantizable for layer in graph.geometry.layers)
    assert {f"{name}.weight" for name in names} <= {s.tensor for group in graph.groups for s in group.slices}
    space = PolicySpace(graph, SpaceConfig())
    assert [d.name for d in space.decisions] == ["prune_ratio/conv", "prune_ratio/block.0"]


def test_a_batch_norm_in_two_places_is_not_folded_and_one_in_a_shared_block_is():
    model = randomized(Renamed())
    graph = analyze(model, images(model))
    assert graph.batch_norms == (("block.0", "block.1"),)
    expected = model(*images(model))
    fold_batch_norms(model, graph)
    torch.testing.assert_close(model(*images(model)), expected)
    assert isinstance(model.last[0][1], nn.Identity)


def test_least_squares_finds_the_layers_that_have_two_names():
    model = randomized(Renamed()).float()
    inputs = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    graph = analyze(model, (inputs,))
    kept = some_units(graph)
    network = slice_model(model, graph, kept)
    calibration = calibrate(model, graph, inputs, CalibrationConfig())
    candidate = CandidateNetwork(network, model, graph, kept, {}, Uniform(), calibration, inputs, PieceCache())
    before = network.block[0].weight.clone()
    LeastSquares().apply(candidate)
    assert not torch.equal(network.last[0][0].weight, before)
