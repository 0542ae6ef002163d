"""Importances rank by what they status, on every kind of group, and leave the model alone."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.core import InputError
from secateur.envs.model_graph import analyze
from secateur.envs.pruning.importance import IMPORTANCES
from secateur.envs.pruning.importance.clr_rnf import reciprocal_scores
from secateur.envs.pruning.importance.core import DenseModel
from secateur.envs.pruning.importance.hrank import map_ranks
from secateur.envs.pruning.importance.second_order import Elimination, damped_inverse, removal_order
from secateur.envs.pruning.importance.taylor import Taylor, TaylorConfig
from secateur.envs.pruning.importance.white_box import WhiteBox, WhiteBoxConfig, class_coefficients
from secateur.envs.tasks.synthetic import synthetic_net


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


def look(model, graph, images=None, labels=None, seed=0, **calibration):
    """What an importance gets; `calibration` as in CalibrationConfig."""
    known = None if images is None else calibrate(model, graph, images, CalibrationConfig(**calibration))
    return DenseModel(model, graph, known, images, labels, np.random.default_rng(seed))


def score(name, task, seed=0):
    config, importance = IMPORTANCES[name]
    return importance(config()).scores(look(*task, seed))


def by_group(name, task):
    return {group.name: values for group, values in zip(task[1].groups, score(name, task), strict=True)}


@pytest.mark.parametrize("name", IMPORTANCES)
def test_contract(name, task):
    model, graph, images, labels = task
    before = copy.deepcopy(model.state_dict())
    scores = score(name, task)
    assert [len(values) for values in scores] == [group.units for group in graph.groups]
    for values, again in zip(scores, score(name, task), strict=True):
        assert values.dtype == np.float64 and np.isfinite(values).all() and np.array_equal(values, again)
        assert (values >= 0).all()
        # A few steps on random labels need not tell the channels of an untrained network apart.
        assert name == "white_box" or len(np.unique(values)) > 1
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
    assert by_name["conv2"] == pytest.approx(model.conv2.weight.detach().flatten(1).norm(order, dim=1).numpy(), rel=1e-5)


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
    scores = taylor.scores(DenseModel(model, graph, None, images, labels, np.random.default_rng(0)))[index]

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


class Chain(nn.Module):
    """A layer, and one that reads it: convolutions, or a linear layer on flattened maps."""

    def __init__(self, units=6, outputs=5, reader="conv", bias=True):
        super().__init__()
        self.first = nn.Conv2d(3, units, 3, padding=1)
        if reader == "conv":
            self.second = nn.Conv2d(units, outputs, 3, padding=1, bias=bias)
        else:
            self.second = nn.Linear(units * 16, outputs, bias=bias)
        self.reader = reader

    def forward(self, x):
        x = F.relu(self.first(x))
        if self.reader == "linear":
            return self.second(F.avg_pool2d(x, 2).flatten(1))
        return self.second(x).mean((2, 3))


class Grouped(nn.Module):
    """A grouped convolution reads one group; its unit is a channel of each conv group."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1, groups=2)

    def forward(self, x):
        return self.second(F.relu(self.first(x))).mean((2, 3))


def chain(seed=0, **options):
    torch.manual_seed(seed)
    model = Chain(**options).eval()
    images, labels = torch.randn(64, 3, 8, 8), torch.randint(4, (64,))
    return model, analyze(model, (images[:1],)), images, labels


@pytest.mark.numerics
@pytest.mark.parametrize("reader", ["conv", "linear"])
def test_second_order_removes_a_copy_and_a_mixture_but_keeps_one_of_them(reader):
    model, graph, images, labels = chain(reader=reader)
    first = model.first
    with torch.no_grad():
        first.weight[4], first.bias[4] = first.weight[1], first.bias[1]  # a copy, ...
        first.weight[:4] *= 2
        first.bias[:] = 20.0  # ... and the nonlinearity lets everything through, so that sums of channels stay sums
        first.weight[4], first.bias[4] = first.weight[1], first.bias[1]
        first.weight[5] = 0.7 * first.weight[0] - 0.4 * first.weight[2]
        model.second.weight.mul_(3)
    scores = by_group("second_order", (model, graph, images, labels))["first"]
    gone = set(np.argsort(scores)[:2].tolist())
    assert len(gone & {1, 4}) == 1 and len(gone & {0, 2, 5}) == 1
    assert sorted(scores) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["second_order", "output_energy"])
