"""A layer's outputs are its weight times its patches, for every kind of convolution, and so are the moments of its inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.calibration.core import FULL
from secateur.envs.calibration.patches import is_plain, is_product, num_positions, outputs_at, patches
from secateur.envs.model_graph import analyze
from secateur.envs.weight_layout import as_stored, kernel_use, outputs_first

SIZES = (7, 6, 5)
CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
    {"kernel_size": 2, "dilation": 2, "padding": 1, "stride": 3, "groups": 4},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "bias": False},
    *({"kernel_size": 3, "stride": 2, "padding": 2, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular", "groups": 2},
]
TRANSPOSED = [
    {"kernel_size": 3},
    {"kernel_size": 2, "stride": 2, "groups": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 4},
    {"kernel_size": 3, "stride": 3, "dilation": 2, "padding": 2, "bias": False},
]
KINDS = [
    *((f"Conv{rank}d", options) for rank in (1, 2, 3) for options in CONVOLUTIONS),
    *((f"ConvTranspose{rank}d", options) for rank in (1, 2, 3) for options in TRANSPOSED),
]
every_kind = pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda value: str(value).replace(" ", ""))
even_kernel = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def layer_and_input(kind, options, images=3):
    torch.manual_seed(0)
    return getattr(nn, kind)(4, 8, **options), torch.randn(images, 4, *SIZES[: int(kind[-2])])


def product(layer, x, positions, size=None):
    """Return weight times patches plus bias, (images, positions, outputs)."""
    rows = patches(layer, x, positions, size)
    weight = outputs_first(layer).reshape(layer.groups, 8 // layer.groups, -1)
    bias = 0 if layer.bias is None else layer.bias.detach()
    return torch.einsum("npgi,goi->npgo", rows, weight).flatten(2) + bias


@even_kernel
@every_kind
@torch.no_grad()
def test_outputs_are_weight_times_patches(kind, options):
    layer, x = layer_and_input(kind, options)
    y = layer(x)
    count = num_positions(layer, x)
    assert is_product(layer) and count == y[0, 0].numel()
    some = torch.randperm(count)[:7]
    for positions in (torch.arange(count), some):
        assert torch.allclose(product(layer, x, positions), outputs_at(layer, y, positions), atol=1e-5)


@every_kind
def test_the_layout_of_a_weight_is_reversible(kind, options):
    layer, _ = layer_and_input(kind, options)
    weight = outputs_first(layer)
    assert weight.shape[:2] == (8, 4 // layer.groups) and torch.equal(as_stored(layer, weight), layer.weight)


@torch.no_grad()
def test_the_caller_may_choose_the_size_of_a_transposed_output():
    layer, x = layer_and_input("ConvTranspose2d", {"kernel_size": 3, "stride": 2})
    y = layer(x, output_size=[16, 14])
    positions = torch.arange(16 * 14)
    assert torch.allclose(product(layer, x, positions, (16, 14)), outputs_at(layer, y, positions), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_each_output_of_a_transposed_convolution_reads_a_share_of_the_kernel(rank):
    layer, x = layer_and_input(f"ConvTranspose{rank}d", {"kernel_size": 4, "stride": 2, "padding": 1})
    rows = patches(layer, torch.ones_like(x), torch.arange(num_positions(layer, x)), None)
    inside = rows.amax((0, 1))  # away from the borders, all outputs read as many kernel positions
    assert inside.eq(1).all() and rows.sum(3).max() == pytest.approx(kernel_use(layer) * 4 * 4**rank)


class Doubled(nn.ConvTranspose1d):
    def forward(self, x, output_size=None):
        return super().forward(x, output_size) * 2


def test_other_forward_passes_are_no_products():
    assert not is_product(Doubled(4, 4, 3)) and not is_product(nn.ReLU()) and not is_product(None)
    assert is_plain(nn.Conv3d(4, 4, 3)) and not is_plain(nn.ConvTranspose3d(4, 4, 3))


@even_kernel
@every_kind
def test_calibrated_moments_are_those_of_the_patches(kind, options):
    layer, x = layer_and_input(kind, options, images=5)
    network = nn.Sequential(layer).eval()
    found = calibrate(network, analyze(network, (x[:1],)), x, CalibrationConfig(positions=10_000, batch_size=2)).layers["0"]
    rows = patches(layer, x, torch.arange(num_positions(layer, x))).flatten(0, 1).transpose(0, 1).double()
    rows = torch.cat([rows, torch.ones(*rows.shape[:2], 1)], 2)
    assert found.kind == FULL and found.channels == 4 // layer.groups and found.count == rows.shape[1]
    assert np.allclose(found.moments, (rows.mT @ rows / rows.shape[1]).numpy(), rtol=1e-4, atol=1e-5)
