"""Refits in sequence absorb the error made before them, over every way that layers are joined, and touch nothing else."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.assembler import Assembler
from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.core import CompressionPolicy, InputError
from secateur.envs.model_graph import analyze
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.quantization.quantizers.uniform import Uniform
from secateur.envs.recovery import RECOVERIES
from secateur.envs.recovery.common.forward_values import plan_forward
from secateur.envs.recovery.least_squares import LeastSquares
from secateur.envs.recovery.sequential import Sequential, SequentialConfig


def with_statistics(model, seed=0):
    """Return the model in eval mode with strong weights and random batch norms, as a trained network has them."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=rng)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=rng)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.3, generator=rng)
    return model.eval()


class Residual(nn.Module):
    """Two blocks on a stream; activations and sums in place, as torchvision writes them."""

    def __init__(self, in_place=True):
        super().__init__()
        self.in_place = in_place
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        for block in "ab":
            setattr(self, f"{block}1", nn.Conv2d(8, 16, 3, padding=1, bias=False))
            setattr(self, f"{block}1_norm", nn.BatchNorm2d(16))
            setattr(self, f"{block}2", nn.Conv2d(16, 8, 3, padding=1, bias=False))
            setattr(self, f"{block}2_norm", nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def block(self, name, x):
        y = F.relu(getattr(self, f"{name}1_norm")(getattr(self, f"{name}1")(x)), inplace=self.in_place)
        y = getattr(self, f"{name}2_norm")(getattr(self, f"{name}2")(y))
        if self.in_place:
            y += x
        else:
            y = x + y
        return F.relu(y, inplace=self.in_place)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)), inplace=self.in_place)
        return self.head(self.block("b", self.block("a", x)).mean((2, 3)))


class Shortcut(nn.Module):
    """A convolution on the shortcut that runs after the branch."""

    def __init__(self):
        super().__init__()
        self.branch, self.branch_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.branch2 = nn.Conv2d(8, 6, 3, padding=1)
        self.side = nn.Conv2d(3, 6, 1)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        y = self.branch2(F.relu(self.branch_norm(self.branch(x))))
        return self.last(F.relu(y + self.side(x))).flatten(1)


class Mixed(nn.Module):
    """Depthwise and grouped convolutions, a concatenation, squeeze-and-excitation, linear layers on tokens and flattened."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand, self.expand_norm = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.depthwise_norm = nn.Conv2d(16, 16, 3, padding="same", groups=16, bias=False), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.grouped = nn.Conv2d(16, 12, 3, stride=2, padding=1, dilation=1, groups=2)
        self.side = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.join = nn.Conv2d(18, 10, 1)
        self.token1, self.token2 = nn.Linear(10, 20), nn.Linear(20, 10)
        self.hidden, self.head = nn.Linear(10 * 16, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu6(self.depthwise_norm(self.depthwise(F.relu6(self.expand_norm(self.expand(x))))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = torch.cat([self.grouped(y), self.side(x)], 1)
        tokens = F.relu(self.join(F.relu(y))).flatten(2).transpose(1, 2)
        tokens = tokens + self.token2(F.gelu(self.token1(tokens)))
        return self.head(F.relu(self.hidden(tokens.flatten(1))))


_PROBLEMS = {}
"""Graph and calibration by the identities of model and images, which are kept alive: analysis takes seconds."""


def problem(model, images, recoveries, quantizer=None, scores=None):
    """Return an assembler; without `scores`, units are removed in a random order."""
    key = id(model), id(images)
    if key not in _PROBLEMS:
        graph = analyze(model, (images[:1],))
        _PROBLEMS[key] = model, images, graph, calibrate(model, graph, images, CalibrationConfig())
    *_, graph, calibration = _PROBLEMS[key]
    rng = np.random.default_rng(0)
    scores = scores or tuple(rng.permutation(group.units).astype(float) for group in graph.groups)
    return Assembler(model, graph, scores, quantizer or Uniform(), recoveries, calibration, images)


def policy(assembler, share=0.5, names=None, bits=(32, 32)):
    """Keep a share of all groups, or of the named ones."""
    groups, layers = assembler.graph.groups, len(assembler.graph.geometry.layers)
    widths = [max(1, round(share * g.units)) if names is None or g.name in names else g.units for g in groups]
    return CompressionPolicy(tuple(widths), (bits[0],) * layers, (bits[1],) * layers)


def pictures(count=96, size=8, seed=0):
    """Return smooth random images: neighboring pixels have nearly the same values, as in photographs."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, -(-size // 2), -(-size // 2), generator=rng)
    return F.interpolate(coarse, (size, size), mode="bilinear") + 0.3 * torch.randn(count, 3, size, size, generator=rng)