def test_dead_channels_go_first_however_large_their_weights(name):
    model, graph, images, labels = chain()
    with torch.no_grad():
        model.first.bias[[1, 3]] = -1000.0
        model.second.weight[:, [1, 3]] *= 1e4
    scores = by_group(name, (model, graph, images, labels))["first"]
    assert set(np.argsort(scores)[:2].tolist()) == {1, 3}


@pytest.mark.parametrize("name", ["second_order", "output_energy"])
@pytest.mark.parametrize("level", [-1000.0, 0.0])
def test_a_reader_of_constants_only_gives_finite_scores(name, level):
    model, graph, images, labels = chain(reader="linear")
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.copy_(torch.arange(1, 7) + level)
    scores = by_group(name, (model, graph, images, labels))["first"]
    assert np.isfinite(scores).all() and scores.max() < 10


@pytest.mark.parametrize("name", ["second_order", "output_energy"])
def test_a_constant_channel_is_free_only_where_the_reader_has_an_intercept(name):
    for bias, first in ((True, True), (False, False)):
        model, graph, images, labels = chain(reader="linear", bias=bias)  # without padding: constant everywhere
        with torch.no_grad():
            model.first.weight[2], model.first.bias[2] = 0.0, 10.0
        assert (by_group(name, (model, graph, images, labels))["first"].argmin() == 2) == first


def refit_error(moments, weight, gone, damping):
    """What is left of E|W' u - W u|^2 + damping |W' - W|^2 over the entries that stay, by solving for W'."""
    stay = np.setdiff1d(np.arange(len(moments)), gone)
    second = moments[np.ix_(stay, stay)] + damping * np.eye(len(stay))
    change = np.linalg.solve(second, moments[np.ix_(stay, gone)] @ weight[:, gone].T).T
    error = weight.copy()
    error[:, stay] = -change
    return np.trace(error @ moments @ error.T) + damping * np.square(change).sum()


@pytest.mark.parametrize(("block", "panel"), [(1, 128), (1, 3), (3, 128), (2, 4)])
def test_greedy_costs_are_the_growth_of_the_refit_error(block, panel, monkeypatch):
    monkeypatch.setattr("secateur.envs.pruning.importance.second_order._PANEL", panel)
    rng = np.random.default_rng(0)
    size = 8 * block
    rows = rng.standard_normal((40, size)) @ rng.standard_normal((size, size))
    moments, weight = rows.T @ rows / 40, rng.standard_normal((5, size))
    entries = rng.permutation(size).reshape(8, block)
    inverse, damping = damped_inverse(torch.from_numpy(moments), 1e-2)
    assert damping == pytest.approx(1e-2 * np.diag(moments).mean())
    flat = entries.ravel()
    gram = torch.from_numpy(weight[:, flat].T @ weight[:, flat])
    share = Elimination(inverse[flat][:, flat].clone(), gram, damping, block)
    seen = []
    costs = share.costs
    share.costs = lambda: seen.append(costs().copy()) or seen[-1]
    order = removal_order(np.zeros(8), [share]).tolist()
    gone, error = [], 0.0
    for step in range(7):
        candidates = [unit for unit in range(8) if unit not in gone]
        growth = [refit_error(moments, weight, entries[[*gone, unit]].ravel(), damping) - error for unit in candidates]
        assert order[step] == candidates[int(np.argmin(growth))]
        assert np.isclose(seen[step], min(growth), rtol=1e-8).any()
        gone.append(order[step])
        error += min(growth)
    assert sorted(order) == list(range(8))


def test_fixed_costs_and_several_readers_add_up():
    rng = np.random.default_rng(1)
    fixed = rng.random(5)
    assert removal_order(fixed, []).tolist() == np.argsort(fixed).tolist()
    inverse = torch.eye(5, dtype=torch.float64)
    grams = [torch.diag(torch.from_numpy(rng.random(5))) for _ in range(2)]
    order = removal_order(fixed, [Elimination(inverse, gram, 0.0, 1) for gram in grams])
    assert order.tolist() == np.argsort(fixed + sum(gram.diagonal().numpy() for gram in grams)).tolist()


def test_damping_grows_until_the_matrix_can_be_inverted():
    moments = torch.diag(torch.tensor([1.0, -0.05, 1.0, 1.0], dtype=torch.float64))
    inverse, damping = damped_inverse(moments, 1e-3)
    assert damping == pytest.approx(0.1 * 0.7375)
    assert torch.allclose(inverse, torch.linalg.inv(moments + damping * torch.eye(4, dtype=torch.float64)))


