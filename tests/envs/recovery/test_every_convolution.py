"""Slicing, refits and rounding of networks with every kind of convolution: 1-d, 2-d, 3-d, and transposed."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from secateur.envs.assembler import Assembler
from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.core import CompressionPolicy
from secateur.envs.model_graph import analyze
from secateur.envs.model_graph.folding import fold_batch_norms
from secateur.envs.pruning.importance import IMPORTANCES
from secateur.envs.pruning.importance.core import DenseModel
from secateur.envs.quantization.fake_quantize import quantized_weight
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.quantization.quantizers.uniform import Uniform
from secateur.envs.recovery import RECOVERIES
from secateur.envs.recovery.least_squares import LeastSquares, LeastSquaresConfig
from secateur.envs.recovery.sequential import Sequential, SequentialConfig

KINDS = ["conv1d", "conv2d", "conv3d", "transposed1d", "transposed2d", "transposed3d"]
SIZES = (6, 5, 4)
UNITS = 12


class Network(nn.Module):
    """A convolution whose channels 1 and 3 are twice channels 0 and 2, and a reader of the kind with those that follow."""

    def __init__(self, kind):
        super().__init__()
        rank = int(kind[-2])
        convolution, norm, pool = (getattr(nn, f"{name}{rank}d") for name in ("Conv", "BatchNorm", "AdaptiveAvgPool"))
        reader = getattr(nn, f"ConvTranspose{rank}d") if "transposed" in kind else convolution
        self.first, self.first_norm = convolution(3, UNITS, 3, padding=1), norm(UNITS)
        self.reader, self.reader_norm = reader(UNITS, 8, 3, stride=2, padding=1, bias=False), norm(8)
        self.last, self.pool, self.head = (
            convolution(8, 8, 3, padding=1, groups=2, padding_mode="replicate"),
            pool(1),
            nn.Linear(8, 5),
        )

    def forward(self, x):
        x = self.first_norm(self.first(x)).relu()
        x = self.reader_norm(self.reader(x)).relu()
        return self.head(self.pool(self.last(x).relu()).flatten(1))


class Problem:
    def __init__(self, kind):
        torch.manual_seed(0)
        self.model, self.images = Network(kind), torch.randn(80, 3, *SIZES[: int(kind[-2])])
        model = self.model
        for norm in (model.first_norm, model.reader_norm):
            norm.momentum = None  # one pass in training mode gives the statistics
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
        for tensor, factor in zip((*model.first.parameters(), *model.first_norm.parameters()), (1, 1, 2, 2), strict=True):
            tensor.data[[1, 3]] = factor * tensor.data[[0, 2]]
        with torch.no_grad():
            model.train()(self.images)
        model.eval()
        self.graph = analyze(model, (self.images[:1],))
        self.names = [group.name for group in self.graph.groups]
        self.layers = [layer.name for layer in self.graph.geometry.layers]

    @cache  # noqa: B019  # there are six problems
    def calibration(self, **options):
        return calibrate(self.model, self.graph, self.images, CalibrationConfig(positions=1000, **options))

    def assemble(self, *recoveries, bits=(32, 32), quantizer=None, removed=2, **calibration):
        """Return the network without the `removed` channels of `first` that are combinations of others."""
        scores = [np.ones(group.units) for group in self.graph.groups]
        scores[self.names.index("first")][[1, 3]] = 0
        widths = tuple(group.units - (removed if group.name == "first" else 0) for group in self.graph.groups)
        quantizable = [layer.quantizable for layer in self.graph.geometry.layers]
        chosen = [tuple(width if allowed else 32 for allowed in quantizable) for width in bits]
        assembler = Assembler(
            self.model,
            self.graph,
            tuple(scores),
            quantizer or Uniform(),
            recoveries,
            self.calibration(**calibration),
            self.images,
        )
        return assembler.assemble(CompressionPolicy(widths, *chosen))

    @torch.no_grad()
    def error(self, network):
        """Return the mean squared difference of the outputs, relative to their variance over the images."""
        dense = self.model(self.images)
        return float((network(self.images) - dense).square().mean() / dense.var(0).mean())


_PROBLEMS = {}


@pytest.fixture(params=KINDS)
def problem(request):
    if request.param not in _PROBLEMS:
        _PROBLEMS[request.param] = Problem(request.param)
    return _PROBLEMS[request.param]


def test_every_layer_is_calibrated_and_every_convolution_that_is_not_transposed_can_be_quantized(problem):
    assert [layer.kind for layer in problem.calibration().layers.values()] == ["full"] * 4
    transposed = isinstance(problem.model.reader, nn.modules.conv._ConvTransposeNd)
    assert [layer.name for layer in problem.graph.geometry.layers if not layer.quantizable] == ["reader"] * transposed
    assert dict(problem.graph.batch_norms) == {"first": "first_norm", "reader": "reader_norm"}


@torch.no_grad()
def test_folded_batch_norms_change_nothing(problem):
    folded = copy.deepcopy(problem.model)
    fold_batch_norms(folded, problem.graph)
    assert isinstance(folded.reader_norm, nn.Identity)
    assert torch.allclose(folded(problem.images), problem.model(problem.images), atol=1e-5)


REFITS = {
    "least_squares": LeastSquares(LeastSquaresConfig(damping=1e-9)),
    "sequential": Sequential(SequentialConfig(damping=1e-7)),
}


@pytest.mark.parametrize("refit", REFITS)
def test_removed_combinations_of_kept_channels_are_restored(refit, problem):
    assert problem.error(problem.assemble()) > 1e-3
    assert problem.error(problem.assemble(REFITS[refit])) < 1e-5


def test_with_moments_of_channels_they_are_restored_too(problem):
    """Twice another channel is so at every pixel."""
    limit = 4 * (UNITS + 1) ** 2
    assert problem.calibration(max_matrix_bytes=limit).layers["reader"].kind == "channel"
    assert problem.error(problem.assemble(REFITS["least_squares"], max_matrix_bytes=limit)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("limit", [4 * (UNITS + 1) ** 2, 4 * UNITS])
def test_without_full_moments_the_mean_output_is_restored(limit, problem):
    """For an image of the mean channels, away from its borders."""
    model, refit = problem.model, LeastSquares(LeastSquaresConfig(damping=1e6))  # weights stay, the intercept is free
    network, rank = problem.assemble(refit, max_matrix_bytes=limit), len(model.reader.kernel_size)
    means = problem.calibration(max_matrix_bytes=limit).layers["reader"].mean()[0, :: 3**rank]
    image = torch.tensor(means).view(1, -1, *[1] * rank).expand(1, -1, *[12] * rank)
    kept = [unit for unit in range(UNITS) if unit not in (1, 3)]
    inside = (slice(None), slice(None), *[slice(4, 8) if "Transpose" in type(model.reader).__name__ else slice(2, 4)] * rank)
    expected = model.reader_norm(model.reader(image))[inside].flatten(2).mean(2)
    found = network.reader_norm(network.reader(image[:, kept]))[inside].flatten(2).mean(2)
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("name", sorted(RECOVERIES))
def test_no_recovery_makes_it_worse(name, problem):
    config, recovery = RECOVERIES[name]
    bare = problem.error(problem.assemble(bits=(8, 32)))
    assert problem.error(problem.assemble(recovery(config()), bits=(8, 32))) < 1.5 * bare


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_quantized_weights_are_near_the_weights(name, problem):
    config, quantizer = QUANTIZERS[name]
    network = problem.assemble(bits=(8, 8), quantizer=quantizer(config()), removed=0)
    for layer in problem.graph.geometry.layers:
        module, dense = network.get_submodule(layer.name), problem.model.get_submodule(layer.name).weight
        assert (quantized_weight(module) is not None) is layer.quantizable
        if layer.quantizable and name != "power_of_two":
            largest = dense.abs().flatten(1).amax(1).view(-1, *[1] * (dense.dim() - 1))
            assert ((module.weight - dense).abs() <= 0.03 * largest).all()
    assert name == "power_of_two" or problem.error(network) < 0.1


@pytest.mark.parametrize("name", sorted(IMPORTANCES))
def test_every_importance_ranks_every_group(name, problem):
    config, importance = IMPORTANCES[name]
    labels = torch.arange(len(problem.images)) % 5
    dense = DenseModel(problem.model, problem.graph, problem.calibration(), problem.images, labels, np.random.default_rng(0))
    for group, scores in zip(problem.graph.groups, importance(config()).scores(dense), strict=True):
        assert scores.shape == (group.units,) and np.isfinite(scores).all()


def test_removal_with_refits_takes_the_combinations_first(problem):
    config, importance = IMPORTANCES["second_order"]
    dense = DenseModel(problem.model, problem.graph, problem.calibration(), None, None, np.random.default_rng(0))
    scores = importance(config()).scores(dense)[problem.names.index("first")]
    assert {frozenset(pair) & set(np.argsort(scores)[:2]) for pair in ((0, 1), (2, 3))} != {frozenset()}
    assert set(np.argsort(scores)[:2]) <= {0, 1, 2, 3}
