"""Moments against explicit unfolding, over every way in which layers read their inputs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.calibration import CalibrationConfig, calibrate, plan_calibration
from secateur.envs.calibration.core import CHANNEL, DIAGONAL, FULL, NONE
from secateur.envs.core import InputError
from secateur.envs.model_graph import analyze

EVERYTHING = CalibrationConfig(positions=10_000, batch_size=3, samples=50)


def images(channels=4, size=9, count=7, seed=0):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def calibrated(model, x, config=EVERYTHING):
    torch.manual_seed(0)
    model = model.eval()
    return calibrate(model, analyze(model, (x[:1],)), x, config)


def moments(rows):
    """(conv_groups, rows, entries) -> mean of [u, 1] [u, 1]^T in float64."""
    rows = torch.cat([rows.double(), torch.ones(*rows.shape[:2], 1)], dim=2)
    return (rows.mT @ rows / rows.shape[1]).numpy()


def unfolded(layer, x, padding):
    """What a convolution reads at all positions, (conv_groups, images x positions, entries)."""
    u = F.unfold(F.pad(x, padding), layer.kernel_size, layer.dilation, 0, layer.stride)
    return u.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("arguments", "padding"),
    [
        ({"kernel_size": 3}, (0, 0, 0, 0)),
        ({"kernel_size": 1}, (0, 0, 0, 0)),
        ({"kernel_size": 3, "stride": 2, "padding": 1}, (1, 1, 1, 1)),
        ({"kernel_size": (3, 1), "padding": (1, 0)}, (0, 0, 1, 1)),
        ({"kernel_size": (1, 5), "stride": (2, 3), "padding": (0, 2)}, (2, 2, 0, 0)),
        ({"kernel_size": (2, 3), "dilation": (3, 2)}, (0, 0, 0, 0)),
        ({"kernel_size": (4, 3), "padding": "same"}, (1, 1, 1, 2)),
        ({"kernel_size": 2, "dilation": (1, 3), "padding": "same"}, (1, 2, 0, 1)),
        ({"kernel_size": 3, "padding": "valid"}, (0, 0, 0, 0)),
        ({"kernel_size": 3, "groups": 2}, (0, 0, 0, 0)),
        ({"kernel_size": 3, "padding": 1, "groups": 4}, (1, 1, 1, 1)),
    ],
)
def test_full_moments_are_those_of_the_unfolded_input(arguments, padding):
    x, layer = images(), nn.Conv2d(4, 8, **arguments)
    found = calibrated(nn.Sequential(layer), x).layers["0"]
    expected = moments(unfolded(layer, x, padding))
    assert found.kind == FULL and found.moments.dtype == np.float32 and found.channels == layer.weight.shape[1]
    assert np.allclose(found.moments, expected, rtol=1e-5, atol=1e-6)
    assert np.allclose(found.mean(), expected[:, -1, :-1], rtol=1e-5, atol=1e-6)
    assert found.count == unfolded(layer, x, padding).shape[1]


def test_large_matrices_are_put_together_from_strips():
    x, layer = images(40, 6), nn.Conv2d(40, 2, 3)
    found = calibrated(nn.Sequential(layer), x).layers["0"].moments
    assert found.shape == (1, 361, 361) and np.array_equal(found, found.transpose(0, 2, 1))
    assert np.allclose(found, moments(unfolded(layer, x, (0, 0, 0, 0))), rtol=1e-5, atol=1e-5)


def test_weight_times_moments_is_what_the_outputs_say():
    x, layer = images(), nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
    found = calibrated(nn.Sequential(layer), x).layers["0"].moments[0, :-1, :-1]
    y = layer(x).detach().transpose(0, 1).flatten(1).double()
    weight = layer.weight.detach().flatten(1).double().numpy()
    assert np.allclose(weight @ found @ weight.T, (y @ y.T / y.shape[1]).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_channel_and_diagonal_are_means_over_pixels(groups):
    x, layer = images() + 0.3, nn.Conv2d(4, 8, 3, padding=1, groups=groups)
    pixels = x.flatten(2).permute(1, 0, 2).flatten(1).view(groups, 4 // groups, -1).mT  # (groups, pixels, channels)
    matrix = 4 * groups * (4 // groups + 1) ** 2
    found = {
        limit: calibrated(nn.Sequential(layer), x, CalibrationConfig(positions=10_000, max_matrix_bytes=limit)).layers["0"]
        for limit in (matrix, matrix - 1)
    }
    channel, diagonal = found[matrix], found[matrix - 1]
    assert (channel.kind, diagonal.kind) == (CHANNEL, DIAGONAL)
    assert channel.channels == diagonal.channels == 4 // groups
    assert np.allclose(channel.moments, moments(pixels), rtol=1e-5, atol=1e-6)
    expected = torch.stack([pixels.double().mean(1), pixels.double().square().mean(1)], dim=1)
    assert np.allclose(diagonal.moments, expected.numpy(), rtol=1e-5, atol=1e-6)
    for mean in (channel.mean(), diagonal.mean()):
        assert np.allclose(mean, expected[:, 0].repeat_interleave(9, dim=1).numpy(), rtol=1e-5, atol=1e-6)


class Tokens(nn.Module):
    """A linear layer on tokens, as in transformers, behind one that folds windows into the batch."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)  # (images, 81, 4)
        windows = self.inner(tokens.reshape(-1, 9, 4))  # (images * 9, 9, 6)
        return self.head(self.outer(windows.reshape(len(x), 81, 6)).mean(1))


