"""Multiply-accumulates of operators that are not layers, against formulas written here; unknown operators are named."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from secateur.envs.model_graph import analyze

STEPS, FEATURES, HIDDEN = 5, 8, 6


class Head(nn.Module):
    """Any function of a sequence, (1, 5, 8), and of modules, in front of a linear layer."""

    def __init__(self, function, *modules, features=HIDDEN):
        super().__init__()
        self.function, self.inner, self.fc = function, nn.ModuleList(modules), nn.Linear(features, 3)

    def forward(self, x):
        return self.fc(self.function(x, *self.inner))


def counted(function, *modules, features=HIDDEN):
    graph = analyze(Head(function, *modules, features=features), (torch.zeros(1, STEPS, FEATURES),), verify=False)
    return graph.geometry.shapes().other_macs[0], graph.geometry.uncounted


def recurrent_macs(gates, inputs=FEATURES, steps=STEPS):
    return steps * gates * HIDDEN * (inputs + HIDDEN)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_count_every_step_layer_and_direction(kind, gates):
    plain = kind(FEATURES, HIDDEN, batch_first=True)
    assert counted(lambda x, rnn: rnn(x)[0].mean(1), plain) == (recurrent_macs(gates), ())
    deep = kind(FEATURES, HIDDEN, num_layers=2, bidirectional=True, batch_first=True)
    expected = 2 * (recurrent_macs(gates) + recurrent_macs(gates, inputs=2 * HIDDEN))
    assert counted(lambda x, rnn: rnn(x)[0].mean(1), deep, features=2 * HIDDEN) == (expected, ())


def test_the_projection_of_an_lstm_is_counted():
    lstm = nn.LSTM(FEATURES, HIDDEN, proj_size=2, batch_first=True)
    assert counted(lambda x, rnn: rnn(x)[0].mean(1), lstm, features=2) == (STEPS * (4 * HIDDEN * (FEATURES + 2) + 2 * HIDDEN), ())


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_recurrent_cells_count_every_call(kind, gates):
    def twice(x, cell):
        first = cell(x[:, 0])
        second = cell(x[:, 1], first)
        return second[0] if isinstance(second, tuple) else second

    assert counted(twice, kind(FEATURES, HIDDEN)) == (recurrent_macs(gates, steps=2), ())


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x @ x.mT, STEPS * STEPS * FEATURES),
        (lambda x: torch.einsum("nti,nsi->nts", x, x), STEPS * STEPS * FEATURES),
        (lambda x: torch.tensordot(x, x, dims=([2], [2])), STEPS * STEPS * FEATURES),
        (lambda x: torch.cdist(x, x), STEPS * STEPS * FEATURES),
        (lambda x: torch.addbmm(x[0, :, :STEPS], x, x.mT), STEPS * STEPS * FEATURES),
        (lambda x: F.scaled_dot_product_attention(x, x, x), 2 * STEPS * STEPS * FEATURES),
        (lambda x: torch.mv(x[0], x[0, 0]), STEPS * FEATURES),
        (lambda x: F.conv1d(x, x[:, :, :3]), 6 * STEPS * 3),
        (lambda x: x * x.softmax(-1).cumsum(1).sort(-1).values, 0),
        (lambda x: F.interpolate(x, 16).topk(3).values, 0),
    ],
)
def test_products_of_activations(function, expected):
    assert counted(lambda x: function(x).flatten().sum() + torch.zeros(1, HIDDEN)) == (expected, ())


def test_a_bilinear_layer_counts_its_weight_for_every_row():
    assert counted(lambda x, layer: layer(x, x).mean(1), nn.Bilinear(FEATURES, FEATURES, HIDDEN)) == (
        STEPS * HIDDEN * FEATURES**2,
        (),
    )


def test_an_operator_of_torchvision_is_counted():
    conv = torchvision.ops.DeformConv2d(1, HIDDEN, 3, padding=1)

    def deformed(x, conv):
        return conv(x[:, None], torch.zeros(1, 18, STEPS, FEATURES)).mean((2, 3))

    assert counted(deformed, conv) == (STEPS * FEATURES * HIDDEN * 9, ())


@pytest.mark.parametrize("groups", [1, 4])
def test_a_transposed_convolution_with_a_computed_weight_counts_like_a_plain_one(groups):
    def macs(wrap):
        conv = nn.ConvTranspose2d(8, 12, 4, 2, 1, groups=groups)
        net = nn.Sequential(wrap(conv), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))
        geometry = analyze(net, (torch.zeros(1, 8, 5, 5),), verify=False).geometry
        return float(geometry.shapes().weights[0] @ geometry.macs_per_weight) + geometry.shapes().other_macs[0]

    assert macs(weight_norm) == macs(lambda conv: conv) == 25 * 8 * 12 // groups * 16 + 36


def test_operators_that_cannot_be_counted_are_named_with_their_module():
    class Mixer(nn.Module):
        def forward(self, x):
            return torch.fft.rfft2(x).real.mean((1, 2))[:, None].expand(-1, HIDDEN)

    macs, uncounted = counted(lambda x, mixer: mixer(x), Mixer())
    assert (macs, uncounted) == (0, ("fft_rfft2 in `inner.0`",))
