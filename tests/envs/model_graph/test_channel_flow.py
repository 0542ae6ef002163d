"""Rules of single operators: which channels become one class, and what is frozen for which reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.cost_models.core import InputError
from secateur.envs.model_graph import analyze
from secateur.envs.model_graph.identities import Identities
from secateur.envs.model_graph.trace import root_cause


class Between(nn.Module):
    """conv -> any function of the activation -> global pool -> linear."""

    def __init__(self, function, channels=8, features=8):
        super().__init__()
        self.conv, self.second, self.function = nn.Conv2d(3, channels, 3), nn.Conv2d(3, channels, 3), function
        self.head = nn.Linear(features, 5)

    def forward(self, x):
        return self.head(self.function(self.conv(x), self.second(x)).flatten(1))


def pooled(x):
    return x.mean((2, 3))


def frozen_reasons(function, verify=False, **sizes):
    graph = analyze(Between(function, **sizes), (torch.randn(1, 3, 10, 10),), verify=verify)
    return graph, {f.layer: f.reason for f in graph.frozen if f.layer != "head"}


def test_merging_is_transitive_and_keeps_other_classes_apart():
    ids = Identities({"a": (6,), "b": (3,)})
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 9, (2, 200))
    ids.merge(left[left % 2 == right % 2], right[left % 2 == right % 2])
    assert len(set(ids.find(np.arange(9)).tolist())) == 2
    ids.merge(np.array([0, -1]), np.array([1, -1]))
    assert len(set(ids.find(np.arange(9)).tolist())) == 1


def test_a_constant_freezes_the_whole_class():
    ids = Identities({"a": (4,)})
    ids.merge(np.array([ids.constant("zeros")]), np.array([2]))
    ids.merge(np.array([2]), np.array([3]))
    assert ids.reasons() == {2: "meets zeros"}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda a, b: pooled(torch.softmax(a, 1)), "softmax runs over channels"),
        (lambda a, b: (a.flatten(2) @ b.flatten(2).transpose(1, 2)).mean(2), "enters matmul"),
        (lambda a, b: pooled(torch.linalg.qr(a).Q), "enters linalg_qr"),
        (lambda a, b: pooled(F.group_norm(a, 2)), "group_norm takes statistics over channels"),
        (lambda a, b: pooled(a - a.mean(1, keepdim=True)), "enters mean"),
        (lambda a, b: pooled(a * torch.arange(8.0).view(1, 8, 1, 1)), "meets"),
        (lambda a, b: pooled(torch.cat([a[:, :5], b[:, 5:]], 1)), "slice picks channels at constant positions"),
        (lambda a, b: pooled(a.roll(1, 1)), "roll picks channels at constant positions"),
        (lambda a, b: pooled(torch.cat([*a.split([2, 6], 1)], 1)), "a split at constant sizes has its units"),
        (lambda a, b: pooled(a[:, [1, 0, 2, 3, 4, 5, 6, 7]]), "index picks channels at constant positions"),
        (lambda a, b: torch.einsum("nchw,c->nc", a, torch.ones(8)), "enters einsum"),
    ],
)
def test_what_mixes_channels_is_frozen_with_the_reason(function, reason):
    graph, reasons = frozen_reasons(function)
    assert reason in reasons["conv"]
    assert "conv" not in [name for group in graph.groups for name in group.producers]


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: pooled(a + b),
        lambda a, b: pooled(torch.where(a > 0, a, b)),
        lambda a, b: pooled(F.hardswish(a).mul_(b)),
        lambda a, b: pooled(torch.stack([a, b]).amax(0)),
        lambda a, b: pooled(a.roll(2, 3).flip(2) + F.pad(b[..., 1:], (1, 0))),
        lambda a, b: pooled(a.flatten(2).transpose(1, 2).reshape(a.shape[0], 8, 8, -1).permute(0, 3, 1, 2) + b),
        lambda a, b: pooled(a + b.mean((2, 3), keepdim=True)),
    ],
)
def test_what_meets_is_one_group(function):
    graph, reasons = frozen_reasons(function, verify=True)
    assert [(g.producers, g.consumers, g.units) for g in graph.groups] == [(("conv", "second"), ("head",), 8)]
    assert not reasons


def test_a_single_channel_that_scales_all_others_is_not_coupled_to_them():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.map, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1), nn.Linear(8, 5)

        def forward(self, x):
            x = self.conv(x)
            return self.head(pooled(x * torch.sigmoid(self.map(x))))

    graph = analyze(Attention(), (torch.randn(1, 3, 10, 10),))
    assert [(g.name, g.units) for g in graph.groups] == [("conv", 8)]
    assert {f.layer: f.reason for f in graph.frozen}["map"] == "is broadcast over other channels"


def test_equal_parts_of_the_channel_axis_are_coupled_index_by_index():
    graph, _ = frozen_reasons(lambda a, b: pooled(a[:, :4] + a[:, 4:]), features=4)
    (group,) = (g for g in graph.groups if g.name == "conv")
    positions = {s.tensor: s.positions.tolist() for s in group.slices}
    assert positions["conv.weight"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert positions["head.weight"] == [[0], [1], [2], [3]]


def test_flatten_gives_each_unit_its_positions():
    graph, _ = frozen_reasons(lambda a, b: F.adaptive_avg_pool2d(a, (2, 1)), features=16)
    (group,) = (g for g in graph.groups if g.name == "conv")
    (columns,) = (s for s in group.slices if s.tensor == "head.weight")
    assert (columns.axis, columns.positions.tolist()) == (1, [[2 * u, 2 * u + 1] for u in range(8)])


def test_channels_that_meet_padded_zeros_are_frozen_and_the_others_are_not():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 10, 1), nn.Linear(10, 5)

        def forward(self, x):
            x = self.first(x)
            return self.head(pooled(self.second(x) + F.pad(x, (0, 0, 0, 0, 2, 2))))

    graph = analyze(Padded(), (torch.randn(1, 3, 6, 6),))
    assert [(g.producers, g.units) for g in graph.groups] == [(("first", "second"), 6)]
    (rows,) = (s for s in graph.groups[0].slices if s.tensor == "second.weight" and s.axis == 0)
    assert rows.positions.ravel().tolist() == [2, 3, 4, 5, 6, 7]
    frozen = {(f.layer, f.channels): f.reason for f in graph.frozen}
    assert frozen["second", 4] == "meets zero padding of constant width (pad)"


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda a, b: pooled(a.expand(-1, 8, 8, 8)) + pooled(b), "The expanded size of the tensor (8)"),
        (lambda a, b: pooled(torch.cat([a[:, :4], a[:, 4:]], 1) + b[:, torch.arange(8)]), "meets the result of index"),
        (lambda a, b: pooled(a.split([8], 1)[0] + b), "cannot be removed: split_with_sizes"),
    ],
)
def test_sizes_written_into_the_forward_pass_are_found_by_trying(function, error):
    graph, reasons = frozen_reasons(function, verify=True)
    assert not graph.groups
    assert error in reasons["conv"]


def test_only_the_group_with_the_written_size_is_frozen_by_trying():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad, self.also_good = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 1)
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            x = self.bad(self.good(x))
            x = x.expand(-1, 8, 6, 6)
            return self.head(pooled(self.also_good(x)))

    graph = analyze(Net(), (torch.randn(1, 3, 6, 6),))
    assert [g.name for g in graph.groups] == ["good", "also_good"]
    assert {f.layer: f.reason for f in graph.frozen}["bad"].startswith("cannot be removed: The expanded size")


def test_a_forward_that_fails_is_one_clear_sentence():
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    with pytest.raises(InputError, match=r"forward pass fails on inputs of shape \(1, 3, 10, 10\): .*4 channels"):
        analyze(model, (torch.randn(1, 3, 10, 10),))


def test_a_forward_that_cannot_be_traced_is_one_clear_sentence():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(InputError, match="cannot trace Branching: .*must not depend on the values"):
        analyze(Branching(), (torch.randn(1, 3, 10, 10),))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda a, b: pooled(a.reshape(1, -1, 8, 8) + b), "The size of tensor a"),
        (lambda a, b: pooled(a.reshape(1, -1, 8, 8, 8).mean(1) + b.mean(0)), r"the output has shape \(1, 5\)"),
    ],
)
def test_a_forward_for_single_images_is_one_clear_sentence(function, reason):
    with pytest.raises(InputError, match=f"of Between runs on one image but not on a batch of two: .*{reason}"):
        frozen_reasons(function, verify=True)


def test_messages_have_no_terminal_colors_and_name_the_first_cause():
    try:
        try:
            raise TypeError("\x1b[96mshapes\x1b[0m differ\nfurther lines")
        except TypeError as error:
            raise RuntimeError("step 1 of 3") from error
    except RuntimeError as error:
        assert root_cause(error) == "TypeError: shapes differ"
