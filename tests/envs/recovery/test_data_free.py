"""Compensation without images: its solutions are the minima they claim to be, and nothing beyond its reach is touched."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.assembler import Assembler
from secateur.envs.core import CompressionPolicy, InputError
from secateur.envs.model_graph import analyze
from secateur.envs.quantization.quantizers.uniform import Uniform
from secateur.envs.recovery.common.channel_scales import filters, normed_producers
from secateur.envs.recovery.common.moments import input_moments, kept_moments, output_moments, synthetic_statistics
from secateur.envs.recovery.data_free import DataFree, DataFreeConfig, filter_gram, from_gram, from_gram_nonnegative

FITS = ("closed_form", "nonnegative", "moments")


def with_statistics(model, seed=0):
    """Give every batch norm random parameters and statistics."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=rng)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.5, generator=rng)
    return model.eval()


def chain(bias=False):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    return with_statistics(nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 16, 4)))


class Residual(nn.Module):
    """A stream of two producers, read through depthwise and concatenating layers, and a layer without batch norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.branch, self.branch_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.expand, self.expand_norm = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12)
        self.depthwise, self.depthwise_norm = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 6, 1)
        self.side, self.side_norm = nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)
        self.grouped = nn.Conv2d(11, 11, 1)
        self.last = nn.Conv2d(11, 4, 3, groups=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(x + self.branch_norm(self.branch(x)))
        y = F.hardswish(self.expand_norm(self.expand(x)))
        y = self.project(F.relu6(self.depthwise_norm(self.depthwise(y))))
        y = torch.cat([y, F.silu(self.side_norm(self.side(x)))], 1)
        y = F.max_pool2d(F.relu(self.last(F.relu(self.grouped(y)))), 2)
        return self.head(y.mean((2, 3)))


class Plain(nn.Module):
    """No batch norm anywhere."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6 * 16, 4)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))).flatten(1))


_PLANS = {}
"""Plans by the printed network and the size of its images: a plan does not depend on the weights."""


def plan(model, size=8):
    """Return the plan of the model."""
    if (key := (repr(model), size)) not in _PLANS:
        _PLANS[key] = analyze(model, (torch.zeros(1, 3, size, size),))
    return _PLANS[key]


def assembler(model, fit="moments", scores=None, size=8, **options):
    graph = plan(model, size)
    if scores is None:
        scores = tuple(np.random.default_rng(0).permutation(group.units).astype(float) for group in graph.groups)
    recoveries = [DataFree(DataFreeConfig(fit=fit, **options))] if fit else []
    return Assembler(model, graph, scores, Uniform(), recoveries)


def policy(graph, share=0.5, bits=32, groups=None):
    widths = tuple(max(1, round(share * g.units)) if groups is None or g.name in groups else g.units for g in graph.groups)
    layers = len(graph.geometry.layers)
    return CompressionPolicy(widths, (bits,) * layers, (32,) * layers)


@pytest.fixture
def system():
    """Gram matrix of a group whose filters look alike in part, with the filters and offsets themselves."""
    model = chain(bias=True)
    model[0].weight.data += 0.4 * torch.randn(1, 3, 3, 3)
    built = assembler(model)
    candidate = built.candidate(policy(built.graph, 1.0))
    found = filters(model[0], model[1])
    stacked = torch.cat([found.rows, 0.1 * found.offsets[:, None]], 1)  # alpha_1 = 0.01
    return filter_gram(candidate, built.graph.groups[0], 0.01), stacked


KEPT, REMOVED = np.array([0, 2, 5, 6, 7]), np.array([1, 3, 4])


def stacked_errors(stacked, solution):
    return (stacked[KEPT].T @ solution - stacked[REMOVED].T).square().sum(0)


def test_filters_are_what_convolution_and_batch_norm_compute_together():
    model = chain(bias=True)
    found, x = filters(model[0], model[1]), torch.randn(2, 3, 3, 3)
    expected = model[1](model[0](x)).flatten(1)
    assert torch.allclose(F.linear(x.flatten(1).double(), found.rows, found.offsets).float(), expected, atol=1e-5)