@pytest.mark.parametrize("reader", ["conv", "linear"])
def test_output_energy_is_the_variance_of_what_a_unit_adds(reader):
    model, graph, images, labels = chain(reader=reader)
    scores = by_group("output_energy", (model, graph, images, labels))["first"]
    captured = []
    hook = model.second.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    with torch.no_grad():
        model(images)
        hook.remove()
        model.second.bias.zero_()
        x = captured[0]
        full = model.second(x)
        # At the border the padding would make the mean differ from place to place: second moments are those of all places.
        dims = (0, 2, 3) if reader == "conv" else (0,)
        total = full.var(dims, correction=0).sum()
        for unit in range(6):
            alone = torch.zeros_like(x)
            width = 1 if reader == "conv" else 16
            alone[:, unit * width : (unit + 1) * width] = x[:, unit * width : (unit + 1) * width]
            share = model.second(alone).var(dims, correction=0).sum() / total
            assert scores[unit] == pytest.approx(float(share), rel=0.1 if reader == "conv" else 1e-3)


@pytest.mark.parametrize("name", ["second_order", "output_energy"])
@pytest.mark.parametrize("kind", ["full", "channel", "diagonal"])
def test_every_kind_of_statistics_finds_the_dead_channel(name, kind):
    model, graph, images, labels = chain()
    with torch.no_grad():
        model.first.bias[2] = -1000.0
    size = {"full": 10**6, "channel": 4 * 7**2, "diagonal": 1}[kind]
    dense = look(model, graph, images, labels, max_matrix_bytes=size)
    assert dense.calibration.layers["second"].kind == kind
    config, importance = IMPORTANCES[name]
    (scores,) = importance(config()).scores(dense)
    assert scores.argmin() == 2 and len(set(scores.tolist())) == 6


@pytest.mark.parametrize("name", ["second_order", "output_energy", "hrank", "white_box"])
def test_a_unit_of_a_grouped_reader_is_a_channel_of_every_conv_group(name):
    torch.manual_seed(0)
    model = Grouped().eval()
    with torch.no_grad():
        model.first.bias[[1, 5]] = -1000.0  # unit 1: channels 1 and 5
    images, labels = torch.randn(32, 3, 8, 8), torch.randint(4, (32,))
    graph = analyze(model, (images[:1],))
    scores = by_group(name, (model, graph, images, labels))["first"]
    assert len(scores) == 4
    if name == "white_box":
        assert scores[1] < 1  # only the sparsity acts on it
    else:
        assert scores.argmin() == 1


@pytest.mark.numerics
def test_second_order_is_no_worse_than_output_energy_where_channels_repeat():
    model, graph, images, labels = chain(units=12)
    with torch.no_grad():
        model.first.weight[6:] = model.first.weight[:6] + 0.01 * torch.randn_like(model.first.weight[:6])
        model.first.bias[6:] = model.first.bias[:6]
    dense = look(model, graph, images, labels)
    errors = {}
    for name in ("second_order", "output_energy"):
        config, importance = IMPORTANCES[name]
        (scores,) = importance(config()).scores(dense)
        gone = dense.calibration.layers["second"].entries(np.argsort(scores)[:6])
        moments = dense.calibration.layers["second"].moments[0].astype(float)
        centered = moments[:-1, :-1] - np.outer(moments[-1, :-1], moments[-1, :-1])
        errors[name] = refit_error(centered, model.second.weight.detach().flatten(1).double().numpy(), gone, 1e-3)
    assert errors["second_order"] < 0.1 * errors["output_energy"]


def test_hrank_of_maps_of_known_rank():
    maps = torch.zeros(2, 4, 5, 5)
    maps[:, 1, 0, 3] = 2.0  # rank 1
    maps[0, 2] = torch.eye(5)
    maps[1, 2, :3, :3] = torch.eye(3)  # ranks 5 and 3
    maps[:, 3] = torch.outer(torch.arange(5.0), torch.arange(5.0)) + torch.ones(5, 5)  # rank 2
    channels = torch.arange(4)[:, None]
    ranks = map_ranks(nn.Conv2d(4, 1, 1), maps, channels)
    assert ranks.tolist() == [[0, 1, 5, 2], [0, 1, 3, 2]]
    assert map_ranks(nn.Conv2d(4, 1, 1), maps, channels.view(2, 2)).tolist() == [[0.5, 3.5], [0.5, 2.5]]


