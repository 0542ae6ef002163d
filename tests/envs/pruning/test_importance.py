"""Importances rank by what they say, on every kind of group, and leave the model alone."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from envs.core import InputError
from envs.model_graph import analyze
from envs.pruning.importance import IMPORTANCES
from envs.pruning.importance.taylor import Taylor, TaylorConfig
from envs.tasks.synthetic import synthetic_net


class Mixed(nn.Module):
    """A depthwise convolution, a layer without batch norm, and a flatten that spreads a channel over four features."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.bn = nn.BatchNorm2d(6)
        self.plain = nn.Conv2d(6, 5, 3, padding=1)
        self.linear = nn.Linear(5 * 4, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.depthwise(F.relu(self.conv(x)))))
        x = F.adaptive_avg_pool2d(F.relu(self.plain(x)), 2).flatten(1)
        return self.head(F.relu(self.linear(x)))


class Unusual(nn.Module):
    """A transposed convolution, one whose weight belongs to no layer module, and one whose weight has two names."""

    def __init__(self):
        super().__init__()
        self.alias = nn.Linear(6, 7)
        self.hidden = nn.Linear(6, 7)
        self.hidden.weight = self.alias.weight
        self.up = nn.ConvTranspose2d(3, 5, 2, stride=2)
        self.kernel_weight = nn.Parameter(torch.randn(6, 5, 3, 3))
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        x = F.relu(F.conv2d(F.relu(self.up(x)), self.kernel_weight))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


@pytest.fixture(scope="module", params=["synthetic", "mixed", "unusual"])
def task(request):
    torch.manual_seed(0)
    model = {"synthetic": synthetic_net, "mixed": Mixed, "unusual": Unusual}[request.param]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    images, labels = torch.randn(40, 3, 8, 8), torch.randint(4, (40,))
    return model, analyze(model, (images[:1],)), images, labels


def score(name, task, seed=0):
    config, importance = IMPORTANCES[name]
    return importance(config()).scores(*task, np.random.default_rng(seed))


@pytest.mark.parametrize("name", IMPORTANCES)
def test_contract(name, task):
    model, graph, images, labels = task
    before = copy.deepcopy(model.state_dict())
    scores = score(name, task)
    assert [len(values) for values in scores] == [group.units for group in graph.groups]
    for values, again in zip(scores, score(name, task), strict=True):
        assert values.dtype == np.float64 and np.isfinite(values).all() and np.array_equal(values, again)
        assert (values >= 0).all() and len(np.unique(values)) > 1
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    config, importance = IMPORTANCES[name]
    assert pickle.loads(pickle.dumps(importance(config()))) == importance(config())


@pytest.mark.parametrize(("name", "order"), [("l1_norm", 1), ("l2_norm", 2)])
def test_norms_are_the_mean_over_the_producers(name, order):
    model = synthetic_net().eval()
    graph = analyze(model, (torch.zeros(1, 3, 8, 8),))
    scores = score(name, (model, graph, None, None))
    by_name = {group.name: values for group, values in zip(graph.groups, scores, strict=True)}
    filters = [layer.weight.detach().flatten(1).norm(order, dim=1) for layer in (model.conv1, model.conv3)]
    assert by_name["conv1"] == pytest.approx(((filters[0] + filters[1]) / 2).numpy(), rel=1e-5)
    assert by_name["conv2"] == pytest.approx(
        model.conv2.weight.detach().flatten(1).norm(order, dim=1).numpy(), rel=1e-5
    )


def test_norms_read_the_output_axis_of_unusual_layers():
    model = Unusual().eval()
    graph = analyze(model, (torch.zeros(1, 3, 8, 8),))
    scores = {g.name: v for g, v in zip(graph.groups, score("l1_norm", (model, graph, None, None)), strict=True)}
    assert scores["up"] == pytest.approx(model.up.weight.detach().abs().sum((0, 2, 3)).numpy(), rel=1e-5)
    assert scores["kernel"] == pytest.approx(model.kernel_weight.detach().abs().sum((1, 2, 3)).numpy(), rel=1e-5)


def test_bn_scale_is_the_mean_absolute_scale_with_l1_where_there_is_none():
    torch.manual_seed(0)
    model = Mixed().eval()
    model.bn.weight.data = torch.tensor([3.0, -5.0, 1.0, 0.0, 2.0, -4.0])
    graph = analyze(model, (torch.zeros(1, 3, 8, 8),))
    scores = {g.name: v for g, v in zip(graph.groups, score("bn_scale", (model, graph, None, None)), strict=True)}
    assert scores["conv"].tolist() == [3, 5, 1, 0, 2, 4]
    assert scores["plain"] == pytest.approx(model.plain.weight.detach().abs().sum((1, 2, 3)).numpy(), rel=1e-5)


def test_taylor_is_the_squared_first_order_change_of_the_loss():
    """A unit's gate (scale and shift of its batch norm) is shrunk a little: the loss must change as the score says."""
    torch.manual_seed(0)
    model = synthetic_net().eval().double()
    nn.init.normal_(model.bn2.bias)
    graph = analyze(copy.deepcopy(model).float(), (torch.zeros(1, 3, 8, 8),))
    images, labels = torch.randn(30, 3, 8, 8, dtype=torch.float64), torch.randint(4, (30,))
    taylor = Taylor(TaylorConfig(batch_size=15))
    index = [group.name for group in graph.groups].index("conv2")
    scores = taylor.scores(model, graph, images, labels, np.random.default_rng(0))[index]

    def loss(batch, unit, shrink):
        shrunk = copy.deepcopy(model)
        for parameter in (shrunk.bn2.weight, shrunk.bn2.bias):
            parameter.data[unit] *= 1 - shrink
        with torch.no_grad():
            return float(F.cross_entropy(shrunk(images[batch]), labels[batch]))

    step = 1e-5
    for unit in range(3):
        slopes = [(loss(b, unit, step) - loss(b, unit, -step)) / (2 * step) for b in (slice(15), slice(15, 30))]
        assert scores[unit] == pytest.approx(np.mean(np.square(slopes)), rel=1e-4)


def test_random_follows_its_generator(task):
    first, other = score("random", task, seed=0), score("random", task, seed=1)
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("option", ["batch_size", "max_images"])
def test_taylor_refuses_counts_below_one(option):
    with pytest.raises(InputError, match=option):
        TaylorConfig(**{option: 0})