def error(network, model, images):
    """Return the mean squared difference of the outputs, relative to their variance over the images."""
    with torch.no_grad():
        dense = model(images)
        return float((network(images) - dense).square().mean() / dense.var(0).mean())


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    return with_statistics(Residual()), pictures(), pictures(200, seed=1)


def recovered(model, images, *recoveries, names=None, share=0.5, bits=(32, 32), quantizer=None):
    """Return the compressed network."""
    assembler = problem(model, images, recoveries, quantizer)
    return assembler.assemble(policy(assembler, share, names, bits))


INNER = ("a1", "b1")


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


# -------------------------------------------------------------------------------------------------------- left as they are


class Shared(nn.Module):
    """A layer that runs twice, attention and a layer that never runs; a transposed layer and one with reflecting padding."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.down = nn.Conv2d(8, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.idle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        x = F.relu(self.down(F.relu(self.up(F.relu(self.reflect(x))))))
        tokens = x.flatten(2).transpose(1, 2)
        return self.head(tokens.mean(1) + self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


@pytest.mark.numerics
def test_layers_that_cannot_be_refitted_are_left_alone():
    torch.manual_seed(0)
    model, images = with_statistics(Shared()), pictures(60)
    sequential, sliced = recovered(model, images, Sequential()), recovered(model, images)
    for name in ("twice", "attention.out_proj", "idle", "reflect", "up", "down"):
        pair = sequential.get_submodule(name).weight, sliced.get_submodule(name).weight
        assert torch.equal(*pair) is (name not in ("twice", "reflect", "up", "down")), name
    # A layer that runs several times is refitted from the dense network's moments.
    assert torch.equal(sequential.twice.weight, recovered(model, images, LeastSquares()).twice.weight)
    assert error(sequential, model, images) < error(sliced, model, images)


def test_other_functions_than_the_dense_networks_stop_the_refits(caplog):
    class Fickle(Residual):
        def forward(self, x):
            x = F.relu(self.stem_norm(self.stem(x)))
            x = self.block("a", x)
            if self.b1.weight.shape[0] < 16:
                x = x * 1.0
            return self.head(self.block("b", x).mean((2, 3)))

    torch.manual_seed(0)
    model, images = with_statistics(Fickle()), pictures(40)
    network, sliced = recovered(model, images, Sequential(), names=INNER), recovered(model, images, names=INNER)
    assert not torch.equal(network.a2.weight, sliced.a2.weight)
    assert torch.equal(network.b2.weight, sliced.b2.weight) and torch.equal(network.head.weight, sliced.head.weight)
    assert "not refitted" in caplog.text


class SequenceFirst(nn.Module):
    """Tokens on the first axis, images on the second: rows of different batches are in different order."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.token1, self.token2 = nn.Linear(6, 12), nn.Linear(12, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        tokens = F.relu(self.stem(x)).flatten(2).permute(2, 0, 1)
        return self.head(self.token2(F.relu(self.token1(tokens))).mean(0))


@pytest.mark.numerics
def test_layers_whose_first_axis_is_not_that_of_the_images_are_refitted_from_the_dense_moments():
    torch.manual_seed(0)
    model, images = with_statistics(SequenceFirst()), pictures(150)
    network, sliced = recovered(model, images, Sequential()), recovered(model, images)
    assert torch.equal(network.token2.weight, recovered(model, images, LeastSquares()).token2.weight)
    assert error(network, model, images) < error(sliced, model, images)


# ------------------------------------------------------------------------------------------------------------ soundness


@pytest.mark.numerics
def test_fewer_samples_than_unknowns_do_no_harm(residual):
    model, images, others = residual
    few = Sequential(SequentialConfig(max_images=4, samples=20))
    assert error(recovered(model, images, few, names=INNER), model, others) < error(
        recovered(model, images, names=INNER), model, others
    )


def test_damping_pulls_to_the_present_weights(residual):
    model, images, _ = residual
    strong = recovered(model, images, Sequential(SequentialConfig(damping=1e9)), names=INNER)
    weights = {name: p for name, p in recovered(model, images, names=INNER).named_parameters() if name.endswith("weight")}
    for name, parameter in weights.items():
        assert torch.allclose(strong.get_parameter(name), parameter, atol=1e-5), name


