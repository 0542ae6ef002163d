"""Mixed-precision compensation: the right pairs, the right scales, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.envs.assembler import Assembler
from secateur.envs.core import CompressionPolicy, InputError
from secateur.envs.model_graph import analyze
from secateur.envs.model_graph.plan import TensorSlice
from secateur.envs.quantization.quantizers.uniform import Uniform
from secateur.envs.recovery.common.channel_scales import Filters, ScaleEstimator, filters
from secateur.envs.recovery.df_mpc import DFMPC, DFMPCConfig, low_producers


class Block(nn.Module):
    """A stem, a residual block, and a linear head; the stream has two producers."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.first_norm = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.second_norm = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(x + self.second_norm(self.second(F.relu(self.first_norm(self.first(x))))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def built():
    torch.manual_seed(0)
    model = Block().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
            module.running_var.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.5)
    graph = analyze(model, (torch.zeros(1, 3, 8, 8),))
    scores = tuple(np.arange(group.units)[::-1].astype(float) for group in graph.groups)
    return Assembler(model, graph, scores, Uniform(), [DFMPC(DFMPCConfig(statistics="kept"))])


def policy(graph, bits):
    """bits: of stem, first, second, head."""
    return CompressionPolicy(tuple(group.units for group in graph.groups), bits, (32,) * 4)


def scaled_inputs(built, bits):
    """Return {layer: scale of every input channel} before rounding: the scales are seen where the layer stays in float."""
    network = built.assemble(policy(built.graph, bits))
    plain = replace(built, recoveries=[]).assemble(policy(built.graph, bits))
    found = {}
    for name in ("first", "second", "head"):
        new, old = (net.get_submodule(name).weight.detach() for net in (network, plain))
        axes = [axis for axis in range(new.dim()) if axis != 1]
        found[name] = (new * old).sum(axes) / old.square().sum(axes)
        if not hasattr(network.get_submodule(name), "weight_codes"):
            assert torch.allclose(new, old * found[name].view(1, -1, *[1] * (new.dim() - 2)), atol=1e-6)
    return found


def test_scale_is_the_minimum_by_brute_force(built):
    """c_j of the paper's loss, against a fine grid of scales."""
    scales = scaled_inputs(built, (32, 2, 32, 32))["second"]
    candidate = built.candidate(policy(built.graph, (32, 2, 32, 32)))
    before = filters(candidate.layers["first"], candidate.norm("first"))
    candidate.quantize("first")
    after = filters(candidate.layers["first"], candidate.norm("first"))
    c = torch.linspace(0, 3, 30001, dtype=torch.float64)[:, None, None]
    loss = (c * after.rows - before.rows).square().sum(2)
    loss = loss + 0.5 * (c[..., 0] * after.offsets - before.offsets).square()
    assert torch.allclose(scales.double(), c.flatten()[loss.argmin(0)], atol=1e-4)
    assert (scales - 1).abs().max() > 0.01


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ((32, 2, 32, 32), {"second"}),
        ((32, 2, 6, 32), {"second", "head"}),  # `second` is low beside the float head, the float stem does not count
        ((6, 2, 6, 6), {"second"}),
        ((2, 6, 2, 6), {"first", "head"}),
        ((4, 4, 4, 4), set()),
        ((32, 6, 2, 2), set()),
        ((8, 32, 2, 4), {"first"}),  # the head reads the stem's 8 bits too
    ],
)
def test_readers_of_fewer_bits_are_the_pairs(bits, expected, built):
    candidate = built.candidate(policy(built.graph, bits))
    built.recoveries[0].apply(candidate)
    found = {name for group in built.graph.groups for name in group.consumers if _ran_before(group, name, candidate)}
    assert found == expected


def _ran_before(group, reader, candidate):
    """Whether the reader is a pair with the group's producers that run before it."""
    order = ["stem", "first", "second", "head"]
    later = [name for name in order[order.index(reader) :] if name in candidate.float_weights]
    taken = {name: candidate.float_weights.pop(name) for name in later}
    low = low_producers(candidate, group, reader)
    candidate.float_weights.update(taken)
    return bool(low)


def test_scales_are_never_negative():
    book = ScaleEstimator(0.5)
    one = torch.eye(2).double()
    before, after = Filters(one, torch.zeros(2).double()), Filters(-one, torch.ones(2).double())
    units = TensorSlice("", 0, np.array([[0], [1]]))
    assert book._ratio(*book._sums(before, after, units)).tolist() == [0, 0]


def test_damped_scales_shrink(built):
    damped = replace(built, recoveries=[DFMPC(DFMPCConfig(statistics="kept", lambda2=1e9))])
    assert scaled_inputs(damped, (32, 2, 32, 32))["second"].abs().max() < 1e-6


@pytest.mark.parametrize("statistics", ["kept", "norms", "moments"])
def test_batch_norms_are_restated_as_asked(statistics, built):
    config = DFMPCConfig(statistics=statistics)
    bits = policy(built.graph, (32, 2, 32, 32))
    network = replace(built, recoveries=[DFMPC(config)]).assemble(bits)
    model = built.model
    ratio = network.first_norm.running_var / model.first_norm.running_var
    shift = network.first_norm.running_mean - model.first_norm.running_mean
    squares = network.first.weight.square().sum((1, 2, 3)) / model.first.weight.square().sum((1, 2, 3))
    if statistics == "kept":
        assert (ratio == 1).all() and (shift == 0).all()
    elif statistics == "moments":
        assert (shift != 0).all() and not torch.allclose(ratio, squares, rtol=1e-3)
    else:
        assert (shift == 0).all() and not torch.allclose(ratio, torch.ones(6), rtol=1e-3)
    assert torch.equal(network.second_norm.running_var, model.second_norm.running_var)  # its layer is not quantized


def test_nothing_quantized_means_nothing_changed(built):
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(built.assemble(policy(built.graph, (32,) * 4))(images), built.model(images))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"statistics": "true"}, "statistics"),
        ({"lambda1": -1.0}, "lambda1"),
        ({"lambda2": float("inf")}, "lambda2"),
        ({"spatial_correlation": -0.1}, "spatial_correlation"),
    ],
)
def test_options_out_of_range_are_input_errors(options, named):
    with pytest.raises(InputError, match=f"`{named}` of the recovery `df_mpc`"):
        DFMPCConfig(**options)