def test_closed_form_is_the_minimum(system):
    gram, stacked = system
    solution = from_gram(gram, KEPT, REMOVED).requires_grad_()
    stacked_errors(stacked, solution).sum().backward()
    assert solution.grad.abs().max() < 1e-9


def test_nonnegative_solution_is_the_constrained_minimum(system):
    gram, stacked = system
    solution = from_gram_nonnegative(gram, KEPT, REMOVED)
    clipped = from_gram(gram, KEPT, REMOVED).clamp_min(0)
    assert (solution >= 0).all() and (solution == 0).any() and (solution > 0).any()
    assert (stacked_errors(stacked, solution) <= stacked_errors(stacked, clipped) + 1e-12).all()
    variable = solution.clone().requires_grad_()
    stacked_errors(stacked, variable).sum().backward()
    assert variable.grad[solution > 0].abs().max() < 1e-8 and (variable.grad[solution == 0] > -1e-8).all()


@pytest.mark.parametrize("fit", FITS)
def test_positive_multiple_of_a_kept_channel_is_absorbed(fit):
    model = chain()
    # Channels 1 and 4 are 2 and 0.5 times channel 0: the same filter, scaled by the batch norm or before it.
    model[0].weight.data[1], model[0].weight.data[4] = model[0].weight.data[0], 0.5 * model[0].weight.data[0]
    norm = model[1]
    norm.running_mean[1], norm.running_mean[4] = norm.running_mean[0], 0.5 * norm.running_mean[0]
    norm.running_var[1], norm.running_var[4] = norm.running_var[0], 0.25 * (norm.running_var[0] + norm.eps) - norm.eps
    norm.weight.data[1], norm.bias.data[1] = 2 * norm.weight.data[0], 2 * norm.bias.data[0]
    norm.weight.data[4], norm.bias.data[4] = 0.5 * norm.weight.data[0], 0.5 * norm.bias.data[0]
    built = assembler(model, fit, (np.array([8.0, 0, 7, 6, 1, 5, 4, 3]), np.ones(6)), damping=1e-6)
    cut = CompressionPolicy((6, 6), (32,) * 3, (32,) * 3)
    network, plain = built.assemble(cut), replace(built, recoveries=[]).assemble(cut)
    images = torch.randn(4, 3, 8, 8)
    assert not torch.allclose(plain(images), model(images), atol=1e-2)
    assert torch.allclose(network(images), model(images), atol=2e-3 if fit == "moments" else 1e-4)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("make", [chain, Residual], ids=["chain", "residual"])
