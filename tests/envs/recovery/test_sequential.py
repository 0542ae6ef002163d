"""Refits in sequence absorb the error made before them, over every way that layers are joined."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.recovery.common.forward_values import plan_forward
from secateur.envs.recovery.least_squares import LeastSquares
from secateur.envs.recovery.sequential import Sequential, SequentialConfig
from tests.envs.recovery.sequential_cases import (
    INNER,
    Mixed,
    Residual,
    Shortcut,
    error,
    pictures,
    policy,
    problem,
    recovered,
    with_statistics,
)


@pytest.mark.parametrize("make", [Residual, Mixed, Shortcut])
def test_nothing_removed_means_nothing_changed(make):
    torch.manual_seed(0)
    model, images = with_statistics(make()), pictures(20)
    network = recovered(model, images, Sequential(), share=1.0)
    for (name, tensor), same in zip(model.state_dict().items(), network.state_dict().values(), strict=True):
        assert torch.equal(tensor, same), name


@pytest.mark.numerics
@pytest.mark.parametrize(("make", "share"), [(Residual, 0.75), (Mixed, 0.8)])
def test_error_is_smaller_than_that_of_independent_refits(make, share):
    torch.manual_seed(0)
    model, images, others = with_statistics(make()), pictures(500), pictures(200, seed=1)
    none, independent, sequential = (
        error(recovered(model, images, *recoveries, share=share), model, others)
        for recoveries in ((), (LeastSquares(),), (Sequential(),))
    )
    assert sequential < 0.95 * independent and sequential < 0.7 * none


def test_dense_model_and_hooks_are_left_as_they_were(residual):
    model, images, _ = residual
    before = copy.deepcopy(model.state_dict())
    network = recovered(model, images, Sequential(), names=INNER)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    for module in (*model.modules(), *network.modules()):
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_same_result_again_from_the_cache_and_without_it(residual):
    model, images, _ = residual
    assembler = problem(model, images, [pickle.loads(pickle.dumps(Sequential()))])
    half = policy(assembler, names=INNER)
    first, again = assembler.assemble(half), assembler.assemble(half)
    fresh = pickle.loads(pickle.dumps(assembler)).assemble(half)
    for network in (again, fresh):
        assert torch.equal(network(images), first(images))


def test_callers_inference_mode_changes_nothing(residual):
    model, images, _ = residual
    outside = recovered(model, images, Sequential(), names=INNER)
    with torch.inference_mode():
        inside = recovered(model, images, Sequential(), names=INNER)
        assert torch.equal(inside(images), outside(images))


def test_removed_combinations_of_kept_channels_are_restored_exactly():
    """Channel 1 of `a1` is twice channel 0, and channel 3 is channel 2: without them, nothing is lost."""
    torch.manual_seed(0)
    model = with_statistics(Residual())
    for to, source, factor in ((1, 0, 2.0), (3, 2, 1.0)):
        model.a1.weight.data[to] = model.a1.weight.data[source]
        for tensor in (model.a1_norm.running_mean, model.a1_norm.running_var):
            tensor[to] = tensor[source]
        for tensor in (model.a1_norm.weight.data, model.a1_norm.bias.data):
            tensor[to] = factor * tensor[source]
    images = pictures(100)
    graph = problem(model, images, []).graph
    scores = tuple(np.ones(g.units) for g in graph.groups)
    scores[[g.name for g in graph.groups].index("a1")][[1, 3]] = 0
    assembler = problem(model, images, [Sequential(SequentialConfig(damping=1e-7))], scores=scores)
    network = assembler.assemble(policy(assembler, 14 / 16, ("a1",)))
    assert error(network, model, pictures(50, seed=1)) < 1e-5
    assert error(problem(model, images, [], scores=scores).assemble(policy(assembler, 14 / 16, ("a1",))), model, images) > 1e-2


def test_a_head_that_reads_several_levels_is_refitted_too():
    """Channels 1 and 3 of both levels are twice channels 0 and 2, and one layer reads both levels."""

    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 3, stride=2, padding=1)
            self.head = nn.Conv2d(16, 4, 3, padding=1)

        def forward(self, x):
            return torch.cat([self.head(F.relu(level(x))).mean((2, 3)) for level in (self.fine, self.coarse)], dim=1)

    torch.manual_seed(0)
    model, images = with_statistics(Levels()), pictures(60)
    for level in (model.fine, model.coarse):
        for tensor in (level.weight.data, level.bias.data):
            tensor[[1, 3]] = 2 * tensor[[0, 2]]
    (group,) = problem(model, images, []).graph.groups
    scores = (np.where(np.isin(np.arange(group.units), (1, 3)), 0.0, 1.0),)
    found = []
    for recoveries in ([], [Sequential()]):
        assembler = problem(model, images, recoveries, scores=scores)
        found.append(error(assembler.assemble(policy(assembler, 14 / 16, (group.name,))), model, pictures(50, seed=1)))
    assert found[0] > 1e-2 and found[1] < 1e-2 * found[0]


def test_layers_between_batch_norms_without_running_statistics_are_refitted():
    """Channels 1 and 3 are twice channels 0 and 2. The statistics are those of the whole batch of 100 images, not of chunks."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(channels, track_running_stats=False) for channels in (16, 24)]
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)]
    model = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), *head).eval()
    nn.init.uniform_(norms[0].bias, 0.1, 0.5)
    for tensor, factor in ((first.weight.data, 1), (first.bias.data, 1), (norms[0].weight.data, 2), (norms[0].bias.data, 2)):
        tensor[[1, 3]] = factor * tensor[[0, 2]]
    images = pictures(100)
    scores = tuple(np.ones(group.units) for group in problem(model, images, []).graph.groups)
    scores[0][[1, 3]] = 0
    found = []
    for recoveries in ([], [Sequential(SequentialConfig(damping=1e-7))]):
        assembler = problem(model, images, recoveries, scores=scores)
        found.append(error(assembler.assemble(policy(assembler, 14 / 16, ("0",))), model, pictures(50, seed=1)))
    assert found[0] > 1e-3 and found[1] < 1e-3 * found[0]


