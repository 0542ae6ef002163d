"""Group norms: whole groups are units, and their statistics stay the same when other groups are removed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.model_graph import analyze
from secateur.envs.pruning.slicing import masked_model, resize_model, set_written_sizes, slice_model, written_sizes

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Pre-activation blocks with group norms, as in ResNetV2 with group norm."""

    def __init__(self, outer=4, inner=3, affine=True):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12, 5)
        self.norm1, self.conv1 = nn.GroupNorm(outer, 12, affine=affine), nn.Conv2d(12, 9, 1, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(inner, 9, affine=affine), nn.Conv2d(9, 12, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(6, 12)
        for norm in (self.norm1, self.norm2, self.norm):
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.stem(x)
        y = self.conv1(F.relu(self.norm1(x)))
        x = x + self.conv2(F.relu(self.norm2(y)))
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


@pytest.mark.parametrize("affine", [True, False])
def test_whole_groups_are_units(affine):
    torch.manual_seed(0)
    model = Residual(outer=12, affine=affine).eval()
    graph = analyze(model, (IMAGES,))
    assert [(group.name, group.units) for group in graph.groups] == [("stem", 6), ("conv1", 3)]
    for kept in ([np.array([0, 2, 5]), np.array([1])], [np.array([4]), np.array([0, 2])]):
        sliced = slice_model(model, graph, kept)
        torch.testing.assert_close(sliced(IMAGES), masked_model(model, graph, kept)(IMAGES), rtol=1e-4, atol=1e-5)
        assert (sliced.norm1.num_groups, sliced.norm1.num_channels) == (2 * len(kept[0]), 2 * len(kept[0]))
        assert (sliced.norm2.num_groups, sliced.norm2.num_channels) == (len(kept[1]), 3 * len(kept[1]))
        rebuilt = Residual(outer=12, affine=affine).eval()
        set_written_sizes(rebuilt, written_sizes(sliced, graph))
        assert torch.equal(resize_model(rebuilt, sliced.state_dict())(IMAGES), sliced(IMAGES))


def test_norms_with_groups_of_several_sizes_share_the_units_that_suit_all():
    graph = analyze(Residual(outer=4).eval(), (IMAGES,))
    assert [(group.name, group.units) for group in graph.groups] == [("stem", 2), ("conv1", 3)]


def test_one_group_is_frozen():
    graph = analyze(Residual(inner=1).eval(), (IMAGES,))
    assert {f.layer: f.reason for f in graph.frozen}["conv1"] == "group_norm takes statistics over channels"


def test_attributes_of_norms_without_tensors_change_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
            self.group, self.instance = nn.GroupNorm(4, 8, affine=False), nn.InstanceNorm2d(8)

        def forward(self, x):
            x = self.group(self.first(x)) + self.group(self.second(x))
            return self.head(F.relu(self.instance(x)).mean((2, 3)))

    model = Twice().eval()
    graph = analyze(model, (IMAGES,))
    sliced = slice_model(model, graph, [np.array([1, 3])])
    found = (sliced.group.num_groups, sliced.group.num_channels, sliced.instance.num_features)
    assert found == (2, 4, 4)