def test_linear_layers_read_tokens():
    x, model = images(), Tokens()
    layers = calibrated(model, x).layers
    tokens = x.flatten(2).transpose(1, 2).reshape(1, -1, 4)
    assert np.allclose(layers["inner"].moments, moments(tokens), rtol=1e-5, atol=1e-6)
    assert layers["outer"].count == 7 * 81 and layers["head"].count == 7
    few = calibrated(model, x, CalibrationConfig(positions=5)).layers
    assert few["inner"].count == few["outer"].count == 7 * 5, "a window is not an image"


def test_flattened_images_are_one_token():
    x, model = images(2, 3), nn.Sequential(nn.Flatten(), nn.Linear(18, 3))
    found = calibrated(model, x).layers["1"]
    assert np.allclose(found.moments, moments(x.flatten(1)[None]), rtol=1e-5, atol=1e-6)


class Repeated(nn.Module):
    """One convolution three times, under two names, and a linear layer called by keyword."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = self.first
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(input=self.second(self.first(self.first(x))).mean((2, 3)))


def test_shared_layers_add_up_over_their_calls():
    x, model = images(), Repeated()
    calibration = calibrated(model, x)
    with torch.no_grad():
        inputs = torch.cat([x, model.first(x), model.first(model.first(x))])
        pooled = model.first(inputs[-len(x) :]).mean((2, 3))
    assert set(calibration.layers) == {"first", "head"}
    found = calibration.layers["first"]
    assert np.allclose(found.moments, moments(unfolded(model.first, inputs, (1,) * 4)), rtol=1e-4, atol=1e-5)
    assert (found.low, found.high) == pytest.approx((inputs.min().item(), inputs.max().item()), abs=1e-6)
    assert len(found.samples) == EVERYTHING.samples
    assert np.allclose(calibration.layers["head"].moments, moments(pooled[None]), rtol=1e-4, atol=1e-5)


class Standardised(nn.Conv2d):
    """Computes with something else than its weight."""

    def forward(self, x):
        return F.conv2d(x, self.weight, None, self.stride) * 2


class Odd(nn.Module):
    """Layers of which no moments are known, each for a reason of its own."""

    def __init__(self):
        super().__init__()
        self.own = Standardised(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.right.weight = self.left.weight
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        tokens = self.own(x).flatten(2).transpose(1, 2)[:, :8]
        mixed = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.right(self.left(mixed)).mean(1)


def test_what_cannot_be_described_is_left_out():
    layers = calibrated(Odd(), images(size=4)).layers
    assert {name for name, layer in layers.items() if layer.kind == NONE} >= {"own", "left"}
    assert not {name for name in layers if name.startswith(("attention", "unused"))}, "nothing is seen of them"
    for name in ("own", "left"):
        assert layers[name].moments.size == 0 and layers[name].channels == 0 and layers[name].low < layers[name].high
        with pytest.raises(ValueError, match="no moments"):
            layers[name].mean()


# --------------------------------------------------------------------------------------------------- range and samples


def test_ranges_cover_all_batches_and_samples_are_sorted_values_of_the_input():
    x = images()
    x[6, 1, 2, 3] = 50.0
    found = calibrated(nn.Sequential(nn.Conv2d(4, 2, 3)), x).layers["0"]
    assert (found.low, found.high) == (x.min().item(), 50.0)
    assert len(found.samples) == 50 and np.all(np.diff(found.samples) >= 0)
    assert np.isin(found.samples, x.numpy()).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_an_input_error(value):
    x = images()
    x[4, 0, 0, 0] = value
    with pytest.raises(InputError, match="`0` has no finite range"):
        calibrated(nn.Sequential(nn.Conv2d(4, 2, 3)), x)


def test_hooks_are_removed_even_when_the_model_fails():
    model, x = nn.Sequential(nn.Conv2d(4, 2, 3)).eval(), images()
    graph = analyze(model, (x[:1],))
    with pytest.raises(RuntimeError):
        calibrate(model, graph, x[:, :3], EVERYTHING)
    assert not model[0]._forward_pre_hooks


def test_the_seed_alone_decides_what_is_sampled():
    x, model = images(), nn.Sequential(nn.Conv2d(4, 2, 3))
    first, again, other = (calibrated(model, x, CalibrationConfig(positions=5, seed=seed)).layers["0"] for seed in (0, 0, 1))
    assert np.array_equal(first.moments, again.moments) and np.array_equal(first.samples, again.samples)
    assert not np.array_equal(first.moments, other.moments) and not np.array_equal(first.samples, other.samples)
    assert first.count == 7 * 5


def test_only_so_many_images_are_used():
    x, model = images(), nn.Sequential(nn.Conv2d(4, 2, 3))
    found = calibrated(model, x, CalibrationConfig(positions=10_000, max_images=2))
    assert found.images == 2 and found.layers["0"].count == 2 * 49


@pytest.mark.parametrize("option", ["max_images", "positions", "max_matrix_bytes", "samples", "batch_size"])
def test_options_below_one_are_input_errors(option):
    with pytest.raises(InputError, match=f"`{option}` of the calibration must be (at least 1|in \\[1, .*\\]), but got 0"):
        CalibrationConfig(**{option: 0})
    with pytest.raises(InputError, match="`seed` of the calibration"):
        CalibrationConfig(seed=-1)


# ------------------------------------------------------------------------------------------------------ memory, slicing


@pytest.mark.parametrize("limit", [100, 5_000, 10_000_000])
def test_the_plan_says_what_the_pass_keeps(limit):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=4), Standardised(8, 8, 1), nn.ConvTranspose2d(8, 20, 3), nn.Flatten(),
        nn.Linear(980, 3),
    )  # fmt: skip
    config = CalibrationConfig(max_matrix_bytes=limit, samples=30)
    calibration = calibrated(model, images(), config)
    plans = plan_calibration(model, analyze(model, (images()[:1],)), config)
    assert {name: (plan.kind, plan.nbytes) for name, plan in plans.items()} == {
        name: (layer.kind, layer.nbytes) for name, layer in calibration.layers.items()
    }
    assert calibration.nbytes == sum(plan.nbytes for plan in plans.values())
    for layer in calibration.layers.values():
        assert layer.kind == DIAGONAL or layer.moments.nbytes <= limit
    assert plans["2"].reason and not plans["0"].reason
    assert all((plan.matrix_bytes > limit) == (plan.kind in (CHANNEL, DIAGONAL)) for plan in plans.values())


@pytest.mark.parametrize("limit", [10_000_000, 300, 20])
@pytest.mark.parametrize("groups", [1, 3])
def test_restricted_statistics_are_those_of_the_sliced_input(limit, groups):
    x, layer = images(6), nn.Conv2d(6, 6, (3, 2), padding=1, groups=groups)
    config = CalibrationConfig(positions=10_000, max_matrix_bytes=limit)
    found = calibrated(nn.Sequential(layer), x, config).layers["0"]
    kept_in = np.array([0, 2, 4] if groups == 1 else [1])
    kept_groups = None if groups == 1 else np.array([0, 2])
    channels = kept_in if groups == 1 else (kept_groups[:, None] * 2 + kept_in).ravel()
    small = nn.Conv2d(len(channels), 6, (3, 2), padding=1, groups=1 if groups == 1 else 2)
    expected = calibrated(nn.Sequential(small), x[:, channels], SimpleNamespace(**vars(config) | kind_limit(found.kind, small)))
    restricted = found.restricted(kept_in, kept_groups)
    assert restricted.kind == expected.layers["0"].kind == found.kind and restricted.channels == len(kept_in)
    assert np.allclose(restricted.moments, expected.layers["0"].moments, rtol=1e-5, atol=1e-6)
    assert np.allclose(restricted.mean(), expected.layers["0"].mean(), rtol=1e-5, atol=1e-6)


def kind_limit(kind, layer):
    """Return the limit under which the statistics of a layer are of this kind."""
    groups, channels = layer.groups, layer.weight.shape[1]
    return {"max_matrix_bytes": {FULL: 10_000_000, CHANNEL: 4 * groups * (channels + 1) ** 2, DIAGONAL: 1}[kind]}


def test_nothing_can_be_written_to():
    found = calibrated(nn.Sequential(nn.Conv2d(4, 2, 3)), images()).layers["0"]
    for statistics in (found, found.restricted(np.array([1, 2]))):
        for array in (statistics.moments, statistics.samples, statistics.mean()):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