def test_layers_with_too_many_unknowns_keep_their_weight_and_their_mean(residual):
    model, images, _ = residual
    network = recovered(model, images, Sequential(SequentialConfig(max_inputs=70, samples=10**6)), names=INNER)
    sliced = recovered(model, images, names=INNER)
    for name in ("a2", "b1", "b2"):
        assert torch.equal(network.get_submodule(name).weight, sliced.get_submodule(name).weight)
    means = []
    for tried in (model, network):
        seen = []
        tried.a2_norm.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.clone()))
        tried(images)
        tried.a2_norm._forward_hooks.clear()
        means.append(seen[0].mean((0, 2, 3)))
    assert torch.allclose(means[0], means[1], atol=1e-2)
    assert not torch.equal(network.a2_norm.running_mean, sliced.a2_norm.running_mean)


def test_dead_batch_norm_channels_stay_finite():
    torch.manual_seed(0)
    model, images = with_statistics(Residual()), pictures(60)
    model.a2_norm.weight.data[0] = 0.0
    model.b1_norm.weight.data[3] = 1e-12
    network = recovered(model, images, Sequential(), names=INNER)
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())


def test_memory_bounds_cut_images_and_samples(residual):
    model, images, _ = residual
    tight = Sequential(SequentialConfig(max_bytes=400_000, max_target_bytes=100_000))
    assembler = problem(model, images, [tight])
    assembler.assemble(policy(assembler, names=INNER))
    targets = assembler.cache.get(("sequential", tight.config), None)
    assert 1 <= targets.images < len(images)
    assert sum(values.nbytes for values in targets.values.values()) < 150_000
    assert len(targets.values["a2"]) > len(targets.values["stem"])  # 144 unknowns and 27


@pytest.mark.parametrize(
    ("option", "value"),
    [("damping", 0), ("max_images", 0), ("samples", 0), ("max_inputs", 0), ("clip_rounds", -1), ("max_bytes", 0)],
)
def test_options_out_of_range_are_input_errors(option, value):
    with pytest.raises(InputError, match=option):
        SequentialConfig(**{option: value})


# -------------------------------------------------------------------------------------------------------- quantization


@pytest.mark.numerics
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_rounding_is_absorbed_by_later_layers(quantizer, residual):
    model, images, others = residual
    config, make = QUANTIZERS[quantizer]
    plain, sequential = (
        recovered(model, images, *recoveries, names=INNER, bits=(4, 4), quantizer=make(config()))
        for recoveries in ((LeastSquares(),), (Sequential(),))
    )
    assert all(len(layer.weight[0].unique()) <= 16 for layer in sequential.modules() if isinstance(layer, nn.Conv2d))
    assert error(sequential, model, others) < error(plain, model, others)


def test_quantizer_sees_the_moments_of_the_real_inputs(residual):
    model, images, _ = residual
    seen = {}

    class Spy(Uniform):
        def quantize_weight(self, weight, bits, statistics=None):
            seen[tuple(weight.shape)] = statistics
            return super().quantize_weight(weight, bits, statistics)

    network = recovered(model, images, Sequential(SequentialConfig(samples=10**6)), names=("a1",), bits=(4, 32), quantizer=Spy())
    statistics = seen[tuple(network.a2.weight.shape)]
    inputs = []
    network.a2.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    network(images)
    rows = F.unfold(inputs[0], 3, padding=1).transpose(1, 2).flatten(0, 1)
    rows = F.pad(rows, (0, 1), value=1.0).double()
    assert statistics.moments[0] == pytest.approx((rows.T @ rows / len(rows)).detach().numpy(), abs=1e-3)
    assert statistics.channels == network.a2.weight.shape[1]


def test_mean_error_of_rounding_goes_to_the_intercept_once(residual):
    model, images, _ = residual
    bias_correction, sequential = RECOVERIES.get("bias_correction"), Sequential(SequentialConfig(samples=10**6, clip_rounds=0))
    networks = [recovered(model, images, sequential, names=INNER, bits=(3, 32))]
    if bias_correction:
        networks.append(recovered(model, images, sequential, bias_correction[1](), names=INNER, bits=(3, 32)))
    for network in networks:
        difference = network(images) - model(images)
        assert difference.mean(0).abs().max() < 1e-4
