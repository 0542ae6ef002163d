"""Numbers of channels that modules store and use in their forward pass: they change with the plan, or the channels are frozen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.cost_models.core import InputError
from secateur.envs.model_graph import analyze
from secateur.envs.pruning.slicing import masked_model, resize_model, set_written_sizes, slice_model, written_sizes


class ScaleBlock(nn.Module):
    """Hierarchical residual, as in Res2Net."""

    def __init__(self, channels=12, width=6, scale=3):
        super().__init__()
        self.width, self.scale = width, scale
        self.enter, self.leave = nn.Conv2d(channels, width * scale, 1), nn.Conv2d(width * scale, channels, 1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(scale - 1))

    def forward(self, x):
        parts = torch.split(F.relu(self.enter(x)), self.width, 1)
        done = [parts[-1]]
        for conv, part in zip(self.convs, parts, strict=False):
            done.append(F.relu(conv(part if len(done) == 1 else part + done[-1])))
        return F.relu(x + self.leave(torch.cat(done, 1)))


class CrossStage(nn.Module):
    """Half of the channels passes by, as in CSPDarknet."""

    def __init__(self, channels=12, expanded=16):
        super().__init__()
        self.expand_chs, half = expanded, expanded // 2
        self.expand, self.inner = nn.Conv2d(channels, expanded, 1), nn.Conv2d(half, half, 3, padding=1)
        self.leave = nn.Conv2d(expanded, channels, 1)

    def forward(self, x):
        aside, x = self.expand(x).split(self.expand_chs // 2, dim=1)
        return self.leave(torch.cat([aside, x + self.inner(x)], 1))


class SelectivePaths(nn.Module):
    """Each path reads a part of the input, as in SKNet with a split input."""

    def __init__(self, channels=12, num_paths=2):
        super().__init__()
        self.in_channels, self.num_paths, part = channels, num_paths, channels // num_paths
        self.paths = nn.ModuleList(nn.Conv2d(part, channels, 3, padding=d, dilation=d) for d in (1, 2))
        self.select = nn.Conv2d(channels, channels * num_paths, 1)

    def forward(self, x):
        parts = torch.split(x, self.in_channels // self.num_paths, 1)
        x = torch.stack([path(part) for path, part in zip(self.paths, parts, strict=True)], 1)
        gates = self.select(x.sum(1).mean((2, 3), keepdim=True))
        batch, channels, height, width = gates.shape
        gates = gates.view(batch, self.num_paths, channels // self.num_paths, height, width).softmax(1)
        return (x * gates).sum(1)


class PartialConv(nn.Module):
    """A quarter of the channels is convolved, as in FasterNet."""

    def __init__(self, channels=12):
        super().__init__()
        self.convolved, self.untouched = channels // 4, channels - channels // 4
        self.conv = nn.Conv2d(self.convolved, self.convolved, 3, padding=1)

    def forward(self, x):
        left, right = torch.split(x, [self.convolved, self.untouched], dim=1)
        return x + torch.cat([self.conv(left), right], 1)


class MixedConv(nn.Module):
    """Each part of the channels has its own kernel, as in MixNet and InceptionNeXt."""

    def __init__(self, parts=(6, 4, 2)):
        super().__init__()
        self.splits = parts
        kernels = (1, 3, 5)
        self.convs = nn.ModuleList(nn.Conv2d(n, n, k, padding=k // 2, groups=n) for n, k in zip(parts, kernels, strict=True))

    def forward(self, x):
        parts = torch.split(x, self.splits, 1)
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], 1)


class FixedView(nn.Module):
    """The number is a constant of the code."""

    def __init__(self, channels=12):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.conv(x).view(-1, 12, *x.shape[2:])


class TwoViews(nn.Module):
    """Both numbers of a view are equal; only one of them is a number of channels that can be removed."""

    def __init__(self, channels=12):
        super().__init__()
        self.conv, self.leave = nn.Conv2d(channels, 9, 1), nn.Conv2d(9, channels, 1)

    def forward(self, x):
        batch, _, height, width = x.shape
        x = self.conv(x).reshape(batch, 3, 3, height, width)
        x = x - x.mean(2, keepdim=True)
        return self.leave(x.reshape(batch, 9, height, width))


def network(block):
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)).eval()


BLOCKS = {
    ScaleBlock: {"2.enter": ("width", 1, None)},
    CrossStage: {"2.expand": ("expand_chs", 2, None)},
    SelectivePaths: {"0": ("in_channels", 2, None)},
    PartialConv: {"0": ("convolved", 1, None), "0#2": ("untouched", 1, None)},
    MixedConv: {"0": ("splits", 1, 0), "0#2": ("splits", 1, 1), "0#3": ("splits", 1, 2)},
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_stored_numbers_of_channels_change_with_the_plan(block):
    model, images = network(block()), torch.randn(2, 3, 8, 8)
    graph = analyze(model, (images,))
    assert [frozen.layer for frozen in graph.frozen] == ["5"]
    found = {group.name: (size.name, size.per_unit, size.entry) for group in graph.groups for size in group.sizes}
    assert found == BLOCKS[block]
    rng = np.random.default_rng(0)
    for _ in range(3):
        kept = [np.sort(rng.choice(g.units, rng.integers(1, g.units + 1), replace=False)) for g in graph.groups]
        sliced = slice_model(model, graph, kept)
        torch.testing.assert_close(sliced(images), masked_model(model, graph, kept)(images), rtol=1e-4, atol=1e-5)


def test_blocks_that_share_their_channels_change_together():
    model, images = network(nn.Sequential(PartialConv(), PartialConv(), PartialConv())), torch.randn(2, 3, 8, 8)
    graph = analyze(model, (images,))
    found = {group.name: [(size.module, size.name) for size in group.sizes] for group in graph.groups}
    blocks = ["2.0", "2.1", "2.2"]
    assert found == {"0": [(block, "convolved") for block in blocks], "0#2": [(block, "untouched") for block in blocks]}
    kept = [np.array([1]), np.array([0, 4, 8])]
    sliced = slice_model(model, graph, kept)
    torch.testing.assert_close(sliced(images), masked_model(model, graph, kept)(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("block", "expected"), [(ScaleBlock, {"2.width": 3}), (MixedConv, {"2.splits": [3, 2, 1]})])
def test_a_sliced_model_is_rebuilt_from_its_tensors_and_sizes(block, expected):
    model, images = network(block()), torch.randn(2, 3, 8, 8)
    graph = analyze(model, (images,))
    kept = [np.arange(g.units // 2) for g in graph.groups]
    sliced = slice_model(model, graph, kept)
    sizes = written_sizes(sliced, graph)
    assert sizes == expected
    rebuilt = network(block())
    set_written_sizes(rebuilt, sizes)
    assert torch.equal(resize_model(rebuilt, sliced.state_dict())(images), sliced(images))


@pytest.mark.parametrize("sizes", [{"2.widths": 3}, {"9.width": 3}, {"2.width": "3"}, {"2.width": [3]}, {"2.training": 1}])
def test_sizes_of_another_architecture_are_refused(sizes):
    with pytest.raises(InputError, match="has no attribute `"):
        set_written_sizes(network(ScaleBlock()), sizes)


def test_parts_of_different_sizes_that_are_one_group_are_frozen():
    class Halves(nn.Module):
        def forward(self, x):
            return torch.cat([*x.split([4, x.shape[1] - 4], 1)], 1)

    graph = analyze(network(Halves()), (torch.zeros(1, 3, 8, 8),))
    assert {frozen.layer: frozen.reason for frozen in graph.frozen}[
        "0"
    ] == "a split at constant sizes has its units in different parts"


def test_numbers_in_the_code_still_freeze_their_channels():
    class Cut(FixedView):
        def forward(self, x):
            return torch.split(self.conv(x), [12], 1)[0]

    graph = analyze(network(Cut()), (torch.zeros(1, 3, 8, 8),))
    assert {frozen.layer: frozen.reason for frozen in graph.frozen}["2.conv"].startswith("cannot be removed: split_with_sizes")


def test_numbers_in_views_change_with_the_plan():
    model, images = network(nn.Sequential(FixedView(), TwoViews())), torch.randn(2, 3, 8, 8)
    graph = analyze(model, (images,))
    assert [(group.name, len(group.views)) for group in graph.groups] == [
        ("0", 0),
        ("2.0.conv", 1),
        ("2.1.conv", 2),
        ("2.1.leave", 0),
    ]
    rng = np.random.default_rng(0)
    for _ in range(4):
        kept = [np.sort(rng.choice(g.units, rng.integers(1, g.units + 1), replace=False)) for g in graph.groups]
        sliced = slice_model(model, graph, kept)
        torch.testing.assert_close(sliced(images), masked_model(model, graph, kept)(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="channels"):
        sliced[2][0](torch.zeros(2, 3, 8, 8))
    assert torch.zeros(2, 9, 5).view(2, 3, 3, 5).shape == (2, 3, 3, 5), "nothing changes after an error"
