"""Recoveries repair what they say and leave everything else, the dense network above all, as it was."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from envs.core import InputError
from envs.model_graph import analyze
from envs.pruning.slicing import slice_model
from envs.recovery import RECOVERIES
from envs.recovery.batch_norm import BatchNorm, BatchNormConfig
from envs.recovery.least_squares import LeastSquares, LeastSquaresConfig, kept_positions
from envs.tasks import synthetic
from envs.tasks.training import Recipe, train


@pytest.fixture(scope="module")
def task():
    data = synthetic.load()
    model = train(synthetic.synthetic_net(), data, synthetic.RECIPE)
    return model, analyze(model, (torch.zeros(1, 3, 8, 8),)), data


def half_of(graph, groups=None):
    """Return every other unit of each group (or of the named ones)."""
    return [
        np.arange(0, group.units, 2) if groups is None or group.name in groups else np.arange(group.units)
        for group in graph.groups
    ]


def top1(model, data):
    images, labels = data.tensors(data.test)
    with torch.inference_mode():
        return float((model(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("name", RECOVERIES)
def test_contract(name, task):
    model, graph, data = task
    config, make = RECOVERIES[name]
    recovery = pickle.loads(pickle.dumps(make(config())))
    assert isinstance(recovery.before_quantization, bool)
    images, _ = data.tensors(data.calibration)
    before = copy.deepcopy(model.state_dict())
    prepared = pickle.loads(pickle.dumps(recovery.prepare(model, graph, images)))
    outputs = []
    for _ in range(2):
        network = slice_model(model, graph, half_of(graph))
        names = {key: tensor.shape for key, tensor in network.state_dict().items()}
        recovery.apply(network, model, graph, half_of(graph), prepared, images)
        assert {key: tensor.shape for key, tensor in network.state_dict().items()} == names
        assert not any(module.training for module in network.modules())
        assert all(parameter.requires_grad for parameter in network.parameters())
        outputs.append(network(images))
    assert torch.equal(outputs[0], outputs[1]) and outputs[0].isfinite().all()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", RECOVERIES)
def test_nothing_removed_means_nothing_changed(name, task):
    model, graph, data = task
    config, make = RECOVERIES[name]
    images, _ = data.tensors(data.train)
    everything = [np.arange(group.units) for group in graph.groups]
    network = slice_model(model, graph, everything)
    make(config()).apply(network, model, graph, everything, make(config()).prepare(model, graph, images), images)
    assert top1(network, data) == pytest.approx(top1(model, data), abs=0.01)
    if name != "batch_norm":
        assert torch.equal(network(images), model(images))


def test_recoveries_recover(task):
    model, graph, data = task
    images, _ = data.tensors(data.train)
    kept = half_of(graph, {"conv2", "conv4"})

    def recovered(*names):
        network = slice_model(model, graph, kept)
        for name in names:
            config, make = RECOVERIES[name]
            make(config()).apply(network, model, graph, kept, make(config()).prepare(model, graph, images), images)
        return top1(network, data)

    none, batch_norm, least_squares = recovered("none"), recovered("batch_norm"), recovered("least_squares")
    assert batch_norm > none + 0.2
    assert least_squares > none + 0.2


# ----------------------------------------------------------------------------------------------------------- batch norm


def test_statistics_are_the_plain_average_over_the_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5)).eval()
    graph = analyze(nn.Sequential(*model, nn.Flatten(), nn.Linear(4 * 36, 2)).eval(), (torch.zeros(1, 3, 8, 8),))
    images = 3 * torch.randn(90, 3, 8, 8) + 1
    BatchNorm(BatchNormConfig(batch_size=40, max_images=80)).apply(model, model, graph, [], None, images)
    outputs = model[0](images[:80])
    assert torch.allclose(model[1].running_mean, outputs.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(model[1].running_var, outputs.var((0, 2, 3)), rtol=1e-2)
    assert model[1].momentum == 0.3 and not model[1].training and int(model[1].num_batches_tracked) == 2


def test_modes_are_restored_when_the_model_fails():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(RuntimeError):
        BatchNorm().apply(model, model, None, [], None, torch.zeros(8, 5, 8, 8))
    assert model[1].momentum == 0.1 and not model[1].training


def test_network_without_batch_norm_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 2))
    BatchNorm().apply(model, model, None, [], None, None)


# -------------------------------------------------------------------------------------------------------- least squares


class Chain(nn.Module):
    """Consumers of every kind: dilated, strided, padded and depthwise convolutions, linear layers after a flatten."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 5, (3, 2), stride=2, padding=(2, 1), dilation=(2, 1), bias=bias)
        self.depthwise = nn.Conv2d(5, 5, 3, padding="same", groups=5)
        self.third = nn.Conv2d(5, 4, 3, padding="same", dilation=2)
        self.hidden = nn.Linear(4 * 16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.third(F.relu(self.depthwise(F.relu(self.second(F.relu(self.first(x)))))))
        return self.head(F.relu(self.hidden(F.relu(x).flatten(1))))


def unfolded(layer, x):
    """Return every input of a layer, (samples, inputs), by torch's own unfold."""
    if isinstance(layer, nn.Linear):
        return x
    extra = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "same":
        x = F.pad(x, (extra[1] // 2, extra[1] - extra[1] // 2, extra[0] // 2, extra[0] - extra[0] // 2))
        patches = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
    else:
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def inputs_of(model, name, images):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    model(images)
    hook.remove()
    return seen[0]


@pytest.fixture(scope="module", params=[True, False], ids=["bias", "no bias"])
def chain(request):
    torch.manual_seed(0)
    model = Chain(request.param).eval()
    images = torch.randn(50, 2, 8, 7)
    return model, analyze(model, (images[:1],)), images


def test_moments_are_those_of_the_unfolded_input(chain):
    model, graph, images = chain
    config = LeastSquaresConfig(positions=1000, batch_size=20)
    moments = LeastSquares(config).prepare(model, graph, images)
    assert set(moments.moments) == {"second", "third", "hidden", "head"}
    for name, found in moments.moments.items():
        rows = unfolded(model.get_submodule(name), inputs_of(model, name, images))
        rows = F.pad(rows, (0, 1), value=1.0).double()
        assert found == pytest.approx((rows.T @ rows / len(rows)).numpy(), abs=1e-4)


def test_sampled_moments_are_close_to_the_full_ones_and_follow_the_seed(chain):
    model, graph, images = chain
    full = LeastSquares(LeastSquaresConfig(positions=1000)).prepare(model, graph, images).moments["second"]
    drawn = [
        LeastSquares(LeastSquaresConfig(positions=6, batch_size=10, seed=seed)).prepare(model, graph, images)
        for seed in (0, 0, 1)
    ]
    first, again, other = (moments.moments["second"] for moments in drawn)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.linalg.norm(first - full) < 0.2 * np.linalg.norm(full)


def test_refit_is_the_least_squares_solution(chain):
    """Against numpy's solver on the samples themselves, with almost no damping."""
    model, graph, images = chain
    recovery = LeastSquares(LeastSquaresConfig(positions=1000, damping=1e-9))
    prepared = recovery.prepare(model, graph, images)
    kept = [np.array([0, 2, 3]) if group.name == "first" else np.arange(group.units) for group in graph.groups]
    network = slice_model(model, graph, kept)
    recovery.apply(network, model, graph, kept, prepared, images)

    rows = unfolded(model.second, inputs_of(model, "second", images)).double().numpy()
    left = rows.reshape(len(rows), 6, -1)[:, [0, 2, 3]].reshape(len(rows), -1)
    target = rows @ model.second.weight.detach().flatten(1).double().numpy().T
    if model.second.bias is not None:
        left = np.c_[left, np.ones(len(left))]
        target = target + model.second.bias.detach().double().numpy()
    solution = np.linalg.lstsq(left, target, rcond=None)[0].T
    found = network.second.weight.detach().flatten(1)
    if model.second.bias is not None:
        found = torch.cat([found, network.second.bias.detach()[:, None]], 1)
    assert found.numpy() == pytest.approx(solution, abs=2e-3)
    for name in ("third", "hidden", "head"):
        assert torch.equal(network.get_submodule(name).weight, model.get_submodule(name).weight)


def test_duplicated_channel_is_absorbed_exactly_with_its_constant():
    """Channel 1 is twice channel 0 plus 3, so removing it must not change the output, batch norm's mean included."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 16, 3)
    ).eval()
    model[0].weight.data[1] = 2 * model[0].weight.data[0]
    model[0].bias.data[1] = 2 * model[0].bias.data[0] + 3
    images = torch.randn(40, 3, 8, 8)
    graph = analyze(model, (images[:1],))
    kept = [np.array([0, 2, 3]) if group.name == "0" else np.arange(0, group.units, 2) for group in graph.groups]
    recovery = LeastSquares(LeastSquaresConfig(damping=1e-8, positions=100))
    network = slice_model(model, graph, kept)
    recovery.apply(network, model, graph, kept, recovery.prepare(model, graph, images), images)
    expected = model[2](model[1](model[0](images)))[:, ::2]
    assert torch.allclose(network[2](network[1](network[0](images))), expected, atol=1e-3)


def test_layers_above_the_limit_are_skipped_and_listed(chain):
    model, graph, images = chain
    prepared = LeastSquares(LeastSquaresConfig(max_inputs=40)).prepare(model, graph, images)
    assert prepared.skipped == ("third", "hidden")
    assert set(prepared.moments) == {"second", "head"}


def test_damping_pulls_towards_the_old_weights(chain):
    model, graph, images = chain
    kept = half_of(graph, {"first"})
    recovery = LeastSquares(LeastSquaresConfig(damping=1e9))
    network = slice_model(model, graph, kept)
    recovery.apply(network, model, graph, kept, recovery.prepare(model, graph, images), images)
    assert torch.allclose(network.second.weight, model.second.weight[:, ::2], atol=1e-6)


def test_kept_positions_follow_the_slices_of_all_groups(chain):
    _, graph, _ = chain
    kept = half_of(graph, {"third"})
    columns = kept_positions(graph, kept, "hidden.weight", 1, 64)
    assert columns.tolist() == [*range(16), *range(32, 48)]
    assert kept_positions(graph, kept, "hidden.weight", 0, 6).tolist() == list(range(6))


@pytest.mark.parametrize(
    ("config", "option"),
    [
        (lambda: LeastSquaresConfig(damping=0), "damping"),
        (lambda: LeastSquaresConfig(positions=0), "positions"),
        (lambda: LeastSquaresConfig(max_inputs=0), "max_inputs"),
        (lambda: BatchNormConfig(batch_size=1), "batch_size"),
        (lambda: BatchNormConfig(max_images=0), "max_images"),
    ],
)
def test_options_out_of_range_are_input_errors(config, option):
    with pytest.raises(InputError, match=option):
        config()


def test_training_goes_on_after_recovery(task):
    model, graph, data = task
    images, labels = data.tensors(data.calibration)
    kept = half_of(graph)
    network = slice_model(model, graph, kept)
    recovery = LeastSquares()
    recovery.apply(network, model, graph, kept, recovery.prepare(model, graph, images), images)
    F.cross_entropy(network.train()(images), labels).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert train(network, data, Recipe(epochs=1)) is not network