def test_networks_are_changed_in_weights_and_statistics_only(make, bits, fit):
    torch.manual_seed(0)
    model = with_statistics(make())
    before = copy.deepcopy(model.state_dict())
    built = assembler(model, fit)
    assert built.calibration is None and built.images is None
    networks = [replace(built, cache=type(built.cache)()).assemble(policy(built.graph, bits=bits)) for _ in range(2)]
    plain = replace(built, recoveries=[]).assemble(policy(built.graph, bits=bits))
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(networks[0](images), networks[1](images)) and networks[0](images).isfinite().all()
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert {name: tensor.shape for name, tensor in networks[0].state_dict().items()} == shapes
    assert not torch.allclose(networks[0](images), plain(images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (bits == 4) == hasattr(dict(networks[0].named_modules())[built.graph.geometry.layers[-1].name], "weight_codes")


@pytest.mark.parametrize("fit", FITS)
def test_nothing_removed_means_nothing_changed(fit):
    model = with_statistics(Residual())
    built, images = assembler(model, fit), torch.randn(4, 3, 8, 8)
    assert torch.equal(built.assemble(policy(built.graph, 1.0))(images), model(images))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("bits", [32, 4])
def test_network_without_batch_norm_is_left_exactly(fit, bits):
    torch.manual_seed(0)
    built, images = assembler(Plain().eval(), fit), torch.randn(4, 3, 8, 8)
    cut = policy(built.graph, bits=bits)
    assert torch.equal(built.assemble(cut)(images), replace(built, recoveries=[]).assemble(cut)(images))


@pytest.mark.parametrize("fit", FITS)
def test_depthwise_layer_keeps_its_weight(fit):
    built = assembler(with_statistics(Residual()), fit)
    network = built.assemble(policy(built.graph))
    plain = replace(built, recoveries=[]).assemble(policy(built.graph))
    assert torch.equal(network.depthwise.weight, plain.depthwise.weight)
    assert not torch.equal(network.project.weight, plain.project.weight)


def test_producers_of_a_stream_are_stacked_and_depthwise_filters_multiply():
    built = assembler(with_statistics(Residual()))
    candidate, model = built.candidate(policy(built.graph, 1.0)), built.model
    stream, inner = (next(g for g in built.graph.groups if g.name == name) for name in ("stem", "expand"))
    assert [name for name, _ in normed_producers(candidate, stream)] == ["stem", "branch"]
    a, b = filters(model.stem, model.stem_norm), filters(model.branch, model.branch_norm)
    expected = sum(f.rows @ f.rows.T for f in (a, b))
    assert torch.allclose(filter_gram(candidate, stream, 0.0), expected)
    a, b = filters(model.expand, model.expand_norm), filters(model.depthwise, model.depthwise_norm)
    joint = torch.einsum("ua,ub->uab", a.rows, b.rows).flatten(1)
    assert torch.allclose(filter_gram(candidate, inner, 0.0), joint @ joint.T)


def test_flattened_and_concatenated_channels_are_taken_over_at_every_position():
    model = chain()
    for fit in FITS:
        built = assembler(model, fit, (np.ones(8), np.array([3.0, 2, 1, 0.5, 0.4, 0.3])), statistics=False)
        network = built.assemble(CompressionPolicy((8, 4), (32,) * 3, (32,) * 3))
        change = (network[7].weight - model[7].weight[:, : 4 * 16]).view(4, 4, 16)
        removed = model[7].weight[:, 4 * 16 :].view(4, 2, 16)
        coefficients = torch.linalg.lstsq(removed.transpose(1, 2).flatten(0, 1), change.transpose(1, 2).flatten(0, 1)).solution
        assert coefficients.abs().max() > 1e-3
        assert torch.allclose(torch.einsum("orp,rk->okp", removed, coefficients), change, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- moments


def test_moments_of_rectified_and_summed_channels_agree_with_samples():
    """The input is white, as assumed; the first layer's batch norm has the true statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.Flatten())
    model = with_statistics(nn.Sequential(*model, nn.Linear(5 * 64, 2)))
    noise = torch.randn(400, 3, 8, 8)
    y = model[0](noise).detach()
    model[1].running_mean, model[1].running_var = y.mean((0, 2, 3)), y.var((0, 2, 3))
    graph = analyze(model, (noise[:1],))
    moments = input_moments(model, graph, 0.0)["3"]
    x = model[2](model[1](y)).transpose(0, 1).flatten(1).detach()
    assert torch.allclose(moments.mean, x.mean(1), atol=0.02)
    assert torch.allclose(moments.covariance, torch.cov(x), atol=0.03)
    mean, variance = output_moments(model[3], model[3].weight, moments, 0.0)
    z = model[3](model[2](model[1](y))).transpose(0, 1).flatten(1).detach()
    assert torch.allclose(mean + model[3].bias, z.mean(1), atol=0.05)
    assert torch.allclose(variance, z.var(1), rtol=0.05)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_output_moments_of_grouped_convolutions(groups):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, 3, groups=groups, dilation=2, bias=False)
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), layer, nn.Flatten(), nn.Linear(192, 2)))
    moments = input_moments(model, analyze(model, (torch.zeros(1, 3, 8, 8),)), 0.6)["2"]
    # The dense definition: a weight with zeros between the groups, and C x S entry by entry.
    weight, per_group = torch.zeros(12, 6, 9), 6 // groups
    for output in range(12):
        first = output // (12 // groups) * per_group
        weight[output, first : first + per_group] = layer.weight[output].detach().flatten(1)
    at = torch.tensor([(2.0 * i, 2.0 * j) for i in range(3) for j in range(3)])
    spatial = 0.6 ** (at[:, None] - at).abs().sum(2)
    expected = torch.einsum("oip,ij,pq,ojq->o", weight, moments.covariance, spatial, weight)
    mean, variance = output_moments(layer, layer.weight, moments, 0.6)
    assert torch.allclose(variance, expected, rtol=1e-4)
    assert torch.allclose(mean, torch.einsum("oip,i->o", weight, moments.mean), atol=1e-5)
    # As calibration would give it: the same mean and variance of the outputs.
    statistics = synthetic_statistics(layer, moments, 0.6)
    rows = layer.weight.detach().view(groups, -1, per_group * 9)
    second = torch.tensor(statistics.moments[:, :-1, :-1])
    assert torch.allclose((rows @ second * rows).sum(2).flatten(), variance + mean.square(), rtol=1e-4)
    assert np.allclose(statistics.mean()[:, ::9].ravel(), moments.mean)


@pytest.mark.parametrize("case", ["pruned", "quantized"])
def test_statistics_are_restated_to_what_samples_say(case):
    """Behind white rectified inputs the batch norm gets nearly the statistics that it would measure."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
    model = with_statistics(nn.Sequential(*model, nn.Flatten(), nn.Linear(8 * 64, 2)))
    noise = torch.randn(400, 3, 8, 8)

    def measure(network):
        for norm in (1, 4):
            y = network[:norm](noise).detach()
            network[norm].running_mean, network[norm].running_var = y.mean((0, 2, 3)), y.var((0, 2, 3))
        return network

    built = assembler(measure(model), spatial_correlation=0.0)
    chosen = CompressionPolicy((16, 8), (32, 2, 32), (32,) * 3) if case == "quantized" else policy(built.graph)
    network, plain = built.assemble(chosen), replace(built, recoveries=[]).assemble(chosen)

    def misses(network):
        true = measure(copy.deepcopy(network))
        deviation = true[4].running_var.sqrt()
        mean = (network[4].running_mean - true[4].running_mean) / deviation
        return float(mean.abs().mean()), float((network[4].running_var / true[4].running_var).log().abs().mean())

    for restated, left in zip(misses(network), misses(plain), strict=True):
        assert restated < 0.2 * left


def test_kept_moments_follow_the_slices():
    built = assembler(with_statistics(Residual()))
    candidate = built.candidate(policy(built.graph))
    moments = input_moments(built.model, built.graph, 0.5)
    (index,) = (i for i, g in enumerate(built.graph.groups) if g.name == "expand")
    for name in ("depthwise", "project"):
        kept = kept_moments(candidate, name, moments[name])
        assert torch.equal(kept.mean, moments[name].mean[candidate.kept[index]])
    assert set(moments) == {"branch", "expand", "depthwise", "project", "side", "grouped", "last", "head"}


class NeedsStatistics(Uniform):
    """Refuses to round a layer of whose input nothing is known."""

    needs_images = True
    seen: list = []

    def quantize_weight(self, weight, bits, statistics=None):
        self.seen.append(None if statistics is None else (statistics.moments.shape, tuple(weight.shape)))
        return super().quantize_weight(weight, bits)


def test_quantizers_get_the_statistics_of_the_moments():
    built = replace(assembler(chain()), quantizer=NeedsStatistics())
    NeedsStatistics.seen.clear()
    built.assemble(policy(built.graph, bits=4))
    # The image is unknown; then 4 kept channels x 9 positions, and 3 channels of 16 entries.
    assert NeedsStatistics.seen == [None, ((1, 37, 37), (3, 4, 3, 3)), ((1, 49, 49), (4, 48))]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fit": "exact"}, "fit"),
        ({"alpha1": -1.0}, "alpha1"),
        ({"alpha2": float("nan")}, "alpha2"),
        ({"damping": 0.0}, "damping"),
        ({"spatial_correlation": 1.0}, "spatial_correlation"),
    ],
)
def test_options_out_of_range_are_input_errors(options, named):
    with pytest.raises(InputError, match=f"`{named}` of the recovery `data_free`"):
        DataFreeConfig(**options)
