"""Recoveries over families of networks: depthwise, concatenation, squeeze-excite, flatten, branches, layer norm, tokens."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from secateur.envs.assembler import Assembler
from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.core import CompressionPolicy
from secateur.envs.model_graph import analyze
from secateur.envs.pruning.importance.common.unit_slices import mean_over_producers
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.recovery import RECOVERIES

FAMILIES = (
    "mobilenet_v2",
    "densenet121",
    "efficientnet_b0",
    pytest.param("vgg16_bn", marks=pytest.mark.slow),  # its classifier alone has 120 M weights
    "googlenet",
    pytest.param("convnext_tiny", marks=pytest.mark.slow),
    "vit",
)


def with_statistics(model):
    """Return the model in eval mode with strong weights and random batch norms, as a trained network has them."""
    rng = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=rng)
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=rng)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.3, generator=rng)
    return model.eval()


def network(name):
    """A network of the family with random weights, and the size of its images."""
    torch.manual_seed(0)
    if name == "vit":
        vit = torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5
        )
        nn.init.normal_(vit.heads.head.weight)  # zero in torchvision: every output would be alike
        return vit.eval(), 32
    arguments = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return with_statistics(torchvision.models.get_model(name, num_classes=5, **arguments)), 32 if name == "vgg16_bn" else 64


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Model, graph, calibration and images of a family; moments of wide layers are kept per channel only."""
    model, size = network(request.param)
    images = torch.randn(24, 3, size, size, generator=torch.Generator().manual_seed(1))
    graph = analyze(model, (images[:1],), verify=False)
    return model, graph, calibrate(model, graph, images, CalibrationConfig(max_matrix_bytes=6_000_000)), images


def assembled(family, share, bits, *recoveries):
    """The family's network with this share of every group and these bits everywhere."""
    model, graph, calibration, images = family
    scores = tuple(mean_over_producers(model, group, lambda rows: rows.abs().mean(1)) for group in graph.groups)
    plugins = [RECOVERIES[name][1](RECOVERIES[name][0]()) for name in recoveries]
    config, quantizer = QUANTIZERS["uniform"]
    assembler = Assembler(model, graph, scores, quantizer(config()), plugins, calibration, images)
    layers = graph.geometry.layers
    chosen = tuple(bits if layer.quantizable else 32 for layer in layers)
    widths = tuple(max(1, round(share * group.units)) for group in graph.groups)
    return assembler.assemble(CompressionPolicy(widths, chosen, chosen))


@torch.no_grad()
@pytest.mark.parametrize("recovery", ["least_squares", "sequential", "bias_correction"])
def test_nothing_is_repaired_where_nothing_is_lost(family, recovery):
    model, _, _, images = family
    expected = model(images)
    found = assembled(family, 1.0, 32, recovery)(images)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("recovery", ["least_squares", "sequential"])
def test_refits_bring_pruned_and_quantized_networks_nearer_to_the_dense_one(family, recovery):
    model, _, _, images = family
    before = copy.deepcopy(model.state_dict())
    expected = model(images)
    plain, repaired = (assembled(family, 0.7, 8, *names) for names in ((), (recovery,)))
    assert {name: tensor.shape for name, tensor in plain.named_parameters()}.items() <= {
        name: tensor.shape for name, tensor in repaired.named_parameters()
    }.items()  # a refit may add a bias, and changes no shape
    errors = [(found(images) - expected).square().mean() for found in (plain, repaired)]
    assert errors[1] < errors[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