def test_hrank_of_what_is_no_map_is_the_share_of_entries_that_are_not_zero():
    channels = torch.arange(4).view(2, 2)
    features = torch.tensor([[0.0, 0, 1, 2], [3, 0, -1, 0]])
    assert map_ranks(nn.Linear(4, 1), features, channels).tolist() == [[0, 1], [0.5, 0.5]]
    tokens = torch.stack([features, torch.zeros(2, 4)], dim=1)
    assert map_ranks(nn.Linear(4, 1), tokens, channels).tolist() == [[0, 0.5], [0.25, 0.25]]
    pooled = features[:, :, None, None]
    assert map_ranks(nn.Conv2d(4, 1, 1), pooled, channels).tolist() == [[0, 1], [0.5, 0.5]]


def test_hrank_looks_behind_the_nonlinearity():
    model, graph, images, labels = chain()
    scores = by_group("hrank", (model, graph, images, labels))["first"]
    with torch.no_grad():
        expected = torch.linalg.matrix_rank(F.relu(model.first(images))).double().mean(0)
    assert scores == pytest.approx(expected.numpy())


@pytest.mark.parametrize("seed", range(3))
def test_reciprocal_nearest_filters_agree_with_growing_the_neighbourhoods(seed):
    filters = np.random.default_rng(seed).standard_normal((9, 4))
    filters[7] = filters[2]
    distances = ((filters[:, None] - filters[None]) ** 2).sum(-1)
    np.fill_diagonal(distances, -1)
    lists = [np.argsort(row, kind="stable").tolist() for row in distances]
    entered = {}
    for k in range(1, 10):
        for unit in set.intersection(*(set(ranked[:k]) for ranked in lists)):
            entered.setdefault(unit, k)
    scores = reciprocal_scores(torch.from_numpy(filters))
    for first, second in np.argwhere(np.subtract.outer(*[[entered[u] for u in range(9)]] * 2) < 0):
        assert scores[first] > scores[second]
    assert np.ceil(9 - scores).astype(int).tolist() == [entered[unit] for unit in range(9)]


def test_class_coefficients_weigh_the_own_class_most_and_sum_to_one():
    labels = torch.tensor([2, 0, 1, 2])
    drawn = class_coefficients(labels, 3, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.sum(1), torch.ones(4)) and (drawn > 0).all()
    assert drawn.argmax(1).tolist() == labels.tolist()


@pytest.mark.numerics
def test_white_box_lowers_the_mask_of_a_channel_that_hurts():
    """Class 1 is told by the sign of the images' mean; unit 0 carries it, unit 1 only noise that the head listens to."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.second(self.first(x.flatten(1)))

    model = Two().eval()
    with torch.no_grad():
        model.first.weight[:] = torch.tensor([[1.0, 0], [0, 1.0], [0, 0]])
        model.first.bias.zero_()
        model.second.weight[:] = torch.tensor([[-1.0, -3, 0], [1.0, 3, 0]])
        model.second.bias.zero_()
    images = torch.randn(256, 2, 1, 1)
    labels = (images[:, 0, 0, 0] > 0).long()
    graph = analyze(model, (images[:1],))
    importance = WhiteBox(WhiteBoxConfig(epochs=4, learning_rate=0.05, sparsity=0.0))
    (scores,) = importance.scores(look(model, graph, images, labels))
    assert scores[1] < 0.6 < 1 < scores[0]
    assert scores[2] == 1  # without activation there is no gradient
    (sparse,) = WhiteBox(WhiteBoxConfig(epochs=4, sparsity=1.0)).scores(look(model, graph, images, labels))
    assert sparse[2] < 0.7


def test_white_box_leaves_the_network_as_it_is_while_all_masks_are_one():
    from secateur.envs.pruning.importance.white_box import _MaskedModel

    torch.manual_seed(0)
    model = Mixed().eval()
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(4, (6,))
    masked = _MaskedModel(look(model, analyze(model, (images[:1],)), images, labels))
    masked.coefficients = class_coefficients(labels, 4, torch.Generator().manual_seed(0))
    assert {mask.shape[0] for mask in masked.masks.values()} == {4}
    with torch.no_grad():
        assert torch.allclose(masked.model(images), model(images), atol=1e-5)
        masked.masks["linear"][:, 3] = 0.0
        changed = copy.deepcopy(model)
        changed.head.weight[:, 3] = 0.0
        assert torch.allclose(masked.model(images), changed(images), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("second_order", "damping", 0),
        ("hrank", "max_images", 0),
        ("hrank", "batch_size", 0),
        ("white_box", "epochs", 0),
        ("white_box", "learning_rate", 0),
        ("white_box", "sparsity", -1),
    ],
)
def test_options_out_of_range(name, option, value):
    with pytest.raises(InputError, match=f"`{option}` of the importance `{name}`"):
        IMPORTANCES[name][0](**{option: value})