# ------------------------------------------------------------------------------------------------------ sums and clipping


@pytest.mark.parametrize("in_place", [True, False])
def test_sums_are_found_with_what_was_known_before(in_place):
    torch.manual_seed(0)
    model = with_statistics(Residual(in_place))
    layers = {name: f"{name}_norm" for name in ("stem", "a1", "a2", "b1", "b2")} | {"head": None}
    targets = plan_forward(model, layers, {}, torch.randn(1, 3, 8, 8)).targets
    assert [name for name, target in targets.items() if target.other is not None] == ["a2", "b2"]
    assert all((target.clip == (0.0, float("inf"))) == (name != "head") for name, target in targets.items())


def test_the_last_operand_of_a_sum_absorbs():
    torch.manual_seed(0)
    layers = {"branch": "branch_norm", "branch2": None, "side": None, "last": None}
    targets = plan_forward(with_statistics(Shortcut()), layers, {}, torch.randn(1, 3, 8, 8)).targets
    assert targets["branch2"].other is None and targets["branch2"].clip is None
    assert targets["side"].other == targets["branch2"].value and targets["side"].clip == (0.0, float("inf"))


class TwoReaders(nn.Module):
    """The convolution's output goes into a sum and elsewhere; its input is overwritten behind a view."""

    def __init__(self, overwrite):
        super().__init__()
        self.overwrite = overwrite
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        y = self.second(x)
        if self.overwrite:
            x[:, :1] *= 2
            return x + y
        return torch.cat([x + y, self.third(y)], 1)


@pytest.mark.parametrize("overwrite", [True, False])
def test_sums_that_are_not_the_only_reader_or_not_the_known_value_do_not_count(overwrite):
    plan = plan_forward(TwoReaders(overwrite).eval(), {"first": None, "second": None}, {}, torch.randn(1, 3, 8, 8))
    assert plan.targets["second"].other is None


class LinearStream(nn.Module):
    """x + A x, y + B y: B can make up for everything that A has lost, but for nothing if it aims at B y alone."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.inner, self.outer, self.second = (nn.Conv2d(6, 6, 1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        x = x + self.outer(self.inner(x))
        return (x + self.second(x)).mean((2, 3))


def test_the_sum_absorbs_the_error_of_the_stream(monkeypatch):
    torch.manual_seed(0)
    model, images = LinearStream().eval(), torch.randn(200, 3, 8, 8)
    weak = Sequential(SequentialConfig(damping=1e-9))
    monkeypatch.setattr("secateur.envs.recovery.sequential._DAMPING_STEPS", (1,))
    repaired = recovered(model, images, weak, names=("inner",))
    assert error(repaired, model, images) < 1e-6 < error(recovered(model, images, names=("inner",)), model, images)
    monkeypatch.setattr("secateur.envs.recovery.common.forward_values._ADDITIONS", ())
    assert error(recovered(model, images, weak, names=("inner",)), model, images) > 1e-3


@pytest.mark.numerics
def test_what_relu_hides_is_no_error():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model, images = nn.Sequential(*layers, nn.Linear(32, 4)).eval(), pictures(200)
    model[2].bias.data -= 0.3
    errors = [
        error(recovered(model, images, Sequential(SequentialConfig(clip_rounds=rounds)), names=("0",))[:4], model[:4], images)
        for rounds in (0, 1, 4)
    ]
    assert errors[2] < 0.95 * errors[1] < 0.95 * errors[0]
