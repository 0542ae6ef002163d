"""The U-Net, the super-resolution network and the detector: their channels form groups, and pruned copies run."""

import numpy as np
import pytest
import torch

from secateur.envs.model_graph import analyze
from secateur.envs.pruning.slicing import masked_model, slice_model
from secateur.envs.tasks.core import tensors_of
from secateur.envs.tasks.edsr import edsr
from secateur.envs.tasks.scene_detector import scene_detector
from secateur.envs.tasks.unet import unet

NETWORKS = {
    "unet": (lambda: unet((4, 6, 8)), (1, 32, 32), [(11, 32, 32)]),
    "edsr": (lambda: edsr(blocks=2, width=6), (1, 12, 12), [(1, 24, 24)]),
    "scene_detector": (lambda: scene_detector((4, 6, 8), 6).network, (1, 32, 32), [(80, 10), (80, 4), (80, 1)]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_have_the_shape_of_the_targets(name):
    build, inputs, shapes = NETWORKS[name]
    assert [x.shape for x in tensors_of(build()(torch.zeros(2, *inputs)))] == [(2, *shape) for shape in shapes]


@pytest.mark.parametrize("name", NETWORKS)
def test_only_the_outputs_are_frozen(name):
    build, inputs, _ = NETWORKS[name]
    graph = analyze(build().eval(), (torch.zeros(1, *inputs),))
    assert {frozen.reason for frozen in graph.frozen} == {"model output"}


def test_groups_of_the_residual_network():
    """The shortcuts couple one group; a unit before the pixel shuffle is four channels."""
    graph = analyze(edsr(blocks=2, width=6).eval(), (torch.zeros(1, 1, 12, 12),))
    layers = {tuple(group.producers): group.units for group in graph.groups}
    assert layers == {
        ("head", "body.0.conv2", "body.1.conv2", "body.2"): 6,
        ("body.0.conv1",): 6,
        ("body.1.conv1",): 6,
        ("up.0",): 6,
    }


def test_groups_of_the_detector():
    """The levels of the pyramid are added, and their features go into one head."""
    graph = analyze(NETWORKS["scene_detector"][0]().eval(), (torch.zeros(1, 1, 32, 32),))
    coupled = [set(group.producers) for group in graph.groups if len(group.producers) > 1]
    assert coupled == [{"lateral_coarse", "lateral_fine"}, {"smooth_fine.0", "smooth_coarse.0"}]
    assert [frozen.layer for frozen in graph.frozen] == ["head.classes", "head.distances", "head.centerness"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_network_equals_the_masked_one(name):
    build, inputs, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    graph = analyze(model, (torch.zeros(1, *inputs),))
    kept = [np.arange(1, group.units) for group in graph.groups]
    sliced, masked = slice_model(model, graph, kept), masked_model(model, graph, kept)
    x = torch.rand(2, *inputs)
    with torch.inference_mode():
        found, wanted, dense = (tensors_of(network(x)) for network in (sliced, masked, model))
    for one, other, before in zip(found, wanted, dense, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        assert not torch.allclose(one, before, atol=1e-5)
    assert sum(p.numel() for p in sliced.parameters()) < sum(p.numel() for p in model.parameters())
