"""Recoveries over families of networks: depthwise, concatenation, squeeze-excite, flatten, branches, layer norm, tokens."""

import copy

import pytest
import torch
import torchvision
from torch.nn import functional as F

from secateur.envs.assembler import Assembler
from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.core import CompressionPolicy
from secateur.envs.model_graph import analyze
from secateur.envs.pruning.importance.common.unit_slices import mean_over_producers
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.recovery import RECOVERIES
from tests.envs.small_networks import SMALL_NETWORKS, randomize, small_network

FULL_SIZE = ("densenet121", "googlenet", "vgg16_bn", "convnext_tiny")
"""Wide layers, of which only the moments per channel are kept, and many of them."""


def pictures(count, size, seed=0):
    """Return smooth random images: neighboring pixels have nearly the same values, as in photographs."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 2, size // 2, generator=rng)
    return F.interpolate(coarse, (size, size), mode="bilinear") + 0.3 * torch.randn(count, 3, size, size, generator=rng)


@pytest.fixture(scope="module", params=SMALL_NETWORKS)
def family(request):
    """Model, graph, calibration, its images, and other images."""
    found = small_network(request.param)
    images = pictures(64, found.size)
    calibration = calibrate(found.model, found.graph, images, CalibrationConfig())
    return found.model, found.graph, calibration, images, pictures(32, found.size, seed=1)


@pytest.fixture(scope="module", params=FULL_SIZE)
def full_size_family(request):
    """The same for a network of torchvision; moments of wide layers are kept per channel only."""
    torch.manual_seed(0)
    arguments = {"aux_logits": False, "init_weights": False} if request.param == "googlenet" else {}
    model = randomize(torchvision.models.get_model(request.param, num_classes=5, **arguments))
    images = pictures(24, 32)
    graph = analyze(model, (images[:1],), verify=False)
    calibration = calibrate(model, graph, images, CalibrationConfig(max_matrix_bytes=6_000_000))
    return model, graph, calibration, images, images


def assembled(family, share, bits, *recoveries):
    """Return the family's network with this share of every group that refits can repair, and these bits everywhere."""
    model, graph, calibration, images, _ = family
    scores = tuple(mean_over_producers(model, group, lambda rows: rows.abs().mean(1)) for group in graph.groups)
    plugins = [RECOVERIES[name][1](RECOVERIES[name][0]()) for name in recoveries]
    config, quantizer = QUANTIZERS["uniform"]
    assembler = Assembler(model, graph, scores, quantizer(config()), plugins, calibration, images)
    chosen = tuple(bits if layer.quantizable else 32 for layer in graph.geometry.layers)
    # The functions of attention call their layers' weights themselves: these layers have no modules whose inputs are recorded.
    recorded = {layer.name for layer in graph.geometry.layers if layer.own_weight}
    shares = [share if recorded.issuperset(group.consumers) else 1.0 for group in graph.groups]
    widths = tuple(max(1, round(part * group.units)) for part, group in zip(shares, graph.groups, strict=True))
    return assembler.assemble(CompressionPolicy(widths, chosen, chosen))


@torch.no_grad()
@pytest.mark.parametrize("recovery", ["least_squares", "sequential", "bias_correction"])
def test_nothing_is_repaired_where_nothing_is_lost(family, recovery):
    model, *_, images = family
    expected = model(images)
    found = assembled(family, 1.0, 32, recovery)(images)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@torch.no_grad()
def check_refit(family, recovery, share_of_error):
    """Check that at most this share of the error is left on other images, and that the dense network stays as it was."""
    model, *_, images = family
    before = copy.deepcopy(model.state_dict())
    expected = model(images)
    plain, repaired = (assembled(family, 0.7, 8, *names) for names in ((), (recovery,)))
    assert {name: tensor.shape for name, tensor in plain.named_parameters()}.items() <= {
        name: tensor.shape for name, tensor in repaired.named_parameters()
    }.items()  # a refit may add a bias, and changes no shape
    errors = [float((found(images) - expected).square().mean()) for found in (plain, repaired)]
    assert errors[1] < share_of_error * errors[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.numerics
@pytest.mark.parametrize("recovery", ["least_squares", "sequential"])
def test_refits_bring_pruned_and_quantized_networks_nearer_to_the_dense_one(family, recovery):
    check_refit(family, recovery, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("recovery", ["least_squares", "sequential"])
def test_refits_bring_full_size_networks_nearer_to_the_dense_one(full_size_family, recovery):
    check_refit(full_size_family, recovery, 0.8)
